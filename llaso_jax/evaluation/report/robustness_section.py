"""Curves of the perturbed items, as HTML text."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llaso_jax.evaluation.report.sections import table
from llaso_jax.evaluation.report.svg import curve
from llaso_jax.evaluation.robustness import CLEAN, spread

AXES = {
    "noise": "signal over noise, dB",
    "speed": "speed",
    "codec": "MP3, kbit/s",
    "gain": "gain, dB",
    "reword": "another instruction",
}


def robustness_section(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """A small plot for each task and kind; "" where nothing was perturbed."""
    if not curves:
        return ""
    kinds = dict.fromkeys(kind for one in curves.values() for kind in one if kind != CLEAN)
    parts = []
    for kind in kinds:
        plots = "".join(
            f"<figure>{_plot(task, one[kind], one[CLEAN], kind)}</figure>"
            for task, one in curves.items()
            if kind in one
        )
        parts.append(f'<h3>{escape(kind)}</h3><div class="small">{plots}</div>')
    if "reword" in kinds:
        rows = [
            [escape(task), f"{one[CLEAN]:.3f}", f"{spread(one['reword'], one[CLEAN]):.3f}"]
            for task, one in curves.items()
            if "reword" in one
        ]
        heads = ["task", "as asked", "highest minus lowest over instructions"]
        parts.append(table(heads, rows, left=1))
    return (
        '<section id="robustness"><h2>Robustness</h2><p>The same items asked perturbed; scores on 0 to 1. The '
        "line across is the score of the clean items; bars are intervals of the change from it.</p>"
        f"{''.join(parts)}</section>"
    )


def _plot(task: str, points: Sequence[Mapping[str, Any]], clean: float, kind: str) -> str:
    placed = [
        (
            point["level"],
            point["score"],
            None if point["low"] is None else clean + point["low"],
            None if point["high"] is None else clean + point["high"],
        )
        for point in points
    ]
    return curve(task, placed, clean, AXES[kind])
