"""Ages and pitches in free text, and the mean absolute error of them."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from llaso_jax.evaluation.metrics.digits import number, whole_number
from llaso_jax.evaluation.metrics.statistic import Statistic, mean, ratio

Quantity = Literal["age", "pitch"]
T = TypeVar("T")
# Ages in years; pitches as MIDI numbers, out of whose range LLaSO's script drops an answer.
RANGES: dict[Quantity, tuple[int, int]] = {"age": (0, 100), "pitch": (0, 127)}
ADULT_AGE = 22  # LLaSO: llaso/evaluation/metrics/mae/age_L1.py reads "adult" as this


def parse_age(text: str) -> int | None:
    """An integer, else the first in the text, else 22 for "adult"; "20-24" is 22. None: no age."""
    if (whole := whole_number(text)) is not None:
        return whole
    found = _present(whole_number(number) for number in re.findall(r"\d+", text))
    if "-" in text and len(found) >= 2:
        return round(sum(found[:2]) / 2)
    if found:
        return found[0]
    return ADULT_AGE if "adult" in text.lower() else None


def parse_pitch(text: str) -> int | None:
    """A number, else the first in the text, rounded; "60-65" is 62. None: no number."""
    if (whole := whole_number(text)) is not None:
        return whole
    if (value := number(text)) is not None:
        return round(value)
    found = _present(number(part) for part in re.findall(r"\d+\.?\d*", text))
    if "-" in text and len(found) >= 2:
        return round(sum(found[:2]) / 2)
    return round(found[0]) if found else None


def parse(text: str, quantity: Quantity) -> int | None:
    """The number `text` states, or None."""
    return {"age": parse_age, "pitch": parse_pitch}[quantity](text.strip())


def _present(found: Iterable[T | None]) -> list[T]:
    return [value for value in found if value is not None]


class NumberScores(NamedTuple):
    """Mean absolute errors.

    parsed: over answers that parse (of a pitch: into its range). worst: an answer that does not parse,
    is out of range or has no digit counts with the largest error possible. coverage: share of answers that
    are none of these. constant: of answering the references' median always.
    """

    parsed: Statistic
    worst: Statistic
    coverage: Statistic
    constant: float


def absolute_errors(
    references: Sequence[int], answers: Sequence[str], quantity: Quantity
) -> NumberScores:
    """Score `answers` against references in the quantity's range."""
    low, high = RANGES[quantity]
    truth = np.asarray(references, np.float64)
    found = [parse(answer, quantity) for answer in answers]
    inside = np.array([number is not None and low <= number <= high for number in found], bool)
    digits = np.array([bool(re.search(r"\d", answer)) for answer in answers], bool)
    parsed = np.array([number is not None for number in found], bool)
    if quantity == "pitch":
        parsed &= inside
    errors = np.abs(np.array([number or 0 for number in found], np.float64) - truth)
    good = inside & digits
    worst = np.maximum(truth - low, high - truth)
    return NumberScores(
        parsed=ratio(np.where(parsed, errors, 0.0), parsed),
        worst=mean(np.where(good, errors, worst).tolist()),
        coverage=mean(good.tolist()),
        constant=float(np.abs(np.median(truth) - truth).mean()),
    )
