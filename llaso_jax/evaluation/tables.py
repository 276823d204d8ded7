"""Scores as tables: CSV files, and the summary that is printed."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from llaso_jax.evaluation.comparison import Comparison, Difference
from llaso_jax.evaluation.paper import Check
from llaso_jax.evaluation.scoring import ModelScores, Settings
from llaso_jax.evaluation.tasks import TaskFiles, benchmark_tasks
from llaso_jax.evaluation.unit_score import PROTOCOLS, Protocol

PROTOCOL_NAMES: dict[Protocol, str] = {"paper": "upstream", "corrected": "corrected"}
OVERALL = {
    "linguistic": "linguistic",
    "semantic": "semantic",
    "speaker": "speaker",
    "content": "content",
    "paralinguistic": "paralinguistic",
    "macro_task": "mean of tasks",
    "macro_cat3": "3 categories",
    "macro_cat4": "4 categories",
    "macro_15_common_tasks": "common tasks",
}


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested dict by dotted place."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def write_tables(
    folder: Path,
    scored: Sequence[ModelScores],
    tasks: TaskFiles,
    settings: Settings,
    *,
    judge: str,
) -> None:
    """files.csv: every number of every file. tasks.csv: scores on 0..1 of tasks, categories, overall.

    judge: who judged free answers, and how well; it stands beside every number that rests on it.
    """
    with (folder / "files.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                *("model", "task", "category", "modality", "file"),
                *("score", "value", "low", "high", "judge"),
            ]
        )
        for model in scored:
            for name, entry in model.entries.items():
                spec = tasks[name]
                bounds = model.intervals["files"][name]
                for place, value in flat(entry):
                    low, high = bounds.get(place) or ("", "")
                    of = [model.name, spec.task, spec.category, spec.modality, name]
                    rests = place.startswith("gpt.") or (
                        spec.metric == "GPT" and place in PROTOCOLS
                    )
                    rows.writerow([*of, place, value, low, high, judge if rests else ""])
            for name in model.missing:
                spec = tasks[name]
                of = [model.name, spec.task, spec.category, spec.modality, name]
                rows.writerow([*of, "missing", "", "", "", ""])
    with (folder / "tasks.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "protocol", "level", "name", "score", "low", "high", "judge"])
        free = {spec.task for spec in tasks.values() if spec.metric == "GPT"}
        for model in scored:
            for protocol in settings.protocols:
                for level, name, value, bounds in levels(model, protocol):
                    low, high = bounds or ("", "")
                    what = [model.name, PROTOCOL_NAMES[protocol], level, name]
                    rests = free and (level != "task" or name in free)
                    rows.writerow([*what, value, low, high, judge if rests else ""])


def levels(
    model: ModelScores, protocol: Protocol
) -> Iterator[tuple[str, str, float | None, tuple[float, float] | None]]:
    """(level, name, score on 0..1, interval) of tasks, modalities, categories and overall."""
    scores = model.aggregates[protocol]
    bounds = model.intervals.get("aggregates", {}).get(protocol, {})
    for task, value in scores["tasks"].items():
        yield "task", task, value, bounds.get("tasks", {}).get(task)
    for modality, value in scores["modality"].items():
        yield "modality", modality, value, bounds.get("modality", {}).get(modality)
    for name in OVERALL:
        level = "overall" if name.startswith("macro") else "category"
        yield level, name, scores[name], bounds.get(name)


def tasks_scored(model: ModelScores, tasks: TaskFiles, protocol: Protocol) -> str:
    """How many of LLaSO-Eval's tasks are in a model's mean of tasks."""
    there = {tasks[f].task for f in model.units[protocol] if not tasks[f].further}
    return f"{len(there)} of {benchmark_tasks()}"


def summary_table(scored: Sequence[ModelScores], tasks: TaskFiles, settings: Settings) -> Table:
    """Overall scores of every model, on 0..1, narrow enough for a terminal."""
    overall = ("macro_task", "macro_cat4")
    table = Table(title="mean scores, 0 (worst) to 1 (best); the report has all")
    table.add_column("model", overflow="fold")
    table.add_column("protocol")
    for title in ("tasks", *(OVERALL[key] for key in overall), "abstention"):
        table.add_column(title, justify="right")
    for model in scored:
        for protocol in settings.protocols:
            means = model.aggregates[protocol]
            numbers = [_shown(means[key]) for key in overall]
            count = tasks_scored(model, tasks, protocol)
            table.add_row(model.name, PROTOCOL_NAMES[protocol], count, *numbers, _rate(model))
    return table


def further_table(
    scored: Sequence[ModelScores], tasks: TaskFiles, settings: Settings
) -> Table | None:
    """Scores on 0..1 of tasks that are not LLaSO-Eval's, and so in no mean; None if there are none."""
    further = {spec.task for spec in tasks.values() if spec.further}
    table = Table(title="other tasks, 0 (worst) to 1 (best)")
    for title in ("model", "protocol", "task"):
        table.add_column(title, overflow="fold")
    for title in ("score", "95 % interval"):
        table.add_column(title, justify="right")
    for model in scored:
        for protocol in settings.protocols:
            for level, name, value, bounds in levels(model, protocol):
                if level == "task" and name in further and value is not None:
                    interval = "-" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
                    row = (model.name, PROTOCOL_NAMES[protocol], name, _shown(value), interval)
                    table.add_row(*row)
    return table if table.row_count else None


