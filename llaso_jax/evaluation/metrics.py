"""Word error rate and accuracy, as a careful scorer computes them."""

import functools
from collections.abc import Callable, Sequence

import jiwer


@functools.cache
def english_normalizer() -> Callable[[str], str]:
    """Whisper's English normaliser (PyPI whisper-normalizer)."""
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Corpus-level word error rate after Whisper's English normaliser on both sides.

    Errors of all pairs over words of all references: 1.0 means as many errors as words, and
    insertions can take it past 1.

    Raises:
      ValueError: different numbers of texts, or references without a single word.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references for {len(hypotheses)} hypotheses.")
    normalize = english_normalizer()
    truth = [normalize(text) for text in references]
    heard = [normalize(text) for text in hypotheses]
    # jiwer refuses an empty reference; all words written for one are insertions.
    pairs = [(t, h) for t, h in zip(truth, heard, strict=True) if t]
    if not pairs:
        raise ValueError("the references hold no words: the word error rate is not defined.")
    inserted = sum(len(h.split()) for t, h in zip(truth, heard, strict=True) if not t)
    counts = jiwer.process_words([t for t, _ in pairs], [h for _, h in pairs])
    words = counts.hits + counts.substitutions + counts.deletions
    errors = counts.substitutions + counts.deletions + counts.insertions + inserted
    return errors / words


def accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Share of hypotheses equal to their reference after Whisper's English normaliser.

    Raises:
      ValueError: different numbers of texts, or none.
    """
    if not references or len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references for {len(hypotheses)} hypotheses.")
    normalize = english_normalizer()
    right = sum(normalize(r) == normalize(h) for r, h in zip(references, hypotheses, strict=True))
    return right / len(references)
