"""The batches of a stage over all its processes: lanes read here, counts and decisions agreed on everywhere.

The batch of step n does not depend on the number of processes. Each process reads the lanes its devices
hold rows of; a lane that several read is owned by the first of them, which counts and lists it for all.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from llaso_jax.data.batch import Batch, BatchStats
from llaso_jax.sharding.processes import Ballot, Tally, gather_bytes
from llaso_jax.training.ledger import DIGEST_BITS, sample_digest

# What every process hands in for each batch: sums of its own lanes, and whether it was asked to stop.
_SIGNALS = ("SIGTERM", "SIGINT")
_COUNTS = ("samples", "tokens", "answers", "chunks", "tokens_dropped", "chunks_to_encode")
_SECONDS = ("audio_seconds", "seconds_dropped")  # in milliseconds
_LIMB_BITS = 16  # of the digest in one counter: sums over 65,536 processes do not overflow
_LIMBS = DIGEST_BITS // _LIMB_BITS


@dataclasses.dataclass(frozen=True)
class GlobalBatch:
    """One step's data: the lanes that are here, and what is known of all.

    Attributes:
      lanes: those this process's devices hold rows of, by number.
      count: L, all lanes.
      stats: counts over all lanes (epoch: of those here).
      digest: of the samples of all lanes (see `sample_digest`).
    """

    lanes: Mapping[int, Batch]
    count: int
    stats: BatchStats
    digest: int

    @property
    def arrays(self) -> dict[int, dict[str, np.ndarray]]:
        """What `place_lanes` takes."""
        return {lane: batch.arrays for lane, batch in self.lanes.items()}

    @property
    def sample_ids(self) -> tuple[tuple[str, ...], ...]:
        """Of every row that is here."""
        return tuple(row for batch in self.lanes.values() for row in batch.sample_ids)

    def lane_samples(self) -> dict[int, list[str]]:
        """Sample ids of the lanes that are here."""
        return {lane: _ids(batch) for lane, batch in self.lanes.items()}

    def row_samples(self, micro_batch: int, row: int, accumulation: int) -> tuple[str, ...] | None:
        """Sample ids of one row of a micro-batch; None if it is not here."""
        width = len(next(iter(self.lanes.values())).sample_ids) // accumulation
        batch = self.lanes.get(row // width)
        return None if batch is None else batch.sample_ids[micro_batch * width + row % width]


@dataclasses.dataclass(frozen=True)
class _Fetched:
    """A batch read ahead, where its lanes stand after it, and its counters, being summed."""

    lanes: dict[int, Batch]
    positions: dict[int, Any]
    ballot: Ballot


class Feed:
    """Batches in order, read one ahead: its counters are summed while the step before runs."""

    def __init__(
        self,
        lanes: Mapping[int, grain.DatasetIterator],
        *,
        count: int,
        owned: tuple[int, ...],
        empty: Batch,
        tally: Tally,
        requested: Callable[[], str | None],
    ) -> None:
        """Starts where the iterators stand.

        Args:
          lanes: iterators over the lanes that are read here.
          count: L, all lanes.
          owned: those of `lanes` that this process counts for all.
          empty: rows of a lane that ended before others.
          tally: sums counters over all processes.
          requested: name of the signal that has asked this process to stop, if any.
        """
        self._lanes, self._count, self._owned = lanes, count, owned
        self._empty, self._tally, self._requested = empty, tally, requested
        self._sources = len(empty.stats.sources)
        self._positions = self._where()
        self._ahead: _Fetched | None = None

    def take(self) -> GlobalBatch | None:
        """The next batch; None when all lanes of all processes have ended. Call it before the step is dispatched."""
        taken = self._ahead or self._fetch()
        counters = self._tally.read(taken.ballot)
        if not counters[0]:
            return None
        self._positions = taken.positions
        self._ahead = self._fetch()
        stats, digest = self._unpack(counters, taken.lanes)
        return GlobalBatch(taken.lanes, self._count, stats, digest)

    def stop(self) -> str | None:
        """Name of a signal that some process was sent, the same on all; call it once a step is dispatched."""
        if self._tally.alone:
            return self._requested()
        assert self._ahead is not None, "a batch was taken before"
        sent = self._tally.read(self._ahead.ballot)[1 : 1 + len(_SIGNALS)]
        return next((name for name, count in zip(_SIGNALS, sent, strict=True) if count), None)

    def position(self) -> dict[str, Any]:
        """JSON: where the batch after the last taken one starts, by lane. All processes have to call it."""
        ours = {str(lane): self._positions[lane] for lane in self._owned}
        parts = map(json.loads, gather_bytes(json.dumps(ours).encode()))
        return dict(sorted((lane, state) for part in parts for lane, state in part.items()))

    def _where(self) -> dict[int, Any]:
        return {lane: batches.get_state() for lane, batches in self._lanes.items()}

    def _fetch(self) -> _Fetched:
        found = {lane: next(batches, None) for lane, batches in self._lanes.items()}
        lanes = {lane: batch or self._empty for lane, batch in found.items()}
        positions = self._where()
        counters = self._pack(
            [batch for lane in self._owned if (batch := found[lane]) is not None],
            quarantined=sum(positions[lane]["quarantined"] for lane in self._owned),
        )
        return _Fetched(lanes, positions, self._tally.cast(counters))

    def _pack(self, batches: list[Batch], *, quarantined: int) -> np.ndarray:
        digest = sum(sample_digest(_ids(batch)) for batch in batches) % 2**DIGEST_BITS
        limbs = digest.to_bytes(DIGEST_BITS // 8, "little")
        request = self._requested()

        def total(name: str, scale: int = 1) -> int:
            return sum(round(getattr(batch.stats, name) * scale) for batch in batches)

        return np.array(
            [
                len(batches),
                *(request == name for name in _SIGNALS),
                quarantined,
                *(total(name) for name in _COUNTS),
                *(total(name, 1000) for name in _SECONDS),
                *(sum(batch.stats.sources[i] for batch in batches) for i in range(self._sources)),
                *np.frombuffer(limbs, np.uint16),
            ],
            np.uint32,
        )

    def _unpack(self, counters: np.ndarray, here: dict[int, Batch]) -> tuple[BatchStats, int]:
        quarantined, *values = counters[1 + len(_SIGNALS) :].tolist()
        counts, rest = values[: len(_COUNTS)], values[len(_COUNTS) :]
        seconds, rest = rest[: len(_SECONDS)], rest[len(_SECONDS) :]
        sources, limbs = rest[: self._sources], rest[self._sources :]
        assert len(limbs) == _LIMBS
        digest = sum(limb << _LIMB_BITS * i for i, limb in enumerate(limbs)) % 2**DIGEST_BITS
        some = next(iter(here.values())).stats
        stats = BatchStats(
            **dict(zip(_COUNTS, counts, strict=True)),
            **{name: ms / 1000 for name, ms in zip(_SECONDS, seconds, strict=True)},
            quarantined=quarantined,
            token_capacity=some.token_capacity * self._count,
            chunk_capacity=some.chunk_capacity * self._count,
            epoch=max(batch.stats.epoch for batch in here.values()),
            sources=tuple(sources),
        )
        return stats, digest


def _ids(batch: Batch) -> list[str]:
    return [sample_id for row in batch.sample_ids for sample_id in row]
