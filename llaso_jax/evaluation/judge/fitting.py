"""Fit the local judge to published scores, and measure it on models it was not fitted on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from llaso_jax.evaluation.judge.features import FEATURES
from llaso_jax.evaluation.metrics.judge_score import HIGHEST, LOWEST

RIDGE = 1.0  # of 2,000 to 19,000 pairs a task: keeps features that are never there at 0
SQUARED = slice(FEATURES.index("precision"), FEATURES.index("length_ratio"))


class Judged(NamedTuple):
    """Judged answers: model and task of each, f64[n, features], f64[n] the judge's scores."""

    models: np.ndarray
    tasks: np.ndarray
    features: np.ndarray
    scores: np.ndarray

    def where(self, chosen: np.ndarray) -> "Judged":
        """Those of a mask."""
        return Judged(*(column[chosen] for column in self))


def design(features: np.ndarray) -> np.ndarray:
    """f64[n, k]: the features, and squares of the shares in common."""
    return np.concatenate([features, features[:, SQUARED] ** 2], axis=1)


def predict(weights: Sequence[float], features: np.ndarray) -> np.ndarray:
    """f64[n] scores within 1..5."""
    return np.clip(design(features) @ np.asarray(weights), LOWEST, HIGHEST)


def fit(judged: Judged) -> dict[str, list[float]]:
    """Ridge regression for each task on its own."""
    weights = {}
    for task in sorted(set(judged.tasks.tolist())):
        x, y = design(judged.features[judged.tasks == task]), judged.scores[judged.tasks == task]
        weights[task] = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y).tolist()
    return weights


def held_out_agreement(
    judged: Judged, families: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """For each model, agreement of the judge fitted on the models of other families.

    Args:
      families: of models that are no family of their own: variants answer so alike that one in the fit
        tells of the other.

    Returns:
      by model: pairs; pearson, spearman: of single scores; mean_absolute_error; judge, local: means of
      both, which is what a comparison of models rests on.
    """
    table, families = {}, families or {}
    names = sorted(set(judged.models.tolist()))
    for model in names:
        family = families.get(model, model)
        kin = [other for other in names if families.get(other, other) == family]
        weights = fit(judged.where(~np.isin(judged.models, kin)))
        rest = judged.where(judged.models == model)
        said = np.empty(len(rest.scores))
        for task in set(rest.tasks.tolist()):
            of_task = rest.tasks == task
            said[of_task] = predict(weights[task], rest.features[of_task])
        table[model] = {
            "pairs": len(said),
            "pearson": float(np.corrcoef(said, rest.scores)[0, 1]),
            "spearman": float(np.asarray(spearmanr(said, rest.scores))[0]),
            "mean_absolute_error": float(np.abs(said - rest.scores).mean()),
            "judge": float(rest.scores.mean()),
            "local": float(said.mean()),
        }
    return table
