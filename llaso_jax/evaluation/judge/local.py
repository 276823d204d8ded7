"""A deterministic offline stand-in for the published judge: regression on what texts have in common."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from llaso_jax.evaluation.judge.features import features
from llaso_jax.evaluation.judge.fitting import predict
from llaso_jax.evaluation.predictions import Judgements, ModelFolder, Predictions
from llaso_jax.evaluation.tasks import TaskFile

WEIGHTS = Path(__file__).parent / "local_judge.json"
DEFAULT_TASK = "AQA"  # whose weights judge tasks that no published score was given for


@functools.cache
def fitted() -> dict[str, Any]:
    """`weights` by task, and the `agreement` on models left out, as scripts/fit_local_judge.py wrote them."""
    return json.loads(WEIGHTS.read_text(encoding="utf-8"))


class LocalJudge:
    """Scores answers without a language model; its agreement with one is stated with every report."""

    name = "local surrogate: a regression on word overlap, not a language model"

    @property
    def agreement(self) -> dict[str, dict[str, Any]]:
        """Held-out agreement with the published judge, by model left out with its family."""
        return fitted()["agreement"]

    def __call__(
        self, folder: ModelFolder, spec: TaskFile, predictions: Predictions
    ) -> Judgements | None:
        """Scores of 1 to 5, not whole, for every answer of a file."""
        weights = fitted()["weights"]
        pairs = [features(item.reference, item.answer) for item in predictions.items]
        said = predict(weights.get(spec.task, weights[DEFAULT_TASK]), np.asarray(pairs, np.float64))
        scores = tuple(float(score) for score in said)
        agreement = agreement_line(self.agreement)
        told = tuple(
            f"Score: {score:.2f} by the local surrogate; agreement {agreement}" for score in scores
        )
        return Judgements(scores, scores, told)


def agreement_line(agreement: dict[str, dict[str, Any]]) -> str:
    """The held-out agreement in one sentence."""
    rows = list(agreement.values())
    pearson = [row["pearson"] for row in rows]
    error = [row["mean_absolute_error"] for row in rows]
    bias = [abs(row["local"] - row["judge"]) for row in rows]
    return (
        f"with the published judge on {len(rows)} models, each left out of the fit with its family: Pearson's r "
        f"{np.mean(pearson):.2f} ({min(pearson):.2f} to {max(pearson):.2f}), mean absolute error "
        f"{np.mean(error):.2f} of 1 to 5, a model's mean off by up to {max(bias):.2f}"
    )
