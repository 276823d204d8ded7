"""Real processes, really killed: `python -m llaso_jax.train` loses at most the steps since its last save."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_setup import (
    compilation_cache,
    inputs_folder,  # noqa: F401 - the fixture `folder`
    losses,
    recipe,
    records,
    run,
    write_recipe,
)

from llaso_jax.conversion import load_model
from llaso_jax.modeling.functional import flatten

STEPS, EVERY = 16, 3
MESH = "2x1"
logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def place(folder):
    """(folder with inputs, compiled programs and recipe; its losses and parameters, undisturbed)."""
    tree = recipe(
        folder,
        stages=({"max_steps": STEPS}, {"max_steps": STEPS, "data": {"seed": 5}}),
        checkpoint={"every_steps": EVERY, "export_hf": False},
    )
    write_recipe(folder, tree)
    with compilation_cache(folder / "compiled", plain=False):
        run(tree, folder / "undisturbed", mesh=MESH)
    expected = losses(folder / "undisturbed")
    assert len(expected) == 2 * STEPS
    return folder, expected, _params(folder / "undisturbed")


def _params(output: Path) -> dict[str, np.ndarray]:
    return {p: np.asarray(leaf) for p, leaf in flatten(load_model(output / "model")[1]).items()}


def _start(folder: Path, output: Path, log: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with log.open("a") as stream:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "llaso_jax.train", "--mesh", MESH),
                *("--config", str(folder / "tiny.yaml"), "--output", str(output)),
            ],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def _saved(output: Path) -> tuple[str, int] | None:
    """Stage and step of the newest whole checkpoint."""
    newest = None
    for stage in ("align", "instruct"):
        folder = output / "checkpoints" / stage
        if folder.is_dir():
            steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]
            newest = (stage, max(steps)) if steps else newest
    return newest


def _done(output: Path) -> int:
    """Steps logged so far, over both stages and all attempts."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _number(mark: tuple[str, int]) -> int:
    """Steps since the start of the run."""
    return mark[1] + (STEPS if mark[0] == "instruct" else 0)


def _kill_when(process: subprocess.Popen, moment, *, seconds: float = 240) -> bool:
    """SIGKILL as soon as `moment()` is true; False if the process ended before."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not moment():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.0005)
    process.kill()
    return process.wait() == -signal.SIGKILL


def _being_written(output: Path) -> bool:
    return any(output.glob("checkpoints/*/*tmp*"))


def _assert_undisturbed(output: Path, place) -> None:
    _, expected, params = place
    assert losses(output) == expected
    actual = _params(output)
    for path, leaf in params.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)


def _finish(place, output: Path, log: Path) -> None:
    process = _start(place[0], output, log)
    assert process.wait(timeout=300) == 0, log.read_text()


def _assert_little_was_lost(output: Path, saved, before: int) -> None:
    """The run went on right after `saved`: what it logged first is the step after it."""
    again = records(output)[before:]
    if again:
        first = _number((again[0]["stage"], again[0]["step"]))
        assert first == (_number(saved) if saved else 0) + 1


@pytest.mark.slow
def test_a_killed_run_continues_from_its_last_save_to_the_same_end(place, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    process = _start(place[0], output, log)
    assert _kill_when(process, lambda: _done(output) >= STEPS + 5), log.read_text()
    done, saved = _done(output), _saved(output)
    # A save under way when the process died may be lost too, one period more.
    assert saved is not None
    assert 0 <= done - _number(saved) <= 2 * EVERY
    _finish(place, output, log)
    _assert_little_was_lost(output, saved, done)
    _assert_undisturbed(output, place)


@pytest.mark.slow
def test_kills_at_random_moments_and_during_saves_do_no_harm(place, tmp_path):
    """Start-up, between steps, while a checkpoint is written, while results are written."""
    output, log = tmp_path / "run", tmp_path / "log"
    choice = random.Random(0)
    story, in_saves = [], 0
    for attempt in range(10):
        before, saved = _done(output), _saved(output)
        process = _start(place[0], output, log)
        if attempt % 3 == 2:
            what, delay = "after a time", choice.uniform(1, 12)
            end = time.monotonic() + delay
            killed = _kill_when(process, lambda end=end: time.monotonic() > end)
        else:
            what = "during a save"
            wanted = before + choice.randint(2, 10)
            killed = _kill_when(
                process, lambda n=wanted: _done(output) >= n and _being_written(output)
            )
        torn = sorted(p.name for p in output.glob("checkpoints/*/*tmp*"))
        in_saves += bool(torn)
        _assert_little_was_lost(output, saved, before)
        line = (
            f"kill {attempt + 1} ({what}): began after {saved}, logged {_done(output) - before} "
            f"steps, newest save now {_saved(output)}, left unfinished {torn or 'nothing'}"
        )
        story.append(line)
        logger.info(line)
        if not killed:
            break
    assert in_saves >= 2, "\n".join(story)
    before, saved = _done(output), _saved(output)
    _finish(place, output, log)
    _assert_little_was_lost(output, saved, before)
    _assert_undisturbed(output, place)
    logger.info("%s", log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_from_outside_saves_and_ends_with_the_code_to_try_again(
    place, tmp_path, name: str
):
    output, log = tmp_path / "run", tmp_path / "log"
    process = _start(place[0], output, log)
    while _done(output) < 4:
        assert process.poll() is None, log.read_text()
        time.sleep(0.001)
    process.send_signal(signal.Signals[name])
    assert process.wait(timeout=120) == 75, log.read_text()
    saved, done = _saved(output), _done(output)
    assert saved is not None
    assert _number(saved) == done, "a step was lost"
    text = " ".join(log.read_text().split())
    assert f"stage '{saved[0]}' is saved at step {saved[1]}. Run the same command again" in text
    _finish(place, output, log)
    _assert_little_was_lost(output, saved, done)
    assert len(records(output)) == 2 * STEPS, "a step was done twice"
    _assert_undisturbed(output, place)
    shutil.rmtree(output)
