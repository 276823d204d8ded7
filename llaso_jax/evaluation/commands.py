"""What the commands of `llaso evaluate` do, from parsed arguments to printed and written results."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llaso_jax.errors import ConfigError
from llaso_jax.evaluation.answering.questions import tasks_of
from llaso_jax.evaluation.bootstrap import Bootstrap
from llaso_jax.evaluation.comparison import Comparison
from llaso_jax.evaluation.comparison import compare as compare_models
from llaso_jax.evaluation.coverage import Training, load_training, seen_and_unseen
from llaso_jax.evaluation.errors import JudgeError, NoPredictionsError
from llaso_jax.evaluation.judge.local import LocalJudge, agreement_line
from llaso_jax.evaluation.judge.openai_judge import OpenAIJudge, default_cache
from llaso_jax.evaluation.judge.replay import ReplayJudge
from llaso_jax.evaluation.paper import check_paper
from llaso_jax.evaluation.predictions import ModelFolder, find_models
from llaso_jax.evaluation.progress import progress_bar
from llaso_jax.evaluation.report.comparison_page import write_comparison
from llaso_jax.evaluation.report.page import judge_line, write_page
from llaso_jax.evaluation.robustness import robustness_tree
from llaso_jax.evaluation.scores_file import SCORES_FILE, scores_tree, write_json
from llaso_jax.evaluation.scoring import Judge, ModelScores, Settings, score_model
from llaso_jax.evaluation.tables import (
    comparison_table,
    further_table,
    pair_lines,
    paper_table,
    summary_table,
    write_tables,
)
from llaso_jax.evaluation.tasks import TaskFiles, load_tasks
from llaso_jax.evaluation.unit_score import PROTOCOLS, Protocol

_PROTOCOLS: dict[str, tuple[Protocol, ...]] = {
    "upstream": ("paper",),
    "corrected": ("corrected",),
    "both": PROTOCOLS,
}


def score(args: argparse.Namespace, console: Console) -> int:
    """`llaso evaluate score`."""
    tasks = load_tasks(args.task_list, only=args.tasks)
    models = find_models(args.predictions, list(tasks))
    judge = make_judge(args)
    training = load_training(args.trained_on, load_tasks(args.task_list)) if args.trained_on else {}
    output = writable_folder(args.output)
    return _score(args, models, tasks, output, console, judge, training)


def run(args: argparse.Namespace, console: Console) -> int:
    """`llaso evaluate run`."""
    from llaso_jax.evaluation.answering.commands import answer_benchmark, plan  # loads JAX

    # What can be wrong with the arguments is found before hours of answering.
    args.audio_root = args.audio_root or (args.data if args.data.is_dir() else args.data.parent)
    judge = make_judge(args)
    output = writable_folder(args.output / "report")
    planned = plan(args)
    answered = tasks_of(planned.files)
    tasks = load_tasks(args.task_list, only=args.tasks) if args.data.is_dir() else answered
    known = load_tasks(args.task_list) | tasks
    training = load_training(args.trained_on, known) if args.trained_on else {}
    beside = find_models(args.beside, list(tasks))
    if planned.folder.name in [model.name for model in beside]:
        raise ConfigError(
            f"--beside holds a model called {planned.folder.name} too. Give this one another --name."
        )
    answer_benchmark(args, planned, console)
    compared = {
        name: _compare_perturbed(args, planned.folder, variant, answered, judge)
        for name, variant in planned.perturbed.items()
    }
    robustness = robustness_tree(compared, answered, asked=list(planned.perturbers))
    models = [*find_models([planned.folder], list(tasks)), *beside]
    return _score(
        args, models, tasks, output, console, judge, training, robustness, limit=args.limit
    )


def _settings(
    args: argparse.Namespace, protocols: tuple[Protocol, ...], *, examples: int
) -> Settings:
    bootstrap = Bootstrap(samples=args.bootstrap, seed=args.bootstrap_seed)
    return Settings(protocols=protocols, bootstrap=bootstrap, examples=examples)


def _compare_perturbed(
    args: argparse.Namespace, clean: Path, perturbed: Path, tasks: TaskFiles, judge: Judge | None
) -> Comparison:
    """Clean and perturbed answers to the files that were asked perturbed."""
    (variant,) = find_models([perturbed], list(tasks))
    asked = {file: spec for file, spec in tasks.items() if file in variant.files}
    (base,) = find_models([clean], list(asked))
    settings = _settings(args, _PROTOCOLS[args.protocol][-1:], examples=0)
    return compare_models(base, variant, asked, judge, settings)


def _score(
    args: argparse.Namespace,
    models: Sequence[ModelFolder],
    tasks: TaskFiles,
    output: Path,
    console: Console,
    judge: Judge | None,
    training: Mapping[str, Training],
    robustness: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> int:
    settings = _settings(args, _PROTOCOLS[args.protocol], examples=args.examples)
    scored = score_models(models, tasks, judge, settings, console)
    described = describe_judge(judge)
    coverage = seen_and_unseen(scored, tasks, training, settings.protocols[-1])
    tree = scores_tree(scored, tasks, settings, described) | {
        "coverage": coverage,
        "robustness": robustness or {},
        "limit": limit,
    }
    write_json(output / SCORES_FILE, tree)
    write_tables(output, scored, tasks, settings, judge=judge_line(described))
    write_page(
        output,
        scored,
        tasks,
        settings,
        judge=described,
        coverage=coverage,
        robustness=robustness or {},
        audio_root=args.audio_root,
        limit=limit,
    )
    _tell(console, [f"{model.name}: {note}" for model in scored for note in model.notes])
    _tell(console, [_missing(model, tasks) for model in scored if model.missing])
    if unscored := [name for name in training if name not in coverage]:
        _tell(
            console, [f"{args.trained_on} names models that are not scored: {', '.join(unscored)}"]
        )
    tables = Console(soft_wrap=True)
    tables.print(summary_table(scored, tasks, settings))
    if (further := further_table(scored, tasks, settings)) is not None:
        tables.print(further)
    console.print(f"judge of free answers: {judge_line(described)}", markup=False)
    console.print(f"written to {output}", markup=False)
    return 0


def _missing(model: ModelScores, tasks: TaskFiles) -> str:
    told = f"{len(model.missing)} of {len(tasks)} files are missing"
    return f"{model.name}: {told}: {', '.join(model.missing)}"


def _tell(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, style="yellow", markup=False)


def writable_folder(folder: Path) -> Path:
    """The same folder, made if it is not there.

    Raises:
      ConfigError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be a folder: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output {folder} cannot be written to.")
    return folder


