"""Several processes as one run: who writes, waiting for each other, and numbers summed over all."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def is_first_process() -> bool:
    """Whether this process writes what a run writes once: logs, plots, descriptions."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Return when every process has called this with the same `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather_bytes(data: bytes) -> list[bytes]:
    """`data` of every process, in their order, on every process; all have to call it."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def on_host(array: jax.Array) -> np.ndarray:
    """All of `array`, wherever its shards are, on every process; all have to call it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def row_holders(sharding: NamedSharding, rows: int, parts: int) -> dict[int, tuple[int, ...]]:
    """Which of `parts` equal parts of the rows each process's devices hold some of, by process.

    Args:
      sharding: of arrays [G, rows, ...].
      rows: a multiple of `parts`.
    """
    held: dict[int, set[int]] = {}
    for device, (_, index) in sharding.devices_indices_map((1, rows)).items():
        start, stop, _ = index.indices(rows)
        first, last = start * parts // rows, (stop - 1) * parts // rows
        held.setdefault(device.process_index, set()).update(range(first, last + 1))
    return {process: tuple(sorted(numbers)) for process, numbers in sorted(held.items())}


class Ballot(NamedTuple):
    """Counters handed in, whose sum may still be on its way."""

    counters: np.ndarray | jax.Array


class Tally:
    """Sums counters over all processes with one small program, in the order of the other programs.

    What is cast before a step is dispatched can be read while that step runs: devices never wait for it.
    `alone`: there is no other process, and sums are those of this one.
    """

    def __init__(self, mesh: Mesh) -> None:
        flat = Mesh(mesh.devices.reshape(-1), ("all",))
        self._split, self._whole = NamedSharding(flat, P("all")), NamedSharding(flat, P())
        owners = [device.process_index for device in flat.devices.flat]
        self.alone = len(set(owners)) == 1
        # One of this process's devices brings its numbers, the others zeros.
        self._brings = owners.index(jax.process_index())

    def cast(self, counters: np.ndarray) -> Ballot:
        """Hand in uint32[K]; every process has to, as often as the others."""
        if self.alone:
            return Ballot(counters)
        nothing = np.zeros_like(counters)

        def row(index: Any) -> np.ndarray:
            return (counters if index[0].start == self._brings else nothing)[None]

        shape = (self._split.num_devices, len(counters))
        rows = jax.make_array_from_callback(shape, self._split, row)
        return Ballot(_summed(self._whole)(rows))

    def read(self, ballot: Ballot) -> np.ndarray:
        """uint32[K], the sum of what all processes handed in; waits for it."""
        return np.asarray(ballot.counters)


@functools.lru_cache(maxsize=4)
def _summed(sharding: NamedSharding):
    return jax.jit(lambda rows: rows.sum(0, dtype=jnp.uint32), out_shardings=sharding)
