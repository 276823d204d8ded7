"""The numbers that the paper quotes, recomputed from published predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Literal

import yaml

from llaso_jax.evaluation.scoring import ModelScores
from llaso_jax.evaluation.tasks import TaskFiles

PAPER_VALUES = Path(__file__).parent / "paper_values.yaml"

Verdict = Literal["match", "rounding", "mismatch", "not reproducible", "no predictions"]
NO_AGGREGATION = (
    "how tasks are normalised and averaged is not published, and 190,000 combinations of scalings and means "
    "were tried without one that gives all three overall values"
)


@dataclass(frozen=True)
class Check:
    """One quoted value.

    Attributes:
      quote, model, quoted: what the paper says, of whom, and how it is printed.
      ours: the same from the predictions; for an overall score, ours by its own definition.
      verdict: match: ours rounds to it. rounding: it is less than one unit of its last decimal away.
      reason: why it is no match.
    """

    quote: str
    model: str | None
    quoted: str
    ours: float | None
    verdict: Verdict
    reason: str


def check_paper(scored: Sequence[ModelScores], tasks: TaskFiles) -> list[Check]:
    """Every quoted value beside what the predictions give, in the upstream protocol."""
    models = {scores.name: scores for scores in scored}
    entries = yaml.safe_load(PAPER_VALUES.read_text(encoding="utf-8"))
    return [_check(entry, models, tasks) for entry in entries]


def _check(entry: dict[str, Any], models: Mapping[str, ModelScores], tasks: TaskFiles) -> Check:
    name, quoted = entry["model"], entry["value"]

    def verdict(ours: float | None, verdict: Verdict, reason: str) -> Check:
        return Check(entry["quote"], name, quoted, ours, verdict, reason)

    scores = models.get(name) if name else None
    if name and scores is None:
        return verdict(None, "no predictions", f"the folder has no predictions of {name}")
    if scores and entry["score"] is None:
        means = scores.aggregates["paper"]
        ours = [means[key] for key in ("macro_task", "macro_cat3", "macro_cat4")]
        shown = ", ".join("-" if value is None else f"{value:.3f}" for value in ours)
        beside = f"; our means over tasks, 3 and 4 categories are {shown}"
        return verdict(ours[0], "not reproducible", NO_AGGREGATION + beside)
    value = _at(entry, scores) if scores else _counted(entry["score"], models, tasks)
    if value is None:
        return verdict(None, "no predictions", f"{name} has no predictions of this task")
    found, reason = judge_value(value, quoted)
    if found == entry.get("verdict"):  # the reason is of this verdict and of no other
        reason = entry["reason"]
    return verdict(value, found, reason)


def judge_value(ours: float, quoted: str) -> tuple[Verdict, str]:
    """Whether `ours` is what is printed, at the precision it is printed with."""
    printed = Decimal(quoted)
    # repr: the shortest decimal of the number, so that 2.575 is a tie and not 2.57499...
    exact = Decimal(repr(round(ours, 12)))
    unit = Decimal(1).scaleb(int(printed.as_tuple().exponent))
    if exact.quantize(unit, ROUND_HALF_UP) == printed:
        return "match", ""
    if exact.quantize(unit, ROUND_DOWN) == printed:
        return "rounding", "cut off, not rounded"
    if abs(exact - printed) < unit:
        return "rounding", "less than one unit of the last decimal away"
    return "mismatch", "the published predictions do not give it"


def _at(entry: dict[str, Any], scores: ModelScores) -> float | None:
    tree: Any = {"files": scores.entries, "aggregates": scores.aggregates}
    for key in entry["score"].split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _counted(place: str, models: Mapping[str, ModelScores], tasks: TaskFiles) -> float | None:
    if place == "tasks.counted":
        return float(len({spec.task for spec in tasks.values()}))
    return float(max((scores.items for scores in models.values()), default=0))
