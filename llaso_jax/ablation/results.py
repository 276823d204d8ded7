"""Outcomes of a sweep: what was measured, and how far from what should be the same; or what was planned."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from llaso_jax.ablation.grid import Point
from llaso_jax.ablation.sweep import Row
from llaso_jax.ablation.trial import Measured
from llaso_jax.planning.hardware import GIB
from llaso_jax.planning.plan import Plan

Criterion = Literal["speed", "memory", "loss"]

# Points that differ in these alone compute the same, on any mesh; a field of a stage is named by its end.
SAME_RESULT = (
    *("sharding", "sharding.strategy", "sharding.encoder", "sharding.frozen"),
    "precision.remat",
    "precision.attention",
    "accumulation",
    *("num_workers", "num_threads", "read_ahead", "feature_cache_mb", "prefetch_batches"),
)
TOLERANCE = {
    # Relative. Every mesh adds in another order, and every step of AdamW divides small gradients by their own size,
    # which carries their rounding into the weights.
    "float32": 1e-4,
    "bfloat16": 2e-2,  # 8 bits: one rounding is 4e-3
}

_UNITS = ((1, "s"), (1e3, "ms"), (1e6, "µs"))


@dataclasses.dataclass(frozen=True)
class Result:
    """A measured point.

    Attributes:
      point, measured: what was tried and what came of it.
      reference: the point it is compared with: the first that should compute the same; None: it is that one.
      loss_difference, grad_norm_difference: from the reference's, relative, the largest of all steps.
    """

    point: Point
    measured: Measured
    reference: Point | None
    loss_difference: float
    grad_norm_difference: float

    @property
    def agrees(self) -> bool:
        """Whether differences from the reference are rounding."""
        return max(self.loss_difference, self.grad_norm_difference) <= self.tolerance

    @property
    def tolerance(self) -> float:
        """Largest relative difference that rounding explains."""
        return TOLERANCE[self.measured.dtype]

    @property
    def step_seconds(self) -> float:
        """Median of the steps that count."""
        return statistics.median(_timed(self.measured, self.measured.step_seconds))

    @property
    def samples_per_second(self) -> float:
        """Over the steps that count."""
        seconds = _timed(self.measured, self.measured.step_seconds)
        return sum(_timed(self.measured, self.measured.samples)) / sum(seconds)

    @property
    def peak_bytes(self) -> int:
        """Per device: what the device counted, or else what the program says."""
        return self.measured.device_peak_bytes or self.measured.peak_bytes

    def key(self, by: Criterion) -> float:
        """What ranks it: the least is the best."""
        return {
            "speed": -self.samples_per_second,
            "memory": self.peak_bytes,
            "loss": self.measured.losses[-1],
        }[by]

    def numbers(self) -> dict[str, Any]:
        """Columns of the CSV file."""
        measured = self.measured
        return {
            "step_seconds": self.step_seconds,
            "samples_per_second": self.samples_per_second,
            "compile_seconds": measured.compile_seconds,
            "program_peak_bytes": measured.peak_bytes,
            "device_peak_bytes": measured.device_peak_bytes,
            "first_loss": measured.losses[0],
            "last_loss": measured.losses[-1],
            "first_grad_norm": measured.grad_norms[0],
            "last_grad_norm": measured.grad_norms[-1],
            "loss_difference": self.loss_difference,
            "grad_norm_difference": self.grad_norm_difference,
            "agrees": self.agrees,
            "device": measured.device,
            "devices": measured.devices,
            "dtype": measured.dtype,
        }

    def cells(self) -> dict[str, str]:
        """Columns of the table."""
        differences = (self.loss_difference, self.grad_norm_difference)
        shown = [f"{d:.1e}" for d in differences] if self.reference is not None else ["(first)", ""]
        return {
            "step": _duration(self.step_seconds),
            "samples/s": _count(self.samples_per_second),
            "compile": _duration(self.measured.compile_seconds),
            "GiB": f"{self.peak_bytes / GIB:.3g}",
            "Δ loss": shown[0],
            "Δ norm": shown[1],
        }

    def bars(self) -> dict[str, float]:
        """Panels of the plot."""
        return {
            "a step (median), s": self.step_seconds,
            "peak GiB of a device": self.peak_bytes / GIB,
            "compile time, s": self.measured.compile_seconds,
        }


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A planned point: what the compiler says, and how fast the devices can be at best."""

    point: Point
    plan: Plan
    agrees = True  # nothing was computed

    def key(self, by: Criterion) -> float:
        """What ranks it: the least is the best."""
        return -self.plan.samples_per_second if by == "speed" else self.plan.peak_hbm_bytes

    def numbers(self) -> dict[str, Any]:
        """Columns of the CSV file."""
        plan = self.plan
        return {
            "predicted_step_seconds": plan.predicted_step_seconds,
            "samples_per_second": plan.samples_per_second,
            "compute_seconds": plan.bounds.compute,
            "hbm_seconds": plan.bounds.hbm,
            "interconnect_seconds": plan.bounds.interconnect,
            "binding": plan.bounds.binding,
            "mfu_bound": plan.mfu_bound,
            "peak_hbm_bytes": plan.peak_hbm_bytes,
            "hbm_share": plan.hbm_share,
            "compile_seconds": plan.compile_seconds,
            "device": plan.device.device_kind,
            "devices": plan.devices,
        }

    def cells(self) -> dict[str, str]:
        """Columns of the table."""
        plan = self.plan
        return {
            "step": _duration(plan.predicted_step_seconds),
            "samples/s": _count(plan.samples_per_second),
            "compute": _duration(plan.bounds.compute),
            "memory": _duration(plan.bounds.hbm),
            "links": _duration(plan.bounds.interconnect),
            "GiB": f"{plan.peak_hbm_bytes / GIB:.3g}",
        }

    def bars(self) -> dict[str, float]:
        """Panels of the plot."""
        return {
            "a step at best, ms": 1e3 * self.plan.predicted_step_seconds,
            "compute, ms": 1e3 * self.plan.bounds.compute,
            "memory traffic, ms": 1e3 * self.plan.bounds.hbm,
            "links, ms": 1e3 * self.plan.bounds.interconnect,
            "peak GiB of a device": self.plan.peak_hbm_bytes / GIB,
        }


