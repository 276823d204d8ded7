"""Score models one after the other: files, then tasks and overall, each with its interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from llaso_jax.evaluation.aggregates import CONTENT, SPEAKER, aggregate
from llaso_jax.evaluation.bootstrap import Bootstrap
from llaso_jax.evaluation.examples import Example, worst_examples
from llaso_jax.evaluation.file_score import FileScore, score_file
from llaso_jax.evaluation.predictions import (
    Judgements,
    ModelFolder,
    Predictions,
    read_abstentions,
    read_predictions,
)
from llaso_jax.evaluation.tasks import TaskFile, TaskFiles
from llaso_jax.evaluation.unit_score import PROTOCOLS, unit_score
from llaso_jax.evaluation.unit_score import Protocol as ScoringProtocol

# Published shares are rounded to 1e-4 of a percent.
ABSTENTION_ROUNDING = 1e-6


class Judge(Protocol):
    """Who gives free answers their score of 1 to 5."""

    @property
    def name(self) -> str:
        """As a report shows it."""
        ...

    def __call__(
        self, folder: ModelFolder, spec: TaskFile, predictions: Predictions
    ) -> Judgements | None:
        """The judgements of one file; None where there are none."""
        ...


@dataclass(frozen=True)
class Settings:
    """How to score.

    Attributes:
      protocols: `paper` (upstream), `corrected` or both.
      bootstrap: of the intervals.
      examples: of each file, the answers with the lowest scores kept for a report.
    """

    protocols: tuple[ScoringProtocol, ...] = PROTOCOLS
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    examples: int = 12


@dataclass
class ModelScores:
    """Everything a report says of one model.

    Attributes:
      entries: of each file, as scores.json holds them.
      units: by protocol, then file: the score on 0..1.
      aggregates: by protocol, as scores.json holds them; and the means of abstention.
      abstentions: share of answers to each closed task, the mean over its files.
      abstention_check: files whose published share of abstentions was compared, and how many differ.
      intervals: lower and upper bounds in the form of `entries` ("files", by dotted place), `units`,
        `aggregates` and `abstentions`.
      missing, strangers: files of the benchmark that are not there; files no task names.
      notes: what was repaired or does not belong, by file.
      confusions: (labels, matrix) by closed file.
      normalizers: by file.
      examples: by file.
      audio_seconds: audio the model heard, where its files say.
    """

    name: str
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    units: dict[str, dict[str, float]] = field(default_factory=dict)
    aggregates: dict[str, Any] = field(default_factory=dict)
    abstentions: dict[str, float] = field(default_factory=dict)
    abstention_check: dict[str, int] = field(default_factory=lambda: {"n": 0, "mismatch": 0})
    intervals: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    confusions: dict[str, tuple[tuple[str, ...], list[list[int]]]] = field(default_factory=dict)
    normalizers: dict[str, str] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    audio_seconds: float | None = None

    @property
    def items(self) -> int:
        """Answers scored."""
        return sum(entry["n"] for entry in self.entries.values())


def score_model(
    folder: ModelFolder,
    tasks: TaskFiles,
    judge: Judge | None,
    settings: Settings,
    *,
    advance: Callable[[str], None] = lambda file: None,
) -> ModelScores:
    """Score every file of a model; one file's texts are in memory at a time.

    Args:
      judge: of free answers; None for none.
      advance: called with each file that is done.

    Raises:
      PredictionError: a file that cannot be read or scored.
    """
    scores = ModelScores(folder.name, missing=folder.missing, strangers=folder.strangers)
    scores.notes += folder.notes
    shipped = read_abstentions(folder.path)
    draws: dict[str, dict[str, np.ndarray]] = {protocol: {} for protocol in settings.protocols}
    file_intervals: dict[str, Any] = {}
    abstained: dict[str, list[np.ndarray]] = {}
    scores.units = {protocol: {} for protocol in settings.protocols}
    for file, path in folder.files.items():
        spec, predictions = tasks[file], read_predictions(path)
        judgements = judge(folder, spec, predictions) if judge and judged(spec) else None
        score = score_file(
            spec,
            predictions,
            judgements,
            protocols=settings.protocols,
            abstention_shipped=shipped.get(file),
        )
        _note(scores, spec, predictions, judgements, score, settings)
        drawn = settings.bootstrap.draws(file, score.statistics)
        file_intervals[file] = {p: settings.bootstrap.interval(d) for p, d in drawn.items()}
        if "abstention" in drawn:
            abstained.setdefault(spec.task, []).append(drawn["abstention"])
        values = score.values()
        for protocol in settings.protocols:
            if (unit := unit_score(spec, protocol, values)) is not None:
                scores.units[protocol][file] = float(unit)
                if drawn:
                    draws[protocol][file] = unit_score(spec, protocol, drawn)
        advance(file)
    _aggregate(scores, tasks, shipped, settings)
    scores.intervals = {"files": file_intervals}
    if settings.bootstrap.samples:
        scores.intervals |= _intervals(tasks, draws, settings.bootstrap)
        scores.intervals["abstentions"] = {
            task: settings.bootstrap.interval(np.mean(rates, axis=0))
            for task, rates in abstained.items()
        }
    return scores


def judged(spec: TaskFile) -> bool:
    """Whether a judge's score of this file is reported."""
    return spec.metric == "GPT" or spec.companion == "commands"


