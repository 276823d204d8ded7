"""What an answer and its reference have in common, as numbers: inputs of the local judge."""

import math
import re
from collections import Counter

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

from llaso_jax.evaluation.metrics.entities import slots
from llaso_jax.evaluation.metrics.exact_match import plain
from llaso_jax.evaluation.metrics.pronunciation import SENTENCE_KEYS, sentence_scores, word_scores
from llaso_jax.evaluation.metrics.text import raw

FEATURES = (
    "constant",
    "equal",
    "empty",
    "precision",
    "recall",
    "f1",
    "common_subsequence",
    "rare_recall",
    "characters",
    "length_ratio",
    "longer",
    "shorter",
    "long_reference",
    "numbers",
    "slots",
    "slot_names",
    "sentence_error",
    "sentence_stated",
    "word_scores",
)
COMMON_LENGTH = 4  # words longer than this are counted as rare ones


def features(reference: str, answer: str) -> list[float]:
    """`FEATURES` of one pair; each is bounded, most are shares between 0 and 1."""
    truth, said = plain(reference).split(), plain(answer).split()
    common = (Counter(truth) & Counter(said)).total()
    precision, recall = _share(common, len(said)), _share(common, len(truth))
    sequence = LCSseq.similarity(truth, said)
    rare = {word for word in truth if len(word) > COMMON_LENGTH}
    ratio = math.log((1 + len(said)) / (1 + len(truth)))
    wanted, given = slots(reference), slots(answer)
    error, stated = _sentence(reference, answer)
    values = {
        "constant": 1.0,
        "equal": float(truth == said),
        "empty": float(not said),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * common, len(truth) + len(said)),
        "common_subsequence": _share(2 * sequence, len(truth) + len(said)),
        "rare_recall": _share(len(rare & set(said)), len(rare)),
        "characters": fuzz.ratio(raw(reference).lower(), raw(answer).lower()) / 100,
        "length_ratio": math.exp(-abs(ratio)),
        "longer": min(max(ratio, 0.0), 4.0) / 4,
        "shorter": min(max(-ratio, 0.0), 4.0) / 4,
        "long_reference": min(len(truth), 200) / 200,
        "numbers": _numbers(reference, answer),
        "slots": _share(2 * (wanted & given).total(), wanted.total() + given.total()),
        "slot_names": _names(wanted, given),
        "sentence_error": error,
        "sentence_stated": stated,
        "word_scores": _words(reference, answer),
    }
    return [values[name] for name in FEATURES]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _numbers(reference: str, answer: str) -> float:
    wanted, given = (Counter(re.findall(r"\d+", text)) for text in (reference, answer))
    return _share((wanted & given).total(), wanted.total())


def _names(wanted: Counter, given: Counter) -> float:
    left, right = ({name for name, _ in side} for side in (wanted, given))
    return _share(len(left & right), len(left | right))


def _sentence(reference: str, answer: str) -> tuple[float, float]:
    """Mean difference of the scores of a sentence in tenths, at most 1; and whether both state them."""
    truth, said = sentence_scores(reference), sentence_scores(answer)
    if truth is None or said is None:
        return 0.0, 0.0
    differences = [min(abs(truth[key] - said[key]), 10) / 10 for key in SENTENCE_KEYS]
    return sum(differences) / len(differences), 1.0


def _words(reference: str, answer: str) -> float:
    truth, said = word_scores(reference), word_scores(answer)
    return _share(sum(t == s for t, s in zip(truth, said, strict=False)), len(truth))