Outcome = Result | Forecast


def rank(rows: Iterable[Row], by: Criterion = "speed") -> list[Outcome]:
    """Points that worked, the best first; those that do not agree with their reference come last."""
    references: dict[tuple, Row] = {}
    outcomes: list[Outcome] = []
    for row in rows:
        if row.planned is not None:
            outcomes.append(Forecast(row.point, row.planned))
        if row.measured is not None:
            outcomes.append(_compared(row, references.setdefault(_computed(row.point), row)))
    return sorted(outcomes, key=lambda outcome: (not outcome.agrees, outcome.key(by)))


def _compared(row: Row, reference: Row) -> Result:
    measured, first = row.measured, reference.measured
    assert measured is not None
    assert first is not None
    return Result(
        point=row.point,
        measured=measured,
        reference=None if reference is row else reference.point,
        loss_difference=_difference(measured.losses, first.losses),
        grad_norm_difference=_difference(measured.grad_norms, first.grad_norms),
    )


def _computed(point: Point) -> tuple[tuple[str, str], ...]:
    """Settings that decide what is computed."""
    return tuple(
        (field, value)
        for field, value in point.settings
        if not any(f".{field}".endswith(f".{same}") for same in SAME_RESULT)
    )


def _difference(actual: Sequence[float], expected: Sequence[float]) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(abs(a - e) / max(abs(e), 1e-30) for a, e in pairs)


def _timed(measured: Measured, values: Sequence) -> list:
    return [value for value, counts in zip(values, measured.timed, strict=True) if counts]


def _duration(seconds: float) -> str:
    scale, unit = next((one for one in _UNITS if seconds >= 1 / one[0]), _UNITS[-1])
    return f"{seconds * scale:.3g} {unit}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if 100 <= number < 1e6 else f"{number:.3g}"
