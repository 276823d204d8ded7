"""Tries the points of a sweep one after the other and keeps what came of each.

<output>/sweep.json      what all points share; a sweep goes on only where it is the same
<output>/trials.jsonl    one line for every point that was tried, measured or failed
<output>/logs/           what each trial said
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llaso_jax.ablation.grid import Point
from llaso_jax.ablation.trial import Measured, TrialSpec
from llaso_jax.config import RunConfig, parse_config, to_tree
from llaso_jax.errors import CheckpointError, ConfigError, LlasoError
from llaso_jax.json_lines import drop_torn_line
from llaso_jax.planning.plan import Plan
from llaso_jax.planning.plans import check_plan
from llaso_jax.sharding.rules import ShardingError
from llaso_jax.training.run import differences

TRIAL = (sys.executable, "-m", "llaso_jax.ablation.trial")
SETTINGS, TRIALS, LOGS = "sweep.json", "trials.jsonl", "logs"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What all points share.

    Attributes:
      config: the recipe that points change.
      stage: the stage whose steps are measured.
      steps: optimizer steps of every trial.
    """

    config: RunConfig
    stage: int
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ConfigError(
                f"--steps {self.steps}: at least 2 are needed, the first is not timed."
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a point: measurements, a plan, or the error it ended with."""

    point: Point
    measured: Measured | None = None
    planned: Plan | None = None
    error: str | None = None


def run_sweep(
    sweep: Sweep,
    points: list[Point],
    output: Path,
    *,
    overwrite: bool = False,
    retry: bool = False,
    timeout: float | None = None,
) -> Iterator[Row]:
    """Every point's row, in order, as soon as it is there.

    Points that a sweep in `output` has tried already are not tried again. A point that fails, for whatever reason, is
    a row with its error.

    Args:
      output: folder of the sweep.
      overwrite: delete an earlier sweep there.
      retry: try failed points again.
      timeout: seconds after which a trial has failed; None for no limit.

    Raises:
      CheckpointError: `output` holds something else, or a sweep of other settings.
    """
    _prepare(sweep, output, overwrite=overwrite)
    path = output / TRIALS
    drop_torn_line(path)
    done = {row.point: row for row in read_rows(path)}
    number = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
    for point in points:
        row = done.get(point)
        if row is None or (retry and row.error is not None):
            number += 1
            row = _try(sweep, point, output / LOGS / f"{number:03d}", timeout)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(to_tree(row)) + "\n")
        yield row


def read_rows(path: Path) -> list[Row]:
    """Rows of a trials.jsonl, the newest of every point."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [parse_config(Row, json.loads(line)) for line in lines]
    return list({row.point: row for row in rows}.values())


def _try(sweep: Sweep, point: Point, place: Path, timeout: float | None) -> Row:
    try:
        cfg = point.config(sweep.config)
        check_plan(cfg, point.mesh, stage=sweep.stage)
    except (LlasoError, ShardingError) as error:
        return Row(point, error=f"{type(error).__name__}: {error}")
    spec = TrialSpec(cfg, point.mesh, sweep.stage, sweep.steps, point.topology)
    place.parent.mkdir(exist_ok=True)
    result, log = place.with_suffix(".json"), place.with_suffix(".log")
    result.unlink(missing_ok=True)  # of a sweep killed right after this trial
    told = _run_process(json.dumps(to_tree(spec)), result, log, timeout)
    if not result.is_file():
        return Row(point, error=f"{told}; {LOGS}/{log.name} is what it said.")
    outcome = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    return parse_config(Row, {"point": to_tree(point), **outcome})


def _run_process(spec: str, result: Path, log: Path, timeout: float | None) -> str:
    """Run a trial to its end; how it ended, in words."""
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*TRIAL, str(result)],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it died already: its end tells
            process.stdin.write(spec + "\n")
            process.stdin.flush()
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"not done after {time.monotonic() - started:.0f} s (--timeout)"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that load its data
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {code}"


def _prepare(sweep: Sweep, output: Path, *, overwrite: bool) -> None:
    """Make the folder, or check that the sweep in it is this one. Only sweeps are ever overwritten."""
    settings, partial = output / SETTINGS, output / f".{SETTINGS}.partial"
    now = {**to_tree(sweep), "jax": jax.__version__}
    earlier = _settings(settings)
    if earlier is None:
        if output.is_dir() and any(path != partial for path in output.iterdir()):
            raise CheckpointError(
                f"{output} is not empty and holds no sweep ({SETTINGS}): choose another --output."
            )
    elif overwrite:
        shutil.rmtree(output)
    elif found := differences(earlier, now, free=()):
        raise CheckpointError(
            f"{output} holds a sweep of other settings ({'; '.join(found[:5])}): what was measured there cannot "
            f"stand beside this. Choose another --output, or pass --overwrite to start over."
        )
    output.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(now, indent=1), encoding="utf-8")
    partial.replace(settings)  # a kill leaves the whole file or none


def _settings(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and {"config", "stage", "steps"} <= set(tree) else None
