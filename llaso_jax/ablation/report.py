"""What a sweep found: points ranked, in a table, a CSV file and a plot, and the best one as a recipe to train with."""

import csv
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table

from llaso_jax.ablation.grid import MESH, Point
from llaso_jax.ablation.sweep import Row
from llaso_jax.ablation.trial import Measured
from llaso_jax.config import RunConfig, to_yaml

Criterion = Literal["speed", "memory", "loss"]
GIB = 2**30

# Points that differ in these alone compute the same; a field of a stage is named by its end.
SAME_RESULT = (
    MESH,
    "precision.remat",
    "precision.attention",
    "accumulation",
    *("num_workers", "num_threads", "read_ahead", "feature_cache_mb", "prefetch_batches"),
)
TOLERANCE = {
    # Relative. The order of sums is another one on every mesh, and every step of AdamW divides small gradients by
    # their own size, which carries their rounding into the weights.
    "float32": 1e-4,
    "bfloat16": 2e-2,  # 8 bits: one rounding is 4e-3
}


@dataclasses.dataclass(frozen=True)
class Result:
    """A measured point beside the others.

    Attributes:
      point, measured: what was tried and what came of it.
      step_seconds: median of the steps that count.
      samples_per_second: over the steps that count.
      reference: the point it is compared with: the first that should compute the same; None: it is that one.
      loss_difference, grad_norm_difference: from the reference's, relative, the largest of all steps.
    """

    point: Point
    measured: Measured
    step_seconds: float
    samples_per_second: float
    reference: Point | None
    loss_difference: float
    grad_norm_difference: float

    @property
    def agrees(self) -> bool:
        """Whether differences from the reference are rounding."""
        tolerance = TOLERANCE[self.measured.dtype]
        return max(self.loss_difference, self.grad_norm_difference) <= tolerance

    @property
    def peak_bytes(self) -> int:
        """Per device: what the device counted, or else what the program says."""
        return self.measured.device_peak_bytes or self.measured.peak_bytes


KEYS: dict[Criterion, Callable[[Result], float]] = {
    "speed": lambda result: -result.samples_per_second,
    "memory": lambda result: result.peak_bytes,
    "loss": lambda result: result.measured.losses[-1],
}


def rank(rows: Iterable[Row], by: Criterion = "speed") -> list[Result]:
    """Measured points, the best first; those that do not agree with their reference come last."""
    references: dict[tuple, Row] = {}
    results = []
    for row in rows:
        if row.measured is None:
            continue
        result = _result(row, references.setdefault(_same_result_as(row.point), row))
        results.append(result)
    return sorted(results, key=lambda result: (not result.agrees, KEYS[by](result)))


def _result(row: Row, reference: Row) -> Result:
    measured, first = row.measured, reference.measured
    assert measured is not None
    assert first is not None
    timed = [index for index, counts in enumerate(measured.timed) if counts]
    seconds = [measured.step_seconds[index] for index in timed]
    return Result(
        point=row.point,
        measured=measured,
        step_seconds=statistics.median(seconds),
        samples_per_second=sum(measured.samples[index] for index in timed) / sum(seconds),
        reference=None if reference is row else reference.point,
        loss_difference=_difference(measured.losses, first.losses),
        grad_norm_difference=_difference(measured.grad_norms, first.grad_norms),
    )


def _same_result_as(point: Point) -> tuple[tuple[str, str], ...]:
    return tuple(
        (field, value)
        for field, value in point.settings
        if not any(f".{field}".endswith(f".{same}") for same in SAME_RESULT)
    )


def _difference(actual: Sequence[float], expected: Sequence[float]) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(abs(a - e) / max(abs(e), 1e-30) for a, e in pairs)


def failed(rows: Iterable[Row]) -> list[Row]:
    """Points that ended with an error."""
    return [row for row in rows if row.error is not None]


def varying(rows: Iterable[Row]) -> dict[str, str]:
    """Fields that are not the same in all points, with the shortest name that tells them apart."""
    values: dict[str, set[str | None]] = {}
    points = [row.point.values() for row in rows]
    for field in dict.fromkeys(field for point in points for field in point):
        values[field] = {point.get(field) for point in points}
    fields = [field for field, seen in values.items() if len(seen) > 1] or [MESH]
    last = [field.rpartition(".")[2] for field in fields]
    return {
        field: name if last.count(name) == 1 else field
        for field, name in zip(fields, last, strict=True)
    }


