"""How a model's scores change when the same items are asked perturbed."""

from collections.abc import Mapping, Sequence
from typing import Any

from llaso_jax.evaluation.comparison import Comparison, Difference
from llaso_jax.evaluation.tasks import TaskFiles

NOT_ASKED = "not asked: too few items that share an instruction or a number of recordings"


def robustness_tree(
    compared: Mapping[str, Comparison], tasks: TaskFiles, *, asked: Sequence[str]
) -> dict[str, Any]:
    """Curves by task, then kind: points with score on 0..1 and its change from the clean items.

    Args:
      compared: by perturbation ("noise=-10"), the clean answers (a) and the perturbed ones (b).
      tasks: the files that were asked clean.
      asked: perturbations that were asked for, also those that no file can be asked with.

    Returns:
      curves: task -> kind -> [{level, files, clean, score, change, low, high}] in the order of the levels;
      low and high are of the change, `clean` is the score of the same `files` files without the perturbation.
      left_out: perturbation -> file -> why it is in no point.
    """
    curves: dict[str, Any] = {}
    for name, comparison in compared.items():
        kind, _, level = name.partition("=")
        for task in comparison.tasks:
            files = sum(tasks[file].task == task.name for file in comparison.files)
            point = {"level": float(level), "files": files, **_point(task)}
            curves.setdefault(task.name, {}).setdefault(kind, []).append(point)
    for curve in curves.values():
        for points in curve.values():
            points.sort(key=lambda point: point["level"])
    left_out = {name: dict.fromkeys(tasks, NOT_ASKED) for name in asked}
    for name, comparison in compared.items():
        left_out[name] |= comparison.left_out
        left_out[name] = {f: why for f, why in left_out[name].items() if f not in comparison.files}
    told = {name: files for name, files in left_out.items() if files}
    return {"curves": curves, "left_out": told} if asked else {}


def _point(task: Difference) -> dict[str, float | None]:
    return {
        "clean": task.a,
        "score": task.b,
        "change": task.b - task.a,
        "low": task.low,
        "high": task.high,
    }


def spread(points: Sequence[Mapping[str, Any]]) -> float:
    """Highest minus lowest score over instructions, the item's own included: how much it hangs on the prompt.

    Of changes, each from the clean score of the same files: not every file has every level.
    """
    changes = [0.0, *(point["change"] for point in points)]
    return max(changes) - min(changes)