def make_judge(args: argparse.Namespace) -> Judge | None:
    """The judge that the arguments ask for.

    Raises:
      JudgeError: no model named for an endpoint.
    """
    if args.judge == "openai":
        if not args.model:
            raise JudgeError("--judge openai needs --model, such as --model gpt-4o-mini.")
        return OpenAIJudge(
            args.model,
            args.base_url,
            args.judge_cache or default_cache(),
            per_minute=args.judge_rate,
            workers=args.judge_workers,
            timeout=args.judge_timeout,
        )
    return {"replay": ReplayJudge(), "local": LocalJudge(), "none": None}[args.judge]


def describe_judge(judge: Judge | None) -> dict[str, Any]:
    """Who judged; of the local judge also how well it agrees with the published one."""
    described: dict[str, Any] = {"name": judge.name if judge else None}
    if isinstance(judge, LocalJudge):
        described |= {"agreement": agreement_line(judge.agreement), "held_out": judge.agreement}
    return described


def score_models(
    models: Sequence[ModelFolder],
    tasks: TaskFiles,
    judge: Judge | None,
    settings: Settings,
    console: Console,
) -> list[ModelScores]:
    """Score models one after the other, with a progress bar."""
    with progress_bar(console) as progress:
        bar = progress.add_task("scoring", total=sum(len(model.files) for model in models))

        def scored(model: ModelFolder) -> ModelScores:
            def advance(file: str) -> None:
                progress.update(bar, advance=1, description=f"{model.name}: {file}")

            return score_model(model, tasks, judge, settings, advance=advance)

        return [scored(model) for model in models]


def compare(args: argparse.Namespace, console: Console) -> int:
    """`llaso evaluate compare`."""
    tasks = load_tasks(args.task_list, only=args.tasks)
    pair = [*find_models([args.a], list(tasks)), *find_models([args.b], list(tasks))]
    if len(pair) != 2:
        raise NoPredictionsError(
            f"compare takes two models, and {args.a} and {args.b} hold {len(pair)}: "
            f"{', '.join(model.name for model in pair)}. Name one model's folder each."
        )
    pair = distinct_names(pair)
    settings = _settings(args, _PROTOCOLS[args.protocol], examples=args.examples)
    judge = make_judge(args)
    output = writable_folder(args.output) if args.output else None
    described = describe_judge(judge)
    with progress_bar(console) as progress:
        bar = progress.add_task("comparing", total=len(pair[0].files))
        result = compare_models(
            pair[0],
            pair[1],
            tasks,
            judge,
            settings,
            advance=lambda file: progress.update(bar, advance=1, description=file),
        )
    shown = Console(soft_wrap=True)
    shown.print(comparison_table(result))
    console.print(f"judge of free answers: {judge_line(described)}", markup=False)
    _tell(console, result.notes)
    if output:
        tree = dataclasses.asdict(result) | {"judge": described}
        write_json(output / "comparison.json", tree)
        write_comparison(output, result, judge=judge_line(described))
        console.print(f"written to {output}", markup=False)
    else:
        for line in pair_lines(result):
            shown.print(line, markup=False)
    return 0


def distinct_names(models: Sequence[ModelFolder]) -> list[ModelFolder]:
    """Models of one name, told apart by as few of the folders above them as that takes."""
    paths = [model.path.resolve() for model in models]
    longest = max(len(path.parts) for path in paths)
    depth = next(
        depth
        for depth in range(1, longest + 1)
        if len({path.parts[-depth:] for path in paths}) == len(set(paths))
    )
    names = ["/".join(path.parts[-depth:]) for path in paths]
    pairs = zip(models, names, strict=True)
    return [dataclasses.replace(model, name=name) for model, name in pairs]


def paper(args: argparse.Namespace, console: Console) -> int:
    """`llaso evaluate paper`."""
    tasks = load_tasks()
    if args.output and args.output.is_dir():
        raise ConfigError(f"--output {args.output} is a folder, and a file is needed.")
    if args.output:
        writable_folder(args.output.parent)
    settings = Settings(protocols=("paper",), bootstrap=Bootstrap(samples=0), examples=0)
    models = find_models([args.predictions], list(tasks))
    scored = score_models(models, tasks, ReplayJudge(), settings, console)
    checks = check_paper(scored, tasks)
    notes = [f"{model.name}: {note}" for model in scored for note in model.notes]
    Console(soft_wrap=True).print(paper_table(checks))
    _tell(console, notes)
    if args.output:
        tree = {"checks": [dataclasses.asdict(check) for check in checks], "notes": notes}
        write_json(args.output, tree)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int]] = {
    "score": score,
    "run": run,
    "compare": compare,
    "paper": paper,
}