def _note(
    scores: ModelScores,
    spec: TaskFile,
    predictions: Predictions,
    judgements: Judgements | None,
    score: FileScore,
    settings: Settings,
) -> None:
    scores.entries[spec.file] = score.entry
    scores.notes += [*predictions.notes, *(judgements.notes if judgements else ())]
    if score.confusion:
        scores.confusions[spec.file] = score.confusion
    if score.normalizer:
        scores.normalizers[spec.file] = score.normalizer
    if settings.examples:
        scores.examples[spec.file] = worst_examples(
            spec, predictions, judgements, score, settings.protocols[-1], settings.examples
        )
    heard = [i.audio_seconds for i in predictions.items if i.audio_seconds is not None]
    if heard:
        scores.audio_seconds = (scores.audio_seconds or 0.0) + sum(heard)


def _aggregate(
    scores: ModelScores, tasks: TaskFiles, shipped: dict[str, float], settings: Settings
) -> None:
    for protocol in settings.protocols:
        scores.aggregates[protocol] = aggregate(tasks, scores.units[protocol])
    rates = {f: e["abstention"] for f, e in scores.entries.items() if e["abstention"] is not None}
    by_task: dict[str, list[float]] = {}
    for file, rate in rates.items():
        by_task.setdefault(tasks[file].task, []).append(rate)
    scores.abstentions = {task: float(np.mean(of)) for task, of in by_task.items()}

    def mean(files: Sequence[str]) -> float | None:
        return float(np.mean([rates[f] for f in files])) if files else None

    ours = [f for f in rates if not tasks[f].further]
    scores.aggregates["abstention_mean"] = mean(ours)
    for name, category in (("speaker", SPEAKER), ("content", CONTENT)):
        files = [f for f in ours if tasks[f].category == category]
        scores.aggregates[f"abstention_{name}"] = mean(files)
    checked = [f for f in rates if f in shipped]
    differ = [f for f in checked if abs(rates[f] - shipped[f]) > ABSTENTION_ROUNDING]
    scores.abstention_check = {"n": len(checked), "mismatch": len(differ)}
    scores.notes += [
        f"{f}: {rates[f]:.2%} abstentions, published are {shipped[f]:.2%}" for f in differ
    ]


def _intervals(
    tasks: TaskFiles, draws: dict[str, dict[str, np.ndarray]], bootstrap: Bootstrap
) -> dict[str, Any]:
    def bounds(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: bounds(value) for key, value in tree.items()}
        return None if tree is None else bootstrap.interval(tree)

    return {
        "units": {protocol: bounds(units) for protocol, units in draws.items()},
        "aggregates": {p: bounds(aggregate(tasks, units)) for p, units in draws.items()},
    }
