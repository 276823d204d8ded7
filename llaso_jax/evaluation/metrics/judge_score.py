"""Scores of 1 to 5 that a language model gave to answers."""

import re
from collections.abc import Sequence

import numpy as np

from llaso_jax.evaluation.metrics.digits import whole_number
from llaso_jax.evaluation.metrics.statistic import Statistic, mean, ratio

LOWEST, HIGHEST = 1, 5
_SCORE = re.compile(r"Score:\s*(\d+)")


def parse_score(evaluation: str) -> int | None:
    """The number after "Score:", or None."""
    found = _SCORE.search(evaluation)
    return whole_number(found.group(1)) if found else None


def mean_where_scored(scores: Sequence[float | None]) -> Statistic:
    """Mean of the scores there are."""
    present = np.array([score is not None for score in scores], bool)
    return ratio([score or 0 for score in scores], present.tolist())


def mean_missing_lowest(scores: Sequence[float | None]) -> Statistic:
    """Mean with the lowest score wherever there is none."""
    return mean([LOWEST if score is None else score for score in scores])


def histogram(scores: Sequence[float | None]) -> dict[str, int]:
    """How often each score of 1 to 5 was given, to the nearest."""
    rounded = [None if score is None else round(score) for score in scores]
    return {str(s): rounded.count(s) for s in range(LOWEST, HIGHEST + 1)}
