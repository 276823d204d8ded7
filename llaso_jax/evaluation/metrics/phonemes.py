"""Phoneme error rate: over IPA symbols, and as LLaSO's script computes it over Latin letters."""

import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from llaso_jax.evaluation.metrics.error_rate import error_rate
from llaso_jax.evaluation.metrics.statistic import Statistic, mean

# The script reads letters A-Z as numbers 0-25 of TIMIT's 61 phones and folds those to 39.
# LLaSO: llaso/evaluation/metrics/error_rate/assess_per_eval.py, IDX_MAPPING[0:26]
LETTER_CLASSES = (
    *(3, 1, 5, 3, 4, 5, 5, 22, 8, 9, 27, 11, 12, 27),
    *(14, 15, 16, 36, 37, 38, 39, 27, 22, 23, 24, 25),
)
ATTACHED = frozenset("ːʰʲʷˠˤ")
STRESS = frozenset("ˈˌ")
TIE_BAR = "\u0361"


def ipa_symbols(text: str) -> list[str]:
    """Phonemes of an IPA transcription: a letter with its length mark and diacritics.

    Stress marks, tie bars, blanks, brackets and everything else that is no letter are dropped.
    Example: "ˈbiː t͡ʃ" -> ["b", "iː", "t", "ʃ"].
    """
    symbols: list[str] = []
    for char in unicodedata.normalize("NFC", text).lower():
        if char == TIE_BAR or char in STRESS:
            continue
        if char in ATTACHED or unicodedata.combining(char):
            if symbols:
                symbols[-1] += char
        elif char.isalpha():
            symbols.append(char)
    return symbols


def phoneme_error_rate(references: Sequence[str], answers: Sequence[str]) -> Statistic:
    """Corpus-level error rate over `ipa_symbols`."""
    return error_rate(references, answers, ipa_symbols)


def letter_classes(text: str) -> list[int]:
    """What LLaSO's script makes of a transcription: classes of its letters A-Z; IPA letters are lost."""
    return [LETTER_CLASSES[ord(c) - ord("A")] for c in text.upper() if "A" <= c <= "Z"]


def letter_error_rate(references: Sequence[str], answers: Sequence[str]) -> Statistic:
    """Mean over utterances of the distance over the reference's length; 0 or 1 where that is empty."""
    rates = []
    for reference, answer in zip(references, answers, strict=True):
        truth, heard = letter_classes(reference), letter_classes(answer)
        if truth:
            rates.append(Levenshtein.distance(truth, heard) / len(truth))
        else:
            rates.append(float(bool(heard)))
    return mean(rates)
