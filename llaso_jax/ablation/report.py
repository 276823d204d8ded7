"""What a sweep found: points ranked, in a table, a CSV file and a plot, and the best one as a recipe to train with."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from llaso_jax.ablation.grid import MESH, TOPOLOGY, Point
from llaso_jax.ablation.results import Forecast, Outcome, Result
from llaso_jax.ablation.sweep import Row
from llaso_jax.config import RunConfig, to_yaml

_BARE = (MESH, TOPOLOGY)  # known by their values


def failed(rows: Iterable[Row]) -> list[Row]:
    """Points that ended with an error."""
    return [row for row in rows if row.error is not None]


def varying(points: Iterable[Point]) -> dict[str, str]:
    """Fields that are not the same in all points, with the shortest name that tells them apart."""
    values: dict[str, set[str | None]] = {}
    settings = [point.values() for point in points]
    for field in dict.fromkeys(field for point in settings for field in point):
        values[field] = {point.get(field) for point in settings}
    fields = [field for field, seen in values.items() if len(seen) > 1] or [MESH]
    last = [field.rpartition(".")[2] for field in fields]
    return {
        field: name if last.count(name) == 1 else field
        for field, name in zip(fields, last, strict=True)
    }


def label(point: Point, fields: dict[str, str]) -> str:
    """The point in a few words: its topology and mesh bare, other fields with their names."""
    values = point.values()
    return "  ".join(
        values[field] if field in _BARE else f"{name}={values[field]}"
        for field, name in fields.items()
        if field in values
    )


def progress_line(row: Row, fields: dict[str, str]) -> str:
    """What came of a point, in one line."""
    told = "failed"
    if (measured := row.measured) is not None:
        steps, loss = len(measured.losses), measured.losses[-1]
        told = f"loss {loss:.4f} after {steps} steps, compiled in {measured.compile_seconds:.0f} s"
    if (plan := row.planned) is not None:
        seconds = f"{plan.predicted_step_seconds:.4g} s a step at best"
        told = f"{seconds}, compiled in {plan.compile_seconds:.0f} s"
    return f"{label(row.point, fields)}: {told}"


def result_table(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> Table:
    """Ranked points, then those that failed."""
    fields = varying(row.point for row in rows)
    table = Table(title=_title(outcomes), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("point", overflow="fold", min_width=20)
    for name in outcomes[0].cells() if outcomes else ("",):
        table.add_column(name, justify="right", no_wrap=True)
    for number, outcome in enumerate(outcomes, 1):
        style = "" if outcome.agrees else "red"
        name = Text(label(outcome.point, fields))
        table.add_row(str(number), name, *outcome.cells().values(), style=style)
    for row in failed(rows):
        table.add_row("-", Text(label(row.point, fields)), "failed", style="dim")
    return table


def _title(outcomes: Sequence[Outcome]) -> str:
    if outcomes and isinstance(outcomes[0], Forecast):
        return "what a step takes at best, and what its compute, memory traffic and links need alone; GiB a device"
    return "GiB: peak of a device; Δ: largest relative difference of any step from the first"


def notes(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> list[str]:
    """What the table cannot say: why points failed, which do not agree, what the numbers do not mean."""
    fields = varying(row.point for row in rows)
    lines = [f"{label(row.point, fields)}: {_first_line(row.error or '')}" for row in failed(rows)]
    results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    for result in results:
        if not result.agrees and result.reference is not None:
            lines.append(
                f"{label(result.point, fields)} does not compute what {label(result.reference, fields)} does: "
                f"more than {result.tolerance:.0e} is no rounding ({result.measured.dtype})."
            )
    kinds = sorted({result.measured.device for result in results})
    if len(kinds) > 1:
        lines.append(f"measured on different devices: {', '.join(kinds)}; --overwrite starts over.")
    if "cpu" in kinds and max(result.measured.devices for result in results) > 1:
        lines.append(
            "the devices are simulated on one CPU: seconds say nothing about accelerators; "
            "memory, losses and gradient norms are those of each device."
        )
    return lines


def write_csv(path: Path, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
    """Every number, unrounded, and the errors; one line per point."""
    fields = list(dict.fromkeys(field for row in rows for field in row.point.values()))
    names = list(outcomes[0].numbers()) if outcomes else []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", *fields, *names, "error"])
        for number, outcome in enumerate(outcomes, 1):
            values = outcome.numbers().values()
            writer.writerow([number, *_values(outcome.point, fields), *values, ""])
        for row in failed(rows):
            writer.writerow(["", *_values(row.point, fields), *[""] * len(names), row.error])


def plot(path: Path, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
    """Bars of what matters for every point, the best on top, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    fields = varying(row.point for row in rows)
    names = [label(outcome.point, fields) for outcome in outcomes]
    panels = list(outcomes[0].bars())
    figure = Figure(figsize=(3 + 1.6 * len(panels), 0.8 + 0.25 * len(names)), layout="constrained")
    for axes, title in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        bars = axes.barh(range(len(names)), [outcome.bars()[title] for outcome in outcomes])
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.35)  # for the numbers
        axes.locator_params(axis="x", nbins=4)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    figure.axes[0].invert_yaxis()  # and with it the others
    figure.savefig(path, dpi=110)


def winner(outcomes: Sequence[Outcome]) -> Point | None:
    """The best point, if it agrees with its reference: those that do not come last."""
    return outcomes[0].point if outcomes and outcomes[0].agrees else None


def write_winner(path: Path, point: Point, base: RunConfig) -> str:
    """The point as a recipe; returns the command that trains it."""
    command = f"llaso train --config {path} --mesh {point.mesh}"
    path.write_text(f"# {command}\n{to_yaml(point.config(base))}", encoding="utf-8")
    return command


def _values(point: Point, fields: Iterable[str]) -> list[str]:
    values = point.values()
    return [values.get(field, "") for field in fields]


def _first_line(text: str, longest: int = 300) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= longest else f"{line[:longest]}…"
