"""Word and character error rates of a corpus."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from llaso_jax.evaluation.metrics.statistic import Statistic
from llaso_jax.evaluation.metrics.text import whisper_english

Symbols = Callable[[str], Sequence[str]]


def words(text: str) -> list[str]:
    """Split at blanks, empty words dropped."""
    return [word for word in text.split(" ") if word]


def characters(text: str) -> str:
    """All characters, blanks included."""
    return text


def error_rate(references: Sequence[str], answers: Sequence[str], symbols: Symbols) -> Statistic:
    """Levenshtein distances over lengths of the references, both counted in `symbols`, each summed."""
    return symbol_errors(
        [symbols(text) for text in references], [symbols(text) for text in answers]
    )


def symbol_errors(
    references: Sequence[Sequence[Hashable]], answers: Sequence[Sequence[Hashable]]
) -> Statistic:
    """`error_rate` of what is in symbols already: words, characters, token ids."""
    errors = [Levenshtein.distance(t, h) for t, h in zip(references, answers, strict=True)]
    return Statistic(np.array([errors, [len(t) for t in references]], np.float64).reshape(2, -1).T)


def swapped(statistic: Statistic, answers: Sequence[str], symbols: Symbols) -> Statistic:
    """The same errors over the lengths of the answers: what LLaSO's own script reports."""
    items = statistic.items.copy()
    items[:, 1] = [len(symbols(text)) for text in answers]
    return Statistic(items, statistic.combine)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Corpus-level word error rate after Whisper's English normaliser on both sides.

    Errors of all pairs over words of all references: 1.0 means as many errors as words, and
    insertions can take it past 1.

    Raises:
      ValueError: different numbers of texts, or references without a single word.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references for {len(hypotheses)} hypotheses.")
    rate = error_rate(
        [whisper_english(text) for text in references],
        [whisper_english(text) for text in hypotheses],
        words,
    ).value()
    if np.isnan(rate):
        raise ValueError("the references hold no words: the word error rate is not defined.")
    return rate