def comparison_table(result: Comparison) -> Table:
    """Differences of every file, task and category."""
    table = Table(title=f"{result.b} minus {result.a} ({PROTOCOL_NAMES[result.protocol]} protocol)")
    table.add_column("")
    table.add_column("score")
    for name in (result.a, result.b, "difference", "95 % interval", "p"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("better")
    table.add_column("items won / lost / tied", justify="right")
    for file, compared in result.files.items():
        counts = f"{compared.wins} / {compared.losses} / {compared.ties}"
        name = f"{file}\n  ({compared.reworded} items asked in other words)"
        name = name if compared.reworded else file
        table.add_row(name, *_row(compared.difference, result), counts)
    if result.left_out:
        told = "; ".join(f"{file}: {reason}" for file, reason in result.left_out.items())
        table.caption = f"left out of all means: {told}"
    table.add_section()
    for difference in result.tasks:
        table.add_row(difference.name, *_row(difference, result), "")
    table.add_section()
    for difference in result.overall:
        table.add_row(OVERALL[difference.name], *_row(difference, result), "")
    return table


def _row(difference: Difference, result: Comparison) -> list[str]:
    return [difference.score or "0..1", *difference_cells(difference, result)]


def difference_cells(difference: Difference, result: Comparison) -> list[str]:
    """Scores of a and of b, difference, interval, p and who is better."""
    bounds = "-"
    if difference.low is not None and difference.high is not None:
        bounds = f"{difference.low:+.3f} to {difference.high:+.3f}"
    return [
        _shown(difference.a),
        _shown(difference.b),
        f"{difference.b - difference.a:+.3f}",
        bounds,
        "-" if difference.p_value is None else f"{difference.p_value:.3f}",
        {"a": result.a, "b": result.b, "": "undecided"}[difference.better],
    ]


def pair_lines(result: Comparison) -> Iterator[str]:
    """Items one model does better on, both answers below each other."""
    width = max(map(len, (result.a, result.b, "reference")))
    for compared in result.files.values():
        for pair in compared.examples:
            winner = result.b if pair.b_score > pair.a_score else result.a
            yield f"\n{pair.file} {pair.number}: {winner} is better"
            texts = (("reference", pair.reference), (result.a, pair.a), (result.b, pair.b))
            for who, text in texts:
                yield f"  {who:<{width}}  {' '.join(text.split())}"


def paper_table(checks: Sequence[Check]) -> Table:
    """Every quoted value with its verdict."""
    table = Table(title="arXiv 2508.15418, recomputed in the upstream protocol", show_lines=True)
    for name in ("value", "model", "paper", "ours", "verdict", "reason"):
        table.add_column(name, justify="right" if name in ("paper", "ours") else "left")
    colours = {"match": "green", "rounding": "yellow", "mismatch": "red"}
    for check in checks:
        ours = "-" if check.ours is None else f"{check.ours:.5g}"
        verdict = Text(check.verdict, style=colours.get(check.verdict, ""))
        table.add_row(check.quote, check.model or "", check.quoted, ours, verdict, check.reason)
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rate(model: ModelScores) -> str:
    rate = model.aggregates["abstention_mean"]
    return "-" if rate is None else f"{rate:.1%}"
