"""What a stage of a recipe takes on devices that are not there: compiled for them, never run.

plan(load_config("llaso_base_instruct"), topology="v5e:4x2", mesh="8x1").peak_hbm_bytes
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from llaso_jax.config import RunConfig, StageConfig
from llaso_jax.errors import ConfigError, LlasoError
from llaso_jax.planning.bounds import Bounds, step_bounds
from llaso_jax.planning.hardware import GIB, Accelerator, find_accelerator
from llaso_jax.planning.memory import hbm_by_owner, peak_bytes
from llaso_jax.planning.recipe import planned_model, planned_stage
from llaso_jax.planning.topology import topology_devices
from llaso_jax.sharding.collectives import collective_bytes
from llaso_jax.sharding.costs import operation_costs
from llaso_jax.sharding.hlo import parse
from llaso_jax.sharding.mesh import make_mesh, parse_mesh
from llaso_jax.training.abstract import abstract_step, stage_flops
from llaso_jax.training.fit import check_stage
from llaso_jax.training.state import Layout

CORPUS_SAMPLES = {"align": 12_000_000, "instruct": 13_500_000}
"""Samples of LLaSO-Align and LLaSO-Instruct (arXiv 2508.15418)."""


class PlanError(LlasoError):
    """A step that does not fit its devices, with the compiler's numbers."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training step takes.

    Attributes:
      recipe, stage: what is trained.
      topology, mesh, devices, device: where.
      rows: of a micro-batch, on all devices; accumulation: micro-batches of a step.
      sequence_length, chunks_per_row, remat: as in the recipe.
      peak_hbm_bytes: most memory that a device needs at a time; hbm_bytes: what it has.
      hbm_by_owner: the peak, by what it holds.
      analytic_flops: of a step, on all devices, by the formulas (modeling/flops.py), without rematerialization.
      counted_flops: of the compiled program, on all devices.
      collectives: bytes that each device sends in a step, by mesh axis and kind.
      bounds: what a step cannot be faster than.
      compile_seconds: how long the compiler took.
    """

    recipe: str
    stage: str
    topology: str
    mesh: str
    devices: int
    device: Accelerator
    rows: int
    accumulation: int
    sequence_length: int
    chunks_per_row: int
    remat: str
    peak_hbm_bytes: int
    hbm_by_owner: dict[str, int]
    analytic_flops: float
    counted_flops: float
    collectives: dict[str, dict[str, float]]
    bounds: Bounds
    compile_seconds: float

    @property
    def hbm_share(self) -> float:
        """Peak over what a device has."""
        return self.peak_hbm_bytes / self.device.hbm_bytes

    @property
    def predicted_step_seconds(self) -> float:
        """Time of a step if nothing but its products, bytes and links took any."""
        return self.bounds.predicted

    @property
    def mfu_bound(self) -> float:
        """Model FLOPs over what the devices could do in the time of the roofline."""
        return self.analytic_flops / (self.devices * self.device.flops * self.bounds.seconds)

    @property
    def samples_per_second(self) -> float:
        """Samples of one chunk of audio each, rows full of them, at the predicted time."""
        samples = self.rows * self.accumulation * self.chunks_per_row
        return samples / self.predicted_step_seconds

    @property
    def hours(self) -> dict[str, float]:
        """Hours for one pass over LLaSO's two corpora at this stage's rate."""
        return {
            name: count / self.samples_per_second / 3600 for name, count in CORPUS_SAMPLES.items()
        }

    def to_json(self) -> dict[str, Any]:
        """All numbers, as plan.json has them."""
        return {
            "recipe": self.recipe,
            "stage": self.stage,
            "topology": self.topology,
            "mesh": self.mesh,
            "devices": self.devices,
            "device_kind": self.device.device_kind,
            "rows": self.rows,
            "accumulation": self.accumulation,
            "sequence_length": self.sequence_length,
            "chunks_per_row": self.chunks_per_row,
            "remat": self.remat,
            "peak_hbm_bytes": self.peak_hbm_bytes,
            "hbm_bytes": self.device.hbm_bytes,
            "hbm_share": self.hbm_share,
            "hbm_by_owner": self.hbm_by_owner,
            "flops": {"analytic": self.analytic_flops, "counted": self.counted_flops},
            "collectives": self.collectives,
            "bounds": {
                "compute_seconds": self.bounds.compute,
                "hbm_seconds": self.bounds.hbm,
                "interconnect_seconds": self.bounds.interconnect,
                "steps_seconds": self.bounds.steps,
                "binding": self.bounds.binding,
            },
            "predicted_step_seconds": self.predicted_step_seconds,
            "mfu_bound": self.mfu_bound,
            "samples_per_second": self.samples_per_second,
            "hours": self.hours,
            "compile_seconds": self.compile_seconds,
        }


def plan(
    recipe: RunConfig,
    *,
    topology: str,
    mesh: str,
    stage: int = 0,
    batch: int | None = None,
) -> Plan:
    """Compile the training step of a stage for a topology and say what it takes.

    Args:
      recipe: as for `llaso train`.
      topology: "v5e:4x2", "v5p:2x2x1", "h100:8" (planning/topology.py).
      mesh: as `llaso train --mesh`, of the topology's devices or the first of them.
      stage: its number, from 0.
      batch: rows that a device has at a time; None for the recipe's.

    Raises:
      ConfigError: a topology whose compiler is not installed, a stage that is not there, a batch that does not fit.
      ShardingError: a mesh that does not fit the model, its rows or the topology.
      PlanError: the step needs more memory than a device has.
    """
    devices = topology_devices(topology)
    device = find_accelerator(devices[0].device_kind)
    if device is None:
        raise ConfigError(
            f"topology {topology!r}: what a {devices[0].device_kind!r} can do is not known; add it to "
            f"planning/hardware.py."
        )
    # A mesh may leave devices of a topology unused: one chip, of a slice of four.
    chosen = make_mesh(mesh, devices=devices[: math.prod(parse_mesh(mesh).values())])
    found = plan_on(chosen, device, recipe, topology=topology, stage=stage, batch=batch)
    if found.hbm_share > 1:  # compilers for TPUs refuse this themselves
        needed, there = found.peak_hbm_bytes / GIB, device.hbm_bytes / GIB
        raise PlanError(f"does not fit: needs {needed:.2f} GiB of {there:.2f}.")
    return found


def plan_on(
    mesh: Mesh,
    device: Accelerator,
    recipe: RunConfig,
    *,
    stage: int = 0,
    batch: int | None = None,
    topology: str = "",
) -> Plan:
    """`plan` on a mesh whose devices are each a `device`."""
    model, _ = planned_model(recipe)
    rules = recipe.sharding.rules()
    layout = Layout.of(model, mesh, rules, frozen=recipe.sharding.frozen)
    chosen = with_batch(planned_stage(recipe, stage), layout.batch_shards, batch)
    check_stage(model, chosen, rules, mesh.shape)
    platform = mesh.devices.flat[0].platform
    compute, frozen = recipe.precision.resolve("gpu" if platform == "cuda" else platform)
    step = abstract_step(model, chosen, layout, compute, frozen_dtype=frozen)
    start = time.perf_counter()
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _refused(error) from error
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is None:
        raise PlanError(f"the compiler for {topology or device.name} gives no memory analysis.")
    peak = peak_bytes(memory, platform)
    program = parse(compiled.as_text() or "")
    costs = list(operation_costs(program))
    sent = collective_bytes(program, mesh.shape)
    return Plan(
        recipe=recipe.name,
        stage=chosen.name,
        topology=topology,
        mesh=mesh_name(mesh.shape),
        devices=mesh.size,
        device=device,
        rows=chosen.data.rows // chosen.accumulation,
        accumulation=chosen.accumulation,
        sequence_length=chosen.data.sequence_length,
        chunks_per_row=chosen.data.chunks_per_row,
        remat=compute.remat,
        peak_hbm_bytes=peak,
        hbm_by_owner=hbm_by_owner(step, program, peak),
        analytic_flops=stage_flops(model, chosen),
        counted_flops=mesh.size * sum(cost.times * cost.flops for cost in costs),
        collectives=sent,
        bounds=step_bounds(costs, sent, device),
        compile_seconds=seconds,
    )


def with_batch(stage: StageConfig, shards: int, batch: int | None) -> StageConfig:
    """`stage` with `batch` rows on each of `shards` parts of the mesh at a time, and about as many rows in a step.

    Raises:
      ConfigError: a batch below 1, or rows of the recipe that do not split over the mesh.
    """
    rows = stage.data.rows // stage.accumulation
    if batch is None:
        if rows % shards:
            raise ConfigError(
                f"stage {stage.name!r} has {rows} rows at a time, which do not split over {shards} parts of the "
                f"mesh: give --batch, the rows of one part."
            )
        return stage
    if batch < 1:
        raise ConfigError(f"--batch {batch}: at least one row is needed.")
    micro = batch * shards
    accumulation = max(1, round(stage.data.rows / micro))
    # A window or lanes chosen for the recipe's rows need not fit others; neither changes a step.
    data = dataclasses.replace(stage.data, rows=micro * accumulation, window=None, lanes=1)
    return dataclasses.replace(stage, data=data, accumulation=accumulation)


def mesh_name(sizes: Mapping[str, int]) -> str:
    """A mesh by its axes of more than one device: "fsdp=4,tensor=2"."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "1x1"


def _refused(error: Exception) -> Exception:
    """What the compiler says of memory, in one line; other errors as they are."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return error
    used = re.search(r"Used [\d.]+\w of [\d.]+\w hbm", text)
    return PlanError(f"does not fit: {used[0] if used else text.splitlines()[0][:160]}.")
