"""What the commands of `llaso evaluate` do, from parsed arguments to printed and written results."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llaso_jax.evaluation.answering.questions import tasks_of
from llaso_jax.evaluation.bootstrap import Bootstrap
from llaso_jax.evaluation.comparison import Comparison
from llaso_jax.evaluation.comparison import compare as compare_models
from llaso_jax.evaluation.coverage import load_training, seen_and_unseen
from llaso_jax.evaluation.errors import JudgeError, NoPredictionsError
from llaso_jax.evaluation.judge.local import LocalJudge, agreement_line
from llaso_jax.evaluation.judge.openai_judge import OpenAIJudge, default_cache
from llaso_jax.evaluation.judge.replay import ReplayJudge
from llaso_jax.evaluation.paper import check_paper
from llaso_jax.evaluation.predictions import ModelFolder, find_models
from llaso_jax.evaluation.report.comparison_page import write_comparison
from llaso_jax.evaluation.report.page import judge_line, write_page
from llaso_jax.evaluation.robustness import robustness_tree
from llaso_jax.evaluation.scores_file import SCORES_FILE, scores_tree, write_json
from llaso_jax.evaluation.scoring import Judge, ModelScores, Settings, score_model
from llaso_jax.evaluation.tables import (
    comparison_table,
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
    return _score(args, args.predictions, tasks, args.output, console, {})


def run(args: argparse.Namespace, console: Console) -> int:
    """`llaso evaluate run`."""
    from llaso_jax.evaluation.answering.commands import answer_benchmark  # loads JAX

    args.audio_root = args.audio_root or (args.data if args.data.is_dir() else args.data.parent)
    folder, perturbed, files = answer_benchmark(args, console)
    tasks = tasks_of(files)
    compared = {
        name: _compare_perturbed(args, folder, variant, tasks)
        for name, variant in perturbed.items()
    }
    output = args.output / "report"
    return _score(args, [folder, *args.beside], tasks, output, console, robustness_tree(compared))


def _compare_perturbed(
    args: argparse.Namespace, clean: Path, perturbed: Path, tasks: TaskFiles
) -> Comparison:
    """Clean and perturbed answers to the files that were asked perturbed."""
    (variant,) = find_models([perturbed], list(tasks))
    asked = {file: spec for file, spec in tasks.items() if file in variant.files}
    (base,) = find_models([clean], list(asked))
    settings = Settings(
        protocols=_PROTOCOLS[args.protocol][-1:],
        bootstrap=Bootstrap(samples=args.bootstrap, seed=args.bootstrap_seed),
        examples=0,
    )
    return compare_models(base, variant, asked, make_judge(args), settings)


def _score(
    args: argparse.Namespace,
    folders: Sequence[Path],
    tasks: TaskFiles,
    output: Path,
    console: Console,
    robustness: dict[str, Any],
) -> int:
    models = find_models(folders, list(tasks))
    settings = Settings(
        protocols=_PROTOCOLS[args.protocol],
        bootstrap=Bootstrap(samples=args.bootstrap, seed=args.bootstrap_seed),
        examples=args.examples,
    )
    judge = make_judge(args)
    scored = score_models(models, tasks, judge, settings, console)
    training = load_training(args.trained_on, tasks) if args.trained_on else {}
    described = describe_judge(judge)
    coverage = seen_and_unseen(scored, tasks, training, settings.protocols[-1])
    output.mkdir(parents=True, exist_ok=True)
    tree = scores_tree(scored, tasks, settings, described) | {
        "coverage": coverage,
        "robustness": robustness,
    }
    write_json(output / SCORES_FILE, tree)
    write_tables(output, scored, tasks, settings)
    write_page(
        output,
        scored,
        tasks,
        settings,
        judge=described,
        coverage=coverage,
        robustness=robustness,
        audio_root=args.audio_root,
    )
    for model in scored:
        for note in model.notes:
            console.print(f"{model.name}: {note}", style="yellow", markup=False)
        if model.missing:
            console.print(
                f"{model.name}: {len(model.missing)} of {len(tasks)} files are missing: "
                f"{', '.join(model.missing)}",
                style="yellow",
                markup=False,
            )
    Console(soft_wrap=True).print(summary_table(scored, settings))
    console.print(f"judge of free answers: {judge_line(described)}", markup=False)
    console.print(f"written to {output}", markup=False)
    return 0


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
    with _progress(console) as progress:
        bar = progress.add_task("scoring", total=sum(len(model.files) for model in models))

        def scored(model: ModelFolder) -> ModelScores:
            def advance(file: str) -> None:
                progress.update(bar, advance=1, description=f"{model.name}: {file}")

            return score_model(model, tasks, judge, settings, advance=advance)

        return [scored(model) for model in models]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def compare(args: argparse.Namespace, console: Console) -> int:
    """`llaso evaluate compare`."""
    tasks = load_tasks(args.task_list, only=args.tasks)
    pair = [*find_models([args.a], list(tasks)), *find_models([args.b], list(tasks))]
    if len(pair) != 2:
        raise NoPredictionsError(
            f"compare takes two models, and {args.a} and {args.b} hold {len(pair)}: "
            f"{', '.join(model.name for model in pair)}. Name one model's folder each."
        )
    settings = Settings(
        protocols=_PROTOCOLS[args.protocol],
        bootstrap=Bootstrap(samples=args.bootstrap, seed=args.bootstrap_seed),
        examples=args.examples,
    )
    judge = make_judge(args)
    described = describe_judge(judge)
    with _progress(console) as progress:
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
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        tree = dataclasses.asdict(result) | {"judge": described}
        write_json(args.output / "comparison.json", tree)
        write_comparison(args.output, result, judge=judge_line(described))
        console.print(f"written to {args.output}", markup=False)
    else:
        for line in pair_lines(result):
            shown.print(line, markup=False)
    return 0


def paper(args: argparse.Namespace, console: Console) -> int:
    """`llaso evaluate paper`."""
    tasks = load_tasks()
    settings = Settings(protocols=("paper",), bootstrap=Bootstrap(samples=0), examples=0)
    models = find_models([args.predictions], list(tasks))
    checks = check_paper(score_models(models, tasks, ReplayJudge(), settings, console), tasks)
    Console(soft_wrap=True).print(paper_table(checks))
    if args.output:
        write_json(args.output, [dataclasses.asdict(check) for check in checks])
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int]] = {
    "score": score,
    "run": run,
    "compare": compare,
    "paper": paper,
}
