"""Who the other processes are: flags, SLURM, Open MPI; and what is told where flags do not fit together."""

import json
import time

import jax
import pytest

from llaso_jax.errors import ConfigError, DataError, InterruptedRunError
from llaso_jax.training import peers as peers_module
from llaso_jax.training.launch import ProcessOptions, announced_processes, start_processes
from llaso_jax.training.peers import Peers, beat_seconds, service_seconds, silence_seconds

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
}


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, None),
        (SLURM, 2),
        (OPEN_MPI, 4),
        ({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}, None),
    ],
    ids=["nothing", "srun", "mpirun", "a shell inside an allocation"],
)
def test_the_environment_says_how_many_processes_there_are(environment, count):
    assert announced_processes(environment) == count


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"processes": 2}, "--processes 2 was given without --coordinator and --process-id"),
        ({"coordinator": "a:1", "processes": 2}, "without --process-id"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "give HOST:PORT"),
        ({"coordinator": "a:b", "processes": 2, "process_id": 0}, "give HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "ids go from 0 to 1"),
        ({"coordinator": "a:1", "processes": 2, "process_id": -1}, "ids go from 0 to 1"),
        ({"peer_timeout": 1.0}, "5 s is the least"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        ProcessOptions(**options)


def test_one_process_stays_alone(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("joined other processes")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with start_processes(ProcessOptions(), devices=8) as peers:
        assert peers is None
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with start_processes(ProcessOptions(processes=1), devices=8) as peers:
        assert peers is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with start_processes(ProcessOptions(), devices=8) as peers:
        assert peers is None


def test_a_mesh_that_does_not_divide_among_the_processes_is_refused():
    options = ProcessOptions(coordinator="127.0.0.1:1", processes=3, process_id=0)
    with pytest.raises(ConfigError, match="8 devices, which do not divide among 3 processes"):
        start_processes(options, devices=8)


# --- the watch over the others ---------------------------------------------------------------------


class Store(dict):
    """The coordinator's key-value store, of threads in one process."""

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in list(self.items()) if key.startswith(prefix)]


@pytest.fixture
def ended(monkeypatch):
    """Exit codes with which the process would have ended."""
    codes = []
    monkeypatch.setattr(peers_module, "_end", codes.append)
    return codes


def watch(store, index=0, timeout=20):
    return Peers(store, index=index, count=2, timeout=timeout)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("timeout", [5, 8, 60, 600])
def test_the_watch_is_faster_than_jax_and_both_than_the_time_stated(timeout):
    noticed = silence_seconds(timeout) + 2 * beat_seconds(timeout)
    told = noticed + 2 * beat_seconds(timeout)
    assert told < service_seconds(timeout) < timeout


def test_processes_that_beat_and_end_together_are_left_alone(ended):
    store = Store()
    with watch(store, timeout=4), watch(store, index=1, timeout=4):
        time.sleep(1.5 * silence_seconds(4))
    assert ended == []
    assert [json.loads(value) for value in store.values()] == [{"done": True}] * 2


def test_a_process_that_falls_silent_ends_the_other(ended, capsys):
    store = Store()
    with watch(store, timeout=0.4):
        wait_until(lambda: ended)
    assert ended[0] == 75
    assert "process 1 of 2 is lost: nothing was heard of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("a.wav is empty"), 1, "a.wav is empty"),
        (KeyboardInterrupt(), 75, "it was interrupted"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_an_error_of_one_process_is_told_by_the_other(ended, capsys, error, code, said):
    store = Store()
    with watch(store, timeout=20):
        with pytest.raises(type(error)), watch(store, index=1, timeout=20) as failing:
            raise error
        wait_until(lambda: ended)
    assert ended[0] == code
    assert f"process 0 ends, for process 1: {said}" in capsys.readouterr().err
    failing.end(3)
    assert ended[-1] == 3


def test_an_orderly_stop_is_no_failure(ended):
    store = Store()
    with pytest.raises(InterruptedRunError), watch(store) as peers:
        raise InterruptedRunError("saved")
    peers.end(75)
    assert ended == []
    assert json.loads(store["llaso/peers/0"]) == {"done": True}
