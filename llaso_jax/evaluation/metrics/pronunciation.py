"""Pronunciation scores in free text: of a sentence, and of each of its words."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from llaso_jax.evaluation.metrics.digits import whole_number
from llaso_jax.evaluation.metrics.statistic import Statistic, ratio

SENTENCE_KEYS = ("accuracy", "prosodic", "fluency")
# LLaSO: llaso/evaluation/metrics/others/pronunciation_scoring.py
_AFTER = re.compile(r"(accuracy|proso|fluency).*?(?:is|:|=|as).*?(\d+)")
_BEFORE = re.compile(r"(?<!\d)(\d+)\s*?(?:for)\s*?(accuracy|proso|fluency)")
_TO_LAST_DIGIT = re.compile(r".*\d")
_WORD = re.compile(r'for "([^"]*)", accuracy is (\d+), stress is (\d+),? and total score is (\d+)')


def sentence_scores(text: str) -> dict[str, int] | None:
    """Accuracy, prosodic and fluency scores; None unless all three are stated.

    Where a score is stated twice, the last counts.
    """
    text = text.lower()
    if len(re.findall(r"\d+", text)) < len(SENTENCE_KEYS):
        return None
    # Matches end in a digit and never leave their line. Without what follows a line's last digit they are
    # found in time that grows with the square of the length, not with its cube, in an answer that loops.
    lines = (_TO_LAST_DIGIT.match(line) for line in text.split("\n"))
    stated = "\n".join(line.group() for line in lines if line)
    for found in (
        [(key, score) for key, score in _AFTER.findall(stated)],
        [(key, score) for score, key in _BEFORE.findall(text)],
    ):
        scores = {
            "prosodic" if key == "proso" else key: value
            for key, score in found
            if (value := whole_number(score)) is not None
        }
        if len(scores) == len(SENTENCE_KEYS):
            return scores
    return None


class SentenceAgreement(NamedTuple):
    """usable: answers that state all three scores, as their reference does; agreement by score."""

    usable: int
    of_usable: dict[str, Statistic]
    of_all: dict[str, Statistic]


def sentence_agreement(references: Sequence[str], answers: Sequence[str]) -> SentenceAgreement:
    """Share of equal scores."""
    pairs = [
        (sentence_scores(r), sentence_scores(a)) for r, a in zip(references, answers, strict=True)
    ]
    usable = [truth is not None and said is not None for truth, said in pairs]
    equal = {
        key: [bool(truth and said and truth[key] == said[key]) for truth, said in pairs]
        for key in SENTENCE_KEYS
    }
    ones = [1] * len(pairs)
    return SentenceAgreement(
        usable=sum(usable),
        of_usable={key: ratio(equal[key], usable) for key in SENTENCE_KEYS},
        of_all={key: ratio(equal[key], ones) for key in SENTENCE_KEYS},
    )


def word_scores(text: str) -> list[tuple[str, ...]]:
    """(word, accuracy, stress, total) of every word scored as the references do it, in order."""
    return _WORD.findall(text.lower())


def word_agreement(references: Sequence[str], answers: Sequence[str]) -> Statistic:
    """Share of reference words that the answer has at the same position with the same scores.

    All three scores must agree: with the accuracy alone, LLaSO-Base's published answers give 431 of 921
    words where the published value counts 428.
    """
    top, bottom = [], []
    for reference, answer in zip(references, answers, strict=True):
        truth, said = word_scores(reference), word_scores(answer)
        top.append(sum(t == s for t, s in zip(truth, said, strict=False)))
        bottom.append(len(truth))
    return ratio(top, bottom)
