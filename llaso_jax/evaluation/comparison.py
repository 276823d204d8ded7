"""Two models on the same items: differences of scores by paired bootstrap, and who wins which item."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from llaso_jax.evaluation.aggregates import aggregate
from llaso_jax.evaluation.bootstrap import Bootstrap
from llaso_jax.evaluation.errors import DifferentItemsError
from llaso_jax.evaluation.examples import item_scores
from llaso_jax.evaluation.file_score import FileScore, score_file
from llaso_jax.evaluation.predictions import (
    Judgements,
    ModelFolder,
    Predictions,
    read_predictions,
)
from llaso_jax.evaluation.scoring import Judge, Settings, judged
from llaso_jax.evaluation.tasks import TaskFile, TaskFiles
from llaso_jax.evaluation.unit_score import LOWER_IS_BETTER, Protocol, main_score, unit_score

LISTED = 3  # items named of each side where two models differ


@dataclass(frozen=True)
class Difference:
    """Score of b minus score of a.

    Attributes:
      name: file, task or category.
      score: where in scores.json the compared number is; "" for a score on 0..1.
      low, high: interval of the difference; None without a bootstrap.
      p_value: two-sided: twice the smaller share of draws on either side of no difference.
      better: "a" or "b" where the interval leaves out 0, else "".
    """

    name: str
    score: str
    a: float
    b: float
    low: float | None
    high: float | None
    p_value: float | None
    better: str


@dataclass(frozen=True)
class ItemPair:
    """An item on which one model does better; scores are in the file's metric, higher is better."""

    file: str
    number: int
    instruction: str
    reference: str
    a: str
    b: str
    a_score: float
    b_score: float


@dataclass(frozen=True)
class FileComparison:
    """One file: the difference, how many items b wins, loses and ties, and some of them.

    reworded: items that the two were asked in other words.
    """

    difference: Difference
    wins: int
    losses: int
    ties: int
    examples: tuple[ItemPair, ...]
    reworded: int


@dataclass(frozen=True)
class Comparison:
    """Two models; differences of files in their metric, of tasks and categories on 0..1.

    left_out: files without a score of both models, with the reason; they are in no mean of either.
    notes: what was repaired, is missing or does not belong, by model.
    """

    a: str
    b: str
    protocol: Protocol
    files: dict[str, FileComparison]
    tasks: list[Difference]
    overall: list[Difference]
    left_out: dict[str, str]
    notes: list[str]


def compare(
    a: ModelFolder,
    b: ModelFolder,
    tasks: TaskFiles,
    judge: Judge | None,
    settings: Settings,
    *,
    advance: Callable[[str], None] = lambda file: None,
) -> Comparison:
    """Compare two models in the one protocol of `settings`, file by file.

    Raises:
      DifferentItemsError: files or items that only one of them has, listed.
      PredictionError: a file that cannot be read or scored.
    """
    _check_files(a, b)
    (protocol,) = settings.protocols
    files: dict[str, FileComparison] = {}
    left_out: dict[str, str] = {}
    notes = [f"{model.name}: {note}" for model in (a, b) for note in model.notes]
    points: tuple[dict, dict] = ({}, {})
    draws: tuple[dict, dict] = ({}, {})
    for file in a.files:
        spec = tasks[file]
        sides, reworded = _scored(a, b, spec, judge, settings)
        notes += [
            f"{m.name}: {note}"
            for m, side in zip((a, b), sides, strict=True)
            for note in side.notes
        ]
        units = [unit_score(spec, protocol, side.score.values()) for side in sides]
        if without := [m.name for m, u in zip((a, b), units, strict=True) if u is None]:
            why = "judge's score" if spec.metric == "GPT" else f"score of {spec.metric}"
            left_out[file] = f"no {why} of {' and '.join(dict.fromkeys(without))}"
        else:
            drawn = [settings.bootstrap.draws(file, side.score.statistics) for side in sides]
            for number, unit in enumerate(units):
                points[number][file] = unit
                draws[number][file] = unit_score(spec, protocol, drawn[number])
            files[file] = _compared(spec, sides, drawn, reworded, settings)
        advance(file)
    both = [aggregate(tasks, units) for units in points]
    sampled = [aggregate(tasks, units) for units in draws] if settings.bootstrap.samples else None

    def difference(name: str, pick: Callable[[dict[str, Any]], Any]) -> Difference:
        drawn = [pick(tree) for tree in sampled] if sampled else None
        return _difference(name, "", [pick(tree) for tree in both], drawn, settings.bootstrap)

    shared = [task for task in both[0]["tasks"] if task in both[1]["tasks"]]
    names = [
        name
        for name in ("linguistic", "semantic", "speaker", "content", "macro_task", "macro_cat4")
        if both[0][name] is not None and both[1][name] is not None
    ]
    return Comparison(
        a.name,
        b.name,
        protocol,
        files,
        [difference(task, lambda tree, t=task: tree["tasks"][t]) for task in shared],
        [difference(name, lambda tree, n=name: tree[n]) for name in names],
        left_out,
        notes,
    )


class Side(NamedTuple):
    """One model's file, its score, and what is to be told about both."""

    read: Predictions
    score: FileScore
    notes: tuple[str, ...]


