"""Plots as SVG text. Colours are CSS variables, so they follow the page's light or dark theme."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

RING = 5  # circles of the radar


class Series(NamedTuple):
    """One model's values by name, 0..1; colour: a CSS value."""

    name: str
    colour: str
    values: Mapping[str, float | None]


class Point(NamedTuple):
    """A value with its interval."""

    series: str
    colour: str
    value: float
    low: float | None
    high: float | None


def radar(axes: Sequence[str], series: Sequence[Series]) -> str:
    """Closed lines over the axes, 0 in the middle and 1 on the rim; a missing value is a gap at 0."""
    size, radius = 480, 180
    centre = size / 2

    def place(number: int, share: float) -> str:
        angle = 2 * math.pi * number / len(axes) - math.pi / 2
        x, y = centre + radius * share * math.cos(angle), centre + radius * share * math.sin(angle)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for ring in range(1, RING + 1):
        corners = " ".join(place(n, ring / RING) for n in range(len(axes)))
        parts.append(f'<polygon class="grid" points="{corners}"/>')
        x, y = place(0, ring / RING).split(",")
        parts.append(
            f'<text class="tick" x="{float(x) + 4}" y="{float(y) + 4}">{ring / RING:.1f}</text>'
        )
    for number, axis in enumerate(axes):
        x, y = place(number, 1).split(",")
        parts.append(f'<line class="grid" x1="{centre}" y1="{centre}" x2="{x}" y2="{y}"/>')
        x, y = place(number, 1.13).split(",")
        parts.append(f'<text class="axis" x="{x}" y="{float(y) + 5}">{escape(axis)}</text>')
    for one in series:
        shares = [one.values.get(axis) or 0.0 for axis in axes]
        corners = " ".join(place(n, share) for n, share in enumerate(shares))
        parts.append(
            f'<polygon points="{corners}" style="stroke:{one.colour};fill:{one.colour}" class="area">'
            f"<title>{escape(one.name)}</title></polygon>"
        )
        for number, axis in enumerate(axes):
            if (value := one.values.get(axis)) is not None:
                x, y = place(number, value).split(",")
                parts.append(
                    f'<circle cx="{x}" cy="{y}" r="3.5" style="fill:{one.colour}">'
                    f"<title>{escape(one.name)}, {escape(axis)}: {value:.3f}</title></circle>"
                )
    return _svg(size, size, parts, "radar over tasks")


