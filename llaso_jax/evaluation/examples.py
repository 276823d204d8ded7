"""The answers of a file that scored lowest, for people to read."""

from typing import NamedTuple

import numpy as np

from llaso_jax.evaluation.file_score import FileScore
from llaso_jax.evaluation.predictions import Judgements, Predictions
from llaso_jax.evaluation.tasks import TaskFile
from llaso_jax.evaluation.unit_score import LOWER_IS_BETTER, Protocol, main_score


class Example(NamedTuple):
    """One item; score: of this item alone in its file's metric. explanation: the judge's."""

    number: int
    instruction: str
    reference: str
    answer: str
    voices: tuple[str, ...]
    score: float | None
    explanation: str


def item_scores(spec: TaskFile, score: FileScore, protocol: Protocol) -> np.ndarray | None:
    """f64[n] of the metric that a file is judged by, per item and higher is better.

    Where no judge has scored a file, its companion without a judge is taken; None if it has none. NaN
    where an item alone has no score, as an empty reference has no error rate.
    """
    place = main_score(spec, protocol, score.statistics)
    if place not in score.statistics:
        places = [p for p in score.statistics if p.startswith("extra.")]
        if not places:
            return None
        place = places[-1]
    statistic = score.statistics[place]
    scores = statistic.combine(statistic.items)
    falling = spec.metric in LOWER_IS_BETTER and not place.startswith("extra.")
    return -scores if falling else scores


def worst_examples(
    spec: TaskFile,
    predictions: Predictions,
    judgements: Judgements | None,
    score: FileScore,
    protocol: Protocol,
    count: int,
) -> list[Example]:
    """Up to `count` items, the worst first, in file order where they are equal."""
    scores = item_scores(spec, score, protocol)
    order = np.arange(len(predictions.items))
    if scores is not None:
        order = np.argsort(scores, kind="stable")
    sign = -1 if spec.metric in LOWER_IS_BETTER else 1
    chosen = []
    for number in order[:count].tolist():
        item = predictions.items[number]
        value = None if scores is None or np.isnan(scores[number]) else sign * float(scores[number])
        chosen.append(
            Example(
                number,
                item.instruction,
                item.reference,
                item.answer,
                item.voices,
                value,
                judgements.explanations[number] if judgements else "",
            )
        )
    return chosen
