"""Several real processes train as one: same losses, every sample once, and an end in time when one is lost."""

import logging
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from process_setup import Processes, saved_steps, steps_done
from tolerances import LEAF
from training_setup import (
    compilation_cache,
    losses,
    recipe,
    records,
    run,
    write_inputs,
    write_recipe,
)

from llaso_jax.conversion import load_model
from llaso_jax.errors import CheckpointError
from llaso_jax.modeling.functional import flatten
from llaso_jax.training.ledger import read_ledger

pytestmark = pytest.mark.slow

SAMPLES = 60
EPOCHS = 2
LANES = 4
PEER_TIMEOUT = 15
# f32: processes and devices of one process add up a gradient's shards in another order (3e-7 was seen).
SAME = LEAF
logger = logging.getLogger(__name__)


def two_epochs(folder: Path, **changes) -> dict:
    """Four lanes until the data ends: not a multiple of a batch, and not in all lanes at once."""
    data = {"epochs": EPOCHS, "lanes": LANES, "window": 16, "rows": 8}
    stage = {"max_steps": None, "data": data}
    checkpoint = {"every_steps": 2, "keep_latest": 100, "export_hf": False}
    return recipe(folder, stages=(stage,), **{"checkpoint": checkpoint, **changes})


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    with compilation_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, samples=SAMPLES)
    write_recipe(folder, two_epochs(folder))
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Output folder of a run in one process on one device that nothing disturbs."""
    output = tmp_path_factory.mktemp("alone") / "run"
    run(two_epochs(folder), output, mesh="1x1")
    return output


def taken(output: Path) -> list[tuple[int, list[str]]]:
    return [(step, sorted(ids)) for step, ids in read_ledger(output / "ledger" / "align")]


def assert_every_sample_once_per_epoch(output: Path) -> None:
    counts = Counter(i for _, ids in taken(output) for i in ids)
    assert counts == {f"s{i}": EPOCHS for i in range(SAMPLES)}


def assert_same_losses(output: Path, expected: Path) -> None:
    ours, theirs = losses(output), losses(expected)
    assert list(ours) == list(theirs)
    apart = [abs(ours[key] - theirs[key]) / theirs[key] for key in theirs]
    logger.info("losses apart by at most %.1e", max(apart))
    assert max(apart) < SAME


def test_one_process_sees_every_sample_once_per_epoch(alone):
    assert_every_sample_once_per_epoch(alone)
    # Rows are filled up at the end, where lanes end one after the other.
    assert len(losses(alone)) > 7


@pytest.fixture(scope="module")
def broken(folder, tmp_path_factory):
    """Folder of a run of two processes that saved some steps, of which the second was killed; how that went."""
    output = tmp_path_factory.mktemp("broken") / "run"
    with Processes(folder / "tiny.yaml", output, count=2, peer_timeout=PEER_TIMEOUT) as processes:
        processes.wait_for(lambda: steps_done(output) >= 4 and bool(saved_steps(output)))
        processes.processes[1].kill()
        killed = time.monotonic()
        code = processes.processes[0].wait(timeout=4 * PEER_TIMEOUT)
        return output, code, time.monotonic() - killed, processes.said(0)


def test_a_lost_process_ends_the_other_in_time_with_a_message(broken):
    _, code, seconds, said = broken
    logger.info("the other process ended after %.1f s", seconds)
    assert code == 75, said
    assert seconds < PEER_TIMEOUT, said
    assert "process 1 of 2 is lost" in said
    assert "Start the same command again, in all processes, to continue from the last save." in said


@pytest.mark.parametrize("mesh", ["1x1", "8x1"])
def test_one_process_goes_on_from_two_with_the_same_losses_and_samples(
    folder, alone, broken, tmp_path, mesh: str
):
    output = tmp_path / "run"
    shutil.copytree(broken[0], output)
    saved = saved_steps(output)[-1]
    done = len(records(output))
    run(two_epochs(folder), output, mesh=mesh)
    again = records(output)[done:]
    assert [r["step"] for r in again] == list(range(saved + 1, len(losses(alone)) + 1))
    assert_same_losses(output, alone)
    assert taken(output) == taken(alone)
    assert_every_sample_once_per_epoch(output)


def test_a_ledger_that_was_changed_is_refused(folder, broken, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(broken[0], output)
    lane = output / "ledger" / "align" / "2.jsonl"
    lane.write_text(lane.read_text().replace('["s', '["x', 1))
    with pytest.raises(CheckpointError, match="not those the checkpoint was made from"):
        run(two_epochs(folder), output)
    assert lane.read_text(), "nothing is cut before it is checked"


# --- more processes, from other environments -------------------------------------------------------


def slurm(job: int, count: int):
    """What srun sets; the port follows from the job's number."""
    return lambda index: {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


@pytest.mark.parametrize(("count", "mesh"), [(2, "8x1"), (4, "8x1"), (2, "1x4"), (4, "2x4")])
def test_any_number_of_processes_takes_the_same_samples_and_writes_the_same_model(
    folder, alone, tmp_path, count: int, mesh: str
):
    """On 1x4 both processes need the same rows, on 2x4 pairs of them do."""
    output = tmp_path / "run"
    environment = slurm(np.random.default_rng().integers(2**20), count) if count == 4 else None
    with Processes(
        folder / "tiny.yaml", output, count=count, mesh=mesh, environment=environment
    ) as processes:
        assert processes.codes() == [0] * count, processes.said()
    assert taken(output) == taken(alone)
    assert_same_losses(output, alone)
    assert len(records(output)) == len(losses(alone)), "only one process writes metrics"
    ours, theirs = (flatten(load_model(run / "model")[1]) for run in (output, alone))
    for path, leaf in theirs.items():
        assert np.abs(np.asarray(ours[path]) - np.asarray(leaf)).max() < 1e-3, path


def test_a_run_moves_between_one_two_and_four_processes(folder, alone, tmp_path):
    """Stopped and started again elsewhere three times: nothing is lost or taken twice."""
    output = tmp_path / "run"
    stops = ((4, 2), (1, 4), (2, 6))
    assert len(losses(alone)) > stops[-1][1] + 2, "the last stop comes too late to be one"
    for count, stop_after in stops:
        with Processes(folder / "tiny.yaml", output, count=count) as processes:
            processes.wait_for(lambda n=stop_after: steps_done(output) >= n)
            processes.processes[-1].send_signal(signal.SIGTERM)
            assert processes.codes() == [75] * count, processes.said()
    run(two_epochs(folder), output, mesh="8x1")
    assert taken(output) == taken(alone)
    assert_same_losses(output, alone)
    assert len(records(output)) == len(losses(alone)), "a step was done twice"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_one_process_stops_all_at_the_same_step_and_saves(folder, tmp_path, name: str):
    output = tmp_path / "run"
    with Processes(folder / "tiny.yaml", output, count=2) as processes:
        processes.wait_for(lambda: steps_done(output) >= 5)
        processes.processes[1].send_signal(signal.Signals[name])
        assert processes.codes() == [75, 75], processes.said()
        saved = saved_steps(output)[-1]
        assert saved == steps_done(output), "a step was lost"
        assert f"{name}: stage 'align' is saved at step {saved}." in processes.said(0)


def test_the_loss_of_the_first_process_ends_the_others_in_time(folder, tmp_path):
    """JAX's coordinator runs in it: JAX itself ends the others, with its own message and code."""
    output = tmp_path / "run"
    with Processes(folder / "tiny.yaml", output, count=2, peer_timeout=PEER_TIMEOUT) as processes:
        processes.wait_for(lambda: steps_done(output) >= 5)
        processes.processes[0].kill()
        killed = time.monotonic()
        code = processes.processes[1].wait(timeout=4 * PEER_TIMEOUT)
        seconds = time.monotonic() - killed
        logger.info("ended after %.1f s with %d: %s", seconds, code, processes.said(1)[-600:])
        assert seconds < PEER_TIMEOUT
        assert code in (75, -signal.SIGABRT)
        assert "another task died" in processes.said(1) or "is lost" in processes.said(1)


def test_an_error_in_one_process_ends_all_and_is_told_by_all(folder, tmp_path):
    """A recording that only one process reads is damaged."""
    inputs = tmp_path / "inputs"
    shutil.copytree(folder, inputs)
    (inputs / "corpus" / "7.wav").write_bytes(b"")
    tree = two_epochs(inputs)
    write_recipe(inputs, tree)
    output = tmp_path / "run"
    with Processes(inputs / "tiny.yaml", output, count=2, peer_timeout=PEER_TIMEOUT) as processes:
        assert processes.codes() == [1, 1], processes.said()
        for index in (0, 1):
            assert "7.wav holds 0 bytes" in processes.said(index)


def test_two_processes_validate_and_export_what_one_does(folder, tmp_path):
    checkpoint = {"every_steps": 3, "keep_latest": 100, "export_hf": True}
    tree = two_epochs(folder, checkpoint=checkpoint)
    stage = tree["stages"][0]
    stage["max_steps"] = 6
    stage["accumulation"] = 2
    stage["data"]["rows"] = 16
    stage["data"]["eval_json"] = [str(folder / "corpus" / "eval.json")]
    stage["evaluation"] = {"every_steps": 3, "max_new_tokens": 4, "batch_rows": 4}
    one, two = tmp_path / "one", tmp_path / "two"
    run(tree, one, mesh="8x1")
    recipe_file = write_recipe(tmp_path, tree)
    with Processes(recipe_file, two, count=2, mesh="4x2") as processes:
        assert processes.codes() == [0, 0], processes.said()
        assert "Done in" in processes.said(0)
        for what in ("stage align", "Done in", "held-out"):
            assert what not in processes.said(1)
    for expected, actual in zip(records(one, "eval"), records(two, "eval"), strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=SAME)
        assert (actual["step"], actual["wer"]) == (expected["step"], expected["wer"])
    assert taken(one) == taken(two)
    files = [sorted(path.name for path in (place / "hf").iterdir()) for place in (one, two)]
    assert files[0] == files[1]
    from safetensors.numpy import load_file

    ours, theirs = (load_file(place / "hf" / "model.safetensors") for place in (two, one))
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert np.abs(ours[name] - leaf).max() < 1e-3, name