def dots(rows: Mapping[str, Sequence[Point]], limits: tuple[float, float], unit: str) -> str:
    """A row for each name with a dot and an interval for each series, on one horizontal axis."""
    width, left, right, gap = 480, 100, 16, 9
    heights = [max(26, gap * len(points) + 12) for points in rows.values()]
    low, high = limits

    def across(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return left + share * (width - left - right)

    bottom = sum(heights) + 6
    parts = []
    for step in range(5):
        value = low + (high - low) * step / 4
        x = across(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{bottom + 16}">{value:.4g}</text>')
    parts.append(
        f'<text class="axis" x="{(left + width - right) / 2}" y="{bottom + 34}">{escape(unit)}</text>'
    )
    top = 6.0
    for height, (name, points) in zip(heights, rows.items(), strict=True):
        middle = top + height / 2
        parts.append(f'<text class="row" x="{left - 8}" y="{middle + 4:.1f}">{escape(name)}</text>')
        first = middle - gap * (len(points) - 1) / 2
        for number, point in enumerate(points):
            parts.append(_dot(point, across, first + gap * number))
        top += height
    return _svg(width, bottom + 42, parts, unit)


def _dot(point: Point, across, y: float) -> str:
    told = f"{point.series}: {point.value:.3f}"
    line = ""
    if point.low is not None and point.high is not None:
        told += f" ({point.low:.3f} to {point.high:.3f})"
        line = (
            f'<line x1="{across(point.low):.1f}" x2="{across(point.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            f'style="stroke:{point.colour}" class="bounds"/>'
        )
    return (
        f"<g><title>{escape(told)}</title>{line}"
        f'<circle cx="{across(point.value):.1f}" cy="{y:.1f}" r="4" style="fill:{point.colour}"/></g>'
    )


def scatter(points: Sequence[tuple[str, str, float, float]], across: str, up: str) -> str:
    """Named points (name, colour, x, y), both axes 0..1."""
    width, height, left, bottom = 480, 320, 56, 44
    inner_w, inner_h = width - left - 20, height - bottom - 16

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * inner_w, 16 + (1 - y) * inner_h

    parts = []
    for step in range(5):
        share = step / 4
        x, _ = at(share, 0)
        _, y = at(0, share)
        parts.append(f'<line class="grid" x1="{x}" y1="16" x2="{x}" y2="{16 + inner_h}"/>')
        parts.append(f'<line class="grid" x1="{left}" y1="{y}" x2="{left + inner_w}" y2="{y}"/>')
        parts.append(f'<text class="axis" x="{x}" y="{16 + inner_h + 16}">{share:.2g}</text>')
        parts.append(f'<text class="row" x="{left - 8}" y="{y + 4}">{share:.2g}</text>')
    parts.append(
        f'<text class="axis" x="{left + inner_w / 2}" y="{height - 6}">{escape(across)}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(14 {16 + inner_h / 2}) rotate(-90)">{escape(up)}</text>'
    )
    for name, colour, x, y in points:
        px, py = at(x, y)
        anchor = ' style="text-anchor:end"' if x > 0.6 else ""
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" style="fill:{colour}"/>')
        shift = -10 if anchor else 10
        parts.append(
            f'<text class="name" x="{px + shift:.1f}" y="{py - 6:.1f}"{anchor}>{escape(name)}</text>'
        )
    return _svg(width, height, parts, f"{up} by {across}")


class Level(NamedTuple):
    """A score at a level of a perturbation: 0..1, with the clean score of the same files."""

    level: float
    score: float
    clean: float
    low: float | None
    high: float | None
    files: int


def curve(title: str, points: Sequence[Level], across: str) -> str:
    """A line through scores over evenly spaced levels, and pieces of another through the clean ones."""
    width, height, left, bottom, top = 260, 190, 34, 40, 26
    step = (width - left - 16) / max(len(points), 1)

    def up(value: float) -> float:
        return top + (1 - min(max(value, 0.0), 1.0)) * (height - bottom - top)

    parts = [f'<text class="axis" x="{width / 2}" y="15">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = up(share)
        parts.append(
            f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{width - 10}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class="row" x="{left - 6}" y="{y + 4:.1f}">{share:g}</text>')
    corners = []
    for number, (x, y, clean, low, high, files) in enumerate(points):
        px = left + step * (number + 0.5)
        parts.append(
            f'<line class="clean" x1="{px - step / 2:.1f}" x2="{px + step / 2:.1f}" '
            f'y1="{up(clean):.1f}" y2="{up(clean):.1f}"/>'
        )
        corners.append(f"{px:.1f},{up(y):.1f}")
        parts.append(f'<text class="axis" x="{px:.1f}" y="{height - bottom + 16}">{x:g}</text>')
        told = f"{title}, {across} {x:g}, {files} files: {y:.3f}"
        if low is not None and high is not None:
            told += f" ({low:.3f} to {high:.3f})"
            parts.append(
                f'<line class="bounds" style="stroke:var(--m0)" x1="{px:.1f}" x2="{px:.1f}" '
                f'y1="{up(low):.1f}" y2="{up(high):.1f}"/>'
            )
        parts.append(
            f'<circle cx="{px:.1f}" cy="{up(y):.1f}" r="4" style="fill:var(--m0)">'
            f"<title>{escape(told)}</title></circle>"
        )
    parts.insert(0, f'<polyline class="line" points="{" ".join(corners)}"/>')
    parts.append(
        f'<text class="axis" x="{(left + width) / 2}" y="{height - 6}">{escape(across)}</text>'
    )
    return _svg(width, height, parts, f"{title} by {across}")


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    inner = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width * 1.4:g}px">{inner}</svg>'
    )
