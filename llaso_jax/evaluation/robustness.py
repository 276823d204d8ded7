"""How a model's scores change when the same items are asked perturbed."""

from collections.abc import Mapping, Sequence
from typing import Any

from llaso_jax.evaluation.comparison import Comparison, Difference

CLEAN = "clean"


def robustness_tree(compared: Mapping[str, Comparison]) -> dict[str, Any]:
    """Curves by task, then kind: points with score on 0..1 and its change from the clean items.

    Args:
      compared: by perturbation ("noise=-10"), the clean answers (a) and the perturbed ones (b).

    Returns:
      task -> kind -> [{level, score, change, low, high}], low and high of the change, in the order
      of the levels; the clean score under "clean".
    """
    curves: dict[str, Any] = {}
    for name, comparison in compared.items():
        kind, _, level = name.partition("=")
        for task in comparison.tasks:
            curve = curves.setdefault(task.name, {CLEAN: task.a})
            curve.setdefault(kind, []).append({"level": float(level), **_point(task)})
    for curve in curves.values():
        for kind, points in curve.items():
            if kind != CLEAN:
                points.sort(key=lambda point: point["level"])
    return curves


def _point(task: Difference) -> dict[str, float | None]:
    return {"score": task.b, "change": task.b - task.a, "low": task.low, "high": task.high}


def spread(points: Sequence[Mapping[str, Any]], clean: float) -> float:
    """Highest minus lowest score over instructions: how much a score hangs on the prompt."""
    scores = [clean, *(point["score"] for point in points)]
    return max(scores) - min(scores)
