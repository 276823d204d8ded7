"""One point of a sweep: some steps of the real training of a stage, timed and measured, or its plan.

`python -m llaso_jax.ablation.trial RESULT` is what a sweep starts for every point: a process of its own, so that its
devices, its memory and its crash are its own. It reads a `TrialSpec` as one line of JSON from its standard input,
writes `{"measured": …}`, `{"planned": …}` or `{"error": …}` to the file RESULT, and ends when that input is closed: a
trial does not outlive its sweep.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from llaso_jax.config import RunConfig, parse_config, resolve_path, to_tree
from llaso_jax.data.tokenizer import load_tokenizer
from llaso_jax.errors import DataError, NonFiniteLossError
from llaso_jax.planning.memory import peak_bytes
from llaso_jax.planning.plan import plan
from llaso_jax.planning.recipe import planned_stage
from llaso_jax.sharding.mesh import make_mesh, parse_mesh, provide_cpu_devices
from llaso_jax.training.feed import Feed, GlobalBatch
from llaso_jax.training.fit import check_stage
from llaso_jax.training.loop import StageRun, Workplace
from llaso_jax.training.metrics import MetricsWriter
from llaso_jax.training.optimizer import learning_rate_at
from llaso_jax.training.run import check_vocabulary, initial_params, model_config
from llaso_jax.training.state import Layout

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrialSpec:
    """What is tried.

    Attributes:
      config: the whole recipe, with the point's settings.
      mesh: as `llaso train --mesh`.
      stage: which of its stages is run, from its own first batch and the recipe's weights.
      steps: optimizer steps.
      topology: devices to plan for (planning/topology.py); None runs on those of this machine.
    """

    config: RunConfig
    mesh: str
    stage: int
    steps: int
    topology: str | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came of a trial.

    Attributes:
      losses, grad_norms: of every step (nats per supervised token; before clipping).
      step_seconds: of every step: from its dispatch, batch on the devices, until its results are there.
      timed: which steps count: not the first run of a program, as long as others remain.
      audio_seconds, samples: in every step's batch.
      compile_seconds: of all programs together (one for every length of audio that occurred), traced and compiled.
      peak_bytes: per device, what the largest program says it needs: weights, optimizer state, batch, temporaries.
      device_peak_bytes: the most any device held, where its runtime counts it (not on the CPU).
      device, devices: kind and number of devices.
      dtype: of activations and matrix products.
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    step_seconds: tuple[float, ...]
    timed: tuple[bool, ...]
    audio_seconds: tuple[float, ...]
    samples: tuple[int, ...]
    compile_seconds: float
    peak_bytes: int
    device_peak_bytes: int | None
    device: str
    devices: int
    dtype: str


def run_trial(spec: TrialSpec) -> Measured:
    """Train `spec.steps` steps as `llaso train` would, without saving or validating anything.

    Raises:
      ConfigError, ShardingError: settings that cannot work.
      DataError: data that cannot be used, or that ends before the steps do.
      NonFiniteLossError: a loss or gradient norm that is infinite or not a number.
    """
    cfg, stage = spec.config, planned_stage(spec.config, spec.stage)
    # A step is tried with all of its parts, as it is planned.
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, encoder_cache=None))
    needed = math.prod(parse_mesh(spec.mesh).values())
    provide_cpu_devices(needed)
    mesh = make_mesh(spec.mesh, devices=jax.devices()[:needed])
    model = model_config(cfg)
    rules = cfg.sharding.rules()
    layout = Layout.of(model, mesh, rules, frozen=cfg.sharding.frozen)
    check_stage(model, stage, rules, mesh.shape)
    tokenizer = load_tokenizer(resolve_path(cfg.tokenizer))
    check_vocabulary(model, tokenizer, cfg.tokenizer)
    params, _ = initial_params(cfg, model, layout)
    with (
        tempfile.TemporaryDirectory() as folder,
        MetricsWriter(Path(folder), tensorboard=False) as metrics,
    ):
        place = Workplace.of(
            cfg,
            model=model,
            layout=layout,
            tokenizer=tokenizer,
            output=Path(folder),
            metrics=metrics,
            console=Console(quiet=True),
        )
        run = StageRun(place, stage, params)
        del params  # the run holds them
        with contextlib.closing(run.data):
            return _measure(run, spec.steps)


@dataclasses.dataclass
class _Program:
    """A compiled step, and whether it has run."""

    step: jax.stages.Compiled
    ran: bool = False


def _measure(run: StageRun, steps: int) -> Measured:
    programs: dict[Any, _Program] = {}
    losses, norms, seconds, warm, stats = [], [], [], [], []
    compile_seconds = 0.0
    feed = run.data.feed(lambda: None)
    for number in range(1, steps + 1):
        batch = _next_batch(run, feed, steps)
        rate = np.float32(learning_rate_at(run.progress(), run.stage.optimizer))
        arrays = run.place_batch(batch)
        shapes = tuple(array.shape for array in arrays.values())
        if shapes not in programs:
            started = time.perf_counter()
            lowered = run.train_step.lower(run.state, run.frozen, arrays, rate)  # pyright: ignore[reportFunctionMemberAccess]
            programs[shapes] = _Program(lowered.compile())
            compile_seconds += time.perf_counter() - started
        program = programs[shapes]
        jax.block_until_ready((run.state, arrays))
        started = time.perf_counter()
        run.state, metrics = jax.block_until_ready(
            program.step(run.state, run.frozen, arrays, rate)
        )
        seconds.append(time.perf_counter() - started)
        warm.append(program.ran)
        program.ran = True
        run.step, run.samples = number, run.samples + batch.stats.samples
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
        stats.append(batch.stats)
        if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
            raise NonFiniteLossError(
                f"step {number}: loss {losses[-1]}, gradient norm {norms[-1]}."
            )
        logger.info("step %d: loss %.6f, %.3f s", number, losses[-1], seconds[-1])
    devices = run.place.layout.mesh.devices.flatten()
    held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return Measured(
        losses=tuple(losses),
        grad_norms=tuple(norms),
        step_seconds=tuple(seconds),
        timed=tuple(warm) if any(warm) else (True,) * steps,
        audio_seconds=tuple(batch.audio_seconds for batch in stats),
        samples=tuple(batch.samples for batch in stats),
        compile_seconds=compile_seconds,
        peak_bytes=max(
            peak_bytes(program.step.memory_analysis(), devices[0].platform)
            for program in programs.values()
        ),
        device_peak_bytes=max(filter(None, held), default=None),
        device=devices[0].device_kind,
        devices=len(devices),
        dtype=run.compute.dtype,
    )


def _next_batch(run: StageRun, feed: Feed, steps: int) -> GlobalBatch:
    batch = feed.take()
    if batch is None:
        raise DataError(
            f"stage {run.stage.name!r}: its data ends after {run.step} steps, --steps asks for {steps}. "
            f"Give fewer steps, or a larger data.epochs."
        )
    return batch


def main(argv: list[str] | None = None) -> int:
    """Run or plan the trial on standard input, and write what came of it."""
    (result,) = sys.argv[1:] if argv is None else argv
    spec = parse_config(TrialSpec, json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loading threads tokenize already
    try:
        if spec.topology is None:
            outcome = {"measured": to_tree(run_trial(spec))}
        else:
            found = plan(spec.config, topology=spec.topology, mesh=spec.mesh, stage=spec.stage)
            outcome = {"planned": to_tree(found)}
    except Exception as error:
        logger.exception("the trial failed")
        outcome = {"error": f"{type(error).__name__}: {error}"}
    partial = Path(f"{result}.partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.replace(result)
    return 0


def _end_with_the_sweep() -> None:
    """Nobody waits for the result once the other end of the input is closed."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpid(), signal.SIGKILL)  # with the processes that load its data
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