def _scored(
    a: ModelFolder, b: ModelFolder, spec: TaskFile, judge: Judge | None, settings: Settings
) -> tuple[tuple[Side, Side], int]:
    """Both models' file, the items of b in the order of a; and how many were asked in other words."""
    first, second = read_predictions(a.files[spec.file]), read_predictions(b.files[spec.file])
    order, reworded = _order(spec.file, a.name, first, b.name, second)

    def side(folder: ModelFolder, read: Predictions, order: Sequence[int]) -> Side:
        judgements = judge(folder, spec, read) if judge and judged(spec) else None
        notes = (*read.notes, *(judgements.notes if judgements else ()))
        read = replace(read, items=tuple(read.items[i] for i in order))
        if judgements is not None:
            judgements = _reordered(judgements, order)
        score = score_file(spec, read, judgements, protocols=settings.protocols)
        return Side(read, score, notes)

    return (side(a, first, range(len(first.items))), side(b, second, order)), reworded


def _reordered(judgements: Judgements, order: Sequence[int]) -> Judgements:
    return replace(
        judgements,
        scores=tuple(judgements.scores[i] for i in order),
        as_written=tuple(judgements.as_written[i] for i in order),
        explanations=tuple(judgements.explanations[i] for i in order),
    )


def _check_files(a: ModelFolder, b: ModelFolder) -> None:
    told = []
    for model, other in ((a, b), (b, a)):
        if only := [file for file in model.files if file not in other.files]:
            told.append(f"only {model.name} has {', '.join(only)}")
    if told:
        raise DifferentItemsError(
            f"the models did not answer the same files: {'; '.join(told)}. Choose what both have with "
            "--tasks."
        )


def _order(
    file: str, name_a: str, a: Predictions, name_b: str, b: Predictions
) -> tuple[list[int], int]:
    """For each item of a, the number of the same item of b; and how many were asked in other words.

    Equal audio, reference and instruction go together first. What is left goes by audio and reference:
    some models were given another instruction.
    """
    order: dict[int, int] = {}
    free = set(range(len(b.items)))
    for parts in (3, 2):
        places: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number in sorted(free, reverse=True):
            places[b.items[number].question[:parts]].append(number)
        exact = len(order)
        for number, item in enumerate(a.items):
            if number not in order and (same := places.get(item.question[:parts])):
                order[number] = same.pop()
        free -= set(order.values())
    alone = [number for number in range(len(a.items)) if number not in order]
    if alone or free:
        sides = ((name_a, a, alone), (name_b, b, sorted(free)))
        told = ", and ".join(
            f"{len(numbers)} items only {name} has{_listed(read, numbers)}"
            for name, read, numbers in sides
        )
        raise DifferentItemsError(
            f"the models were not asked the same in {file}: {told}. Items are the same if audio and "
            "reference are."
        )
    return [order[number] for number in range(len(a.items))], len(order) - exact


def _listed(read: Predictions, numbers: Sequence[int]) -> str:
    shown = [f"record {n}: {_named(read, n)}" for n in numbers[:LISTED]]
    if len(numbers) > LISTED:
        shown.append(f"and {len(numbers) - LISTED} more")
    return f" ({'; '.join(shown)})" if shown else ""


def _named(read: Predictions, number: int) -> str:
    item = read.items[number]
    return f"{' '.join(item.voices)} {item.reference[:40]!r}".strip()


def _compared(
    spec: TaskFile,
    sides: tuple[Side, Side],
    drawn: list[dict[str, Any]],
    reworded: int,
    settings: Settings,
) -> FileComparison:
    """A file that both models have a score of."""
    (protocol,) = settings.protocols
    place = main_score(spec, protocol, sides[0].score.statistics)
    sign = -1 if spec.metric in LOWER_IS_BETTER else 1
    values = [side.score.statistics[place].value() for side in sides]
    pair = (drawn[0][place], drawn[1][place]) if drawn[0] and drawn[1] else None
    difference = _difference(spec.file, place, values, pair, settings.bootstrap, sign=sign)
    a, b = (item_scores(spec, side.score, protocol) for side in sides)
    assert a is not None, "the score is there"
    assert b is not None, "the score is there"
    gain = np.nan_to_num(b - a)
    examples = [
        _pair(spec.file, int(number), sides, a, b)
        for sign in (1, -1)
        for number in np.argsort(-sign * gain, kind="stable")[: settings.examples]
        if sign * gain[number] > 0
    ]
    wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
    return FileComparison(
        difference, wins, losses, len(gain) - wins - losses, tuple(examples), reworded
    )


def _pair(
    file: str, number: int, sides: tuple[Side, Side], a: np.ndarray, b: np.ndarray
) -> ItemPair:
    item, other = (side.read.items[number] for side in sides)
    return ItemPair(
        file,
        number,
        item.instruction,
        item.reference,
        item.answer,
        other.answer,
        float(a[number]),
        float(b[number]),
    )


def _difference(
    name: str,
    score: str,
    pair: Sequence[float],
    drawn: Sequence[np.ndarray] | None,
    bootstrap: Bootstrap,
    *,
    sign: int = 1,
) -> Difference:
    """Of two scores and their draws of the same items; sign: -1 where lower is better."""
    a, b = (float(value) for value in pair)
    bounds = None if drawn is None else bootstrap.interval(drawn[1] - drawn[0])
    if drawn is None or bounds is None:
        return Difference(name, score, a, b, None, None, None, "")
    low, high = bounds
    gain = sign * (drawn[1] - drawn[0])
    gain = gain[np.isfinite(gain)]  # a draw may leave out every item that a score is defined on
    rarer = 1 + min((gain <= 0).sum(), (gain >= 0).sum())  # the sample itself is one of them
    p_value = min(1.0, 2 * float(rarer) / (1 + len(gain)))
    better = ""
    if low > 0 or high < 0:
        better = "b" if (low > 0) == (sign > 0) else "a"
    return Difference(name, score, a, b, low, high, p_value, better)