def label(point: Point, fields: dict[str, str]) -> str:
    """The point in a few words: its mesh bare, other fields with their names."""
    values = point.values()
    parts = [
        values[field] if field == MESH else f"{name}={values[field]}"
        for field, name in fields.items()
        if field in values
    ]
    return "  ".join(parts)


def result_table(rows: Sequence[Row], results: Sequence[Result]) -> Table:
    """Ranked points, then those that failed; differences of losses and gradient norms beside them."""
    fields = varying(rows)
    table = Table(title="ranked; differences are relative, the largest of all steps")
    table.add_column("", justify="right")
    for name in fields.values():
        table.add_column(name, overflow="fold")
    for name in ("s/step", "samples/s", "compile s", "GiB/device", "Δ loss", "Δ grad norm"):
        table.add_column(name, justify="right")
    for number, result in enumerate(results, 1):
        differences = (
            ["reference", ""]
            if result.reference is None
            else [f"{result.loss_difference:.1e}", f"{result.grad_norm_difference:.1e}"]
        )
        table.add_row(
            str(number),
            *_values(result.point, fields),
            f"{result.step_seconds:.3f}",
            f"{result.samples_per_second:.1f}",
            f"{result.measured.compile_seconds:.1f}",
            f"{result.peak_bytes / GIB:.3f}",
            *differences,
            style="" if result.agrees else "red",
        )
    for row in failed(rows):
        table.add_row("-", *_values(row.point, fields), "failed", style="dim")
    return table


def notes(rows: Sequence[Row], results: Sequence[Result]) -> list[str]:
    """What the table cannot say: why points failed, which do not agree, what the numbers do not mean."""
    fields = varying(rows)
    lines = [f"{label(row.point, fields)}: {_first_line(row.error or '')}" for row in failed(rows)]
    for result in results:
        if not result.agrees and result.reference is not None:
            lines.append(
                f"{label(result.point, fields)} does not compute what {label(result.reference, fields)} does: "
                f"more than {TOLERANCE[result.measured.dtype]:.0e} is no rounding ({result.measured.dtype})."
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


def write_csv(path: Path, rows: Sequence[Row], results: Sequence[Result]) -> None:
    """Every number of the table, unrounded, and the errors; one line per point."""
    fields = list(dict.fromkeys(field for row in rows for field in row.point.values()))
    numbers = {
        "step_seconds": lambda result: result.step_seconds,
        "samples_per_second": lambda result: result.samples_per_second,
        "compile_seconds": lambda result: result.measured.compile_seconds,
        "program_peak_bytes": lambda result: result.measured.peak_bytes,
        "device_peak_bytes": lambda result: result.measured.device_peak_bytes,
        "first_loss": lambda result: result.measured.losses[0],
        "last_loss": lambda result: result.measured.losses[-1],
        "first_grad_norm": lambda result: result.measured.grad_norms[0],
        "last_grad_norm": lambda result: result.measured.grad_norms[-1],
        "loss_difference": lambda result: result.loss_difference,
        "grad_norm_difference": lambda result: result.grad_norm_difference,
        "agrees": lambda result: result.agrees,
        "device": lambda result: result.measured.device,
        "devices": lambda result: result.measured.devices,
        "dtype": lambda result: result.measured.dtype,
    }
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", *fields, *numbers, "error"])
        for number, result in enumerate(results, 1):
            values = [number_of(result) for number_of in numbers.values()]
            writer.writerow([number, *_values(result.point, fields), *values, ""])
        for row in failed(rows):
            writer.writerow(["", *_values(row.point, fields), *[""] * len(numbers), row.error])


def plot(path: Path, rows: Sequence[Row], results: Sequence[Result]) -> None:
    """Bars of step time, memory and compile time, the best point on top, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    fields = varying(rows)
    names = [label(result.point, fields) for result in results]
    panels = {
        "seconds per step (median)": [result.step_seconds for result in results],
        "peak memory per device, GiB": [result.peak_bytes / GIB for result in results],
        "compile time, s": [result.measured.compile_seconds for result in results],
    }
    figure = Figure(figsize=(10, 1.2 + 0.3 * max(len(results), 1)), layout="constrained")
    for axes, (title, values) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        bars = axes.barh(range(len(values)), values)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.15)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    figure.axes[0].invert_yaxis()  # shared
    figure.savefig(path, dpi=110)


def winner(results: Sequence[Result]) -> Result | None:
    """The best point of those that agree with their reference."""
    return results[0] if results and results[0].agrees else None


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
