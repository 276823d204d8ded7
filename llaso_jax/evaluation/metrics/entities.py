"""Entities written as `[name : value]` in a sentence."""

import re
from collections import Counter
from collections.abc import Sequence

from llaso_jax.evaluation.metrics.statistic import Statistic, ratio

_SLOT = re.compile(r"\[([^\[\]:]+):([^\[\]]*)\]")


def slots(text: str) -> Counter[tuple[str, str]]:
    """(name, value) pairs, lower-case and stripped, with how often each occurs."""
    return Counter((name.strip(), value.strip()) for name, value in _SLOT.findall(text.lower()))


def slot_micro_f1(references: Sequence[str], answers: Sequence[str]) -> Statistic:
    """2 x common slots over slots of both sides, summed over the corpus."""
    top, bottom = [], []
    for reference, answer in zip(references, answers, strict=True):
        truth, found = slots(reference), slots(answer)
        top.append(2 * (truth & found).total())
        bottom.append(truth.total() + found.total())
    return ratio(top, bottom)
