"""Answers that should name one label of a closed set: accuracy and abstention."""

import re
from collections.abc import Iterable, Sequence

from llaso_jax.evaluation.metrics.statistic import Statistic, mean

# LLaSO-Eval writes the label both ways.
SPELLINGS = {"forties": "fourties"}
# Applied in this order as whole words, where the left is not a label itself and the right is.
SYNONYMS = (
    ("angry", "anger"),
    ("sad", "sadness"),
    ("happy", "happiness"),
    ("happiness", "joy"),
    ("joyful", "joy"),
    ("fearful", "fear"),
    ("disgusted", "disgust"),
    ("surprised", "surprise"),
    ("neutral", "neutrality"),
)


def label_text(text: str) -> str:
    """Lower-case words, `+` and `-`; other characters become blanks; one spelling of each label."""
    text = " ".join(re.sub(r"[^\w\s+-]", " ", text.lower()).split())
    for other, spelling in SPELLINGS.items():
        text = re.sub(rf"\b{other}\b", spelling, text)
    return text


def label_set(references: Iterable[str], declared: Iterable[str] = ()) -> tuple[str, ...]:
    """Distinct labels of the references and of those declared, in alphabetical order."""
    return tuple(sorted({label_text(text) for text in (*references, *declared)}))


def with_synonyms(answer: str, labels: Sequence[str]) -> str:
    """`label_text` of an answer with emotions in the labels' own words.

    Example: with labels ("anger", "joy"), "She sounds angry." -> "she sounds anger".
    """
    text = label_text(answer)
    for word, label in SYNONYMS:
        if word not in labels and label in labels:
            text = re.sub(rf"\b{word}\b", label, text)
    return text


class LabelFinder:
    """Finds which labels of a closed set a text names, the longest first.

    A match must have no `[a-z0-9]` on either side, and is blanked, so that "new zealand" is not also
    found as "zealand".
    """

    def __init__(self, labels: Iterable[str]) -> None:
        longest_first = sorted((label for label in labels if label), key=lambda x: (-len(x), x))
        self._patterns = [(label, _alone(label)) for label in longest_first]

    def __call__(self, text: str) -> tuple[str, ...]:
        """Labels in `text` (already `label_text`), each once."""
        found = []
        for label, pattern in self._patterns:
            text, count = pattern.subn(" # ", text)
            if count:
                found.append(label)
        return tuple(found)


def exactly_one(found: Sequence[tuple[str, ...]]) -> list[str | None]:
    """The label of every answer that names exactly one, else None."""
    return [labels[0] if len(labels) == 1 else None for labels in found]


def substring_accuracy(references: Sequence[str], answers: Sequence[str]) -> Statistic:
    """LLaSO's accuracy: equal, or the reference is part of the answer and no other label is.

    Dots are removed and case is ignored. Source: llaso/evaluation/metrics/accuracy/accuracy.py.
    """
    truth = [text.replace(".", "").lower() for text in references]
    labels = set(truth)
    right = []
    for label, answer in zip(truth, answers, strict=True):
        text = answer.replace(".", "").lower()
        others = (other in text for other in labels if other != label)
        right.append(text == label or (label in text and not any(others)))
    return mean(right)


def abstention(
    references: Sequence[str], answers: Sequence[str], declared: Sequence[str] = ()
) -> Statistic:
    """Share of answers that do not contain exactly one label of the references or of those declared.

    Source: llaso/evaluation/metrics/abstention_rate/abstention_rate_cal.py.
    """
    texts = (*references, *declared)
    labels = {text.strip().lower().rstrip(". ").strip() for text in texts}
    patterns = [_alone(label) for label in labels]
    counts = [sum(bool(p.search(a.strip().lower())) for p in patterns) for a in answers]
    return mean([count != 1 for count in counts])


def _alone(label: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z0-9]){re.escape(label)}(?![a-z0-9])")
