"""Scores of a closed task beside its accuracy: balanced accuracy, macro-F1 and the confusion matrix."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import confusion_matrix, recall_score

from llaso_jax.evaluation.metrics.statistic import Statistic

NONE_OR_SEVERAL = "(none or several)"


def balanced_accuracy(references: Sequence[str], found: Sequence[str | None]) -> float:
    """Mean over the labels of the references of the share of their items answered right."""
    labels = sorted(set(references))
    said = [label or NONE_OR_SEVERAL for label in found]
    recall = recall_score(list(references), said, labels=labels, average="macro")
    return float(recall)


def macro_f1(references: Sequence[str], found: Sequence[str | None]) -> Statistic:
    """Mean over the labels of the references of 2 tp / (2 tp + fp + fn); 0 where nothing counts."""
    labels = np.array(sorted(set(references)))
    truth = np.asarray(references)[:, None] == labels
    said = np.array([label or NONE_OR_SEVERAL for label in found])[:, None] == labels
    items = np.concatenate([2.0 * (truth & said), truth * 1.0 + said], axis=1)

    def combine(sums: np.ndarray) -> np.ndarray:
        top, bottom = np.split(sums, 2, axis=-1)
        return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0).mean(-1)

    return Statistic(items, combine)


def confusions(
    references: Sequence[str], found: Sequence[str | None], labels: Sequence[str]
) -> list[list[int]]:
    """int[labels, labels + 1]: how often each label (row) was answered by each (column), by none last."""
    said = [label or NONE_OR_SEVERAL for label in found]
    matrix = confusion_matrix(list(references), said, labels=[*labels, NONE_OR_SEVERAL])
    return matrix[:-1].tolist()
