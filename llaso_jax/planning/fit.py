"""What of a recipe a device with so much memory can train, by estimate.py: no compiler, no device."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from llaso_jax.config import RunConfig
from llaso_jax.modeling.compute import RematPolicy
from llaso_jax.modeling.lora import LoraRule
from llaso_jax.planning.estimate import Estimate, estimate
from llaso_jax.planning.hardware import GIB
from llaso_jax.planning.recipe import planned_model
from llaso_jax.planning.search import USABLE
from llaso_jax.sharding.report import aligned
from llaso_jax.sharding.rules import ShardingError
from llaso_jax.training.optimizer import ParameterRule

POLICIES: tuple[RematPolicy, ...] = ("none", "dots", "layer")
"""Fastest first."""
MOST_ROWS = 1024
ADAPTERS = LoraRule(pattern="language_model/layers/.*", rank=16)


@dataclasses.dataclass(frozen=True)
class Fit:
    """One way to train a stage.

    Attributes:
      recipe, stage: what.
      trained: "as the recipe says", or with adapters in the decoder's place.
      remat: rematerialization.
      rows: the most that a device can have at a time; 0 if not even one.
      memory: with so many rows, or with one.
      devices: how many such devices it takes for one row each, weights split over them (fsdp); None: more than 256.
    """

    recipe: str
    stage: str
    trained: str
    remat: str
    rows: int
    positions: int
    memory: Estimate
    devices: int | None


def fits(recipe: RunConfig, hbm_gib: float, *, devices: int = 1) -> Iterator[Fit]:
    """Every way to train the stages of a recipe on `devices` devices of `hbm_gib` GiB each, fastest first.

    Memory is filled to USABLE at most. Stages that train the decoder are tried with adapters in its place too.
    """
    for variant, trained in _variants(recipe):
        model, _ = planned_model(variant)
        for stage in variant.stages:
            for remat in POLICIES:
                precision = dataclasses.replace(variant.precision, remat=remat)
                memory = functools.partial(estimate, model, stage, precision)
                rows, least = _limits(memory, USABLE * hbm_gib * GIB, devices)
                yield Fit(
                    recipe=recipe.name,
                    stage=stage.name,
                    trained=trained,
                    remat=remat,
                    rows=rows,
                    positions=stage.data.sequence_length,
                    memory=memory(devices=devices, rows=max(rows, 1)),
                    devices=least,
                )


def _limits(memory: Callable[..., Estimate], limit: float, devices: int) -> tuple[int, int | None]:
    """The most rows that fit on each of `devices`, and the fewest devices on which one row each does."""
    low, high = 0, MOST_ROWS + 1
    while high - low > 1:
        rows = (low + high) // 2
        fit = memory(devices=devices, rows=rows).peak <= limit
        low, high = (rows, high) if fit else (low, rows)
    if low:
        return low, devices
    for count in (2**exponent for exponent in range(9)):
        try:
            if count > devices and memory(devices=count, rows=1).peak <= limit:
                return 0, count
        except ShardingError:  # no parameter splits further
            return 0, None
    return 0, None


def fit_text(found: Sequence[Fit], hbm_gib: float, devices: int) -> str:
    """A table of what fits and of what would."""
    header = ("recipe", "stage", "trains", "remat", "rows", "positions", "GiB", "")
    lines: list[tuple[str, ...]] = [header]
    for one in found:
        note = ""
        if not one.rows:
            needed = one.devices and f"from {one.devices} such devices on"
            note = f"does not fit: {needed or 'not on 256 such devices either'}"
        lines.append(
            (
                one.recipe,
                one.stage,
                one.trained,
                one.remat,
                str(one.rows) if one.rows else "-",
                str(one.rows * one.positions) if one.rows else "-",
                f"{one.memory.peak / GIB:.1f}",
                note,
            )
        )
    head = (
        f"{devices} device(s) of {hbm_gib:g} GiB, filled to {USABLE:.0%}; rows and positions are those of a device at "
        f"a time, estimated without a compiler\n\n"
    )
    return head + "".join(f"{line}\n" for line in aligned(lines))


def _variants(recipe: RunConfig) -> Iterator[tuple[RunConfig, str]]:
    yield recipe, "as it says"
    if not recipe.lora:
        rules = (
            ParameterRule(pattern="projector/.*|.*/lora_[AB]/weight"),
            ParameterRule(pattern=".*", learning_rate_scale=None),
        )
        stages = tuple(
            dataclasses.replace(stage, parameters=rules)
            for stage in recipe.stages
            if stage.objective == "lm"
        )
        if stages:
            yield dataclasses.replace(recipe, lora=(ADAPTERS,), stages=stages), "projector, LoRA 16"
