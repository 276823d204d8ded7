"""Curves of the perturbed items, as HTML text."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llaso_jax.evaluation.report.sections import table
from llaso_jax.evaluation.report.svg import Level, curve
from llaso_jax.evaluation.robustness import spread

AXES = {
    "noise": "signal over noise, dB",
    "speed": "speed",
    "codec": "MP3, kbit/s",
    "gain": "gain, dB",
    "reword": "another instruction",
    "swap": "the audio of another item",
}


def robustness_section(robustness: Mapping[str, Any], judge: str) -> str:
    """A small plot for each task and kind, and what is in none; "" where nothing was perturbed."""
    if not robustness:
        return ""
    curves: Mapping[str, Mapping[str, Any]] = robustness["curves"]
    kinds = dict.fromkeys(kind for one in curves.values() for kind in one)
    parts = []
    for kind in kinds:
        plots = "".join(
            f"<figure>{_plot(task, one[kind], kind)}</figure>"
            for task, one in curves.items()
            if kind in one
        )
        parts.append(f'<h3>{escape(kind)}</h3><div class="small">{plots}</div>')
    if "reword" in kinds:
        rows = [
            [escape(task), _cleans(one["reword"]), f"{spread(one['reword']):.3f}"]
            for task, one in curves.items()
            if "reword" in one
        ]
        heads = ["task", "as asked", "highest minus lowest over instructions"]
        parts.append(table(heads, rows, left=1))
    if robustness["left_out"]:
        rows = [
            [escape(name), escape(file), escape(reason)]
            for name, files in robustness["left_out"].items()
            for file, reason in files.items()
        ]
        parts.append("<h3>In no curve</h3>")
        parts.append(table(["perturbation", "file", "reason"], rows, left=3, kind="notes"))
    return (
        '<section id="robustness"><h2>Robustness</h2><p>The same items asked perturbed; scores on 0 to 1. The '
        "line across is the score of the clean items of the same files; bars are intervals of the change from "
        f"it. Judge of free answers: {escape(judge)}.</p>{''.join(parts)}</section>"
    )


def _cleans(points: Sequence[Mapping[str, Any]]) -> str:
    """The clean score; several where levels are of different files."""
    return " / ".join(dict.fromkeys(f"{point['clean']:.3f}" for point in points))


def _plot(task: str, points: Sequence[Mapping[str, Any]], kind: str) -> str:
    placed = [
        Level(
            point["level"],
            point["score"],
            point["clean"],
            None if point["low"] is None else point["clean"] + point["low"],
            None if point["high"] is None else point["clean"] + point["high"],
            point["files"],
        )
        for point in points
    ]
    return curve(task, placed, AXES[kind])
