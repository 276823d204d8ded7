"""Turns the stream of samples into batches; its whole state is a small JSON object.

The state is the next stream position to read and the positions read but not yet packed. A
restored packer reads those again by random access and goes on: the same batches follow.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain

from llaso_jax.data.batch import Batch, make_batch
from llaso_jax.data.config import DataConfig
from llaso_jax.data.encoder_cache import EncoderCache
from llaso_jax.data.mixture import Turns
from llaso_jax.data.packing import BatchShape, first_fit
from llaso_jax.data.quarantine import Quarantine
from llaso_jax.data.samples import BadSample, Sample
from llaso_jax.errors import ConfigError, DataError

Pending = tuple[int, int, Sample]
"""Stream position, mel bucket and sample."""


class SampleStream:
    """Samples in training order, by position: of this lane `start`, `start` + lanes, …

    Args:
        samples: all samples of all epochs in order.
        lane, lanes: which positions are this stream's.
        read: makes a prefetching dataset of a MapDataset.
        samples_per_epoch: length of one pass.
        order: what else the order depends on ("seed 3", …): a state of another order is refused.
        turns: which source of a mixture each sample is of.
        augment: what is made of the sample at a position; None: nothing else.
    """

    def __init__(
        self,
        samples: grain.MapDataset,
        *,
        lane: int,
        lanes: int,
        read: Callable[[grain.MapDataset], grain.IterDataset],
        samples_per_epoch: int,
        order: str,
        turns: Turns | None = None,
        augment: Callable[[Sample, int], Sample] | None = None,
    ) -> None:
        self.samples = samples
        self.lane = lane
        self.lanes = lanes
        self.samples_per_epoch = samples_per_epoch
        self.identity = {
            "order": order,
            "samples_per_epoch": samples_per_epoch,
            "lanes": lanes,
        }
        self.augment = augment
        self._read, self._turns = read, turns

    def count_sources(self, positions: Iterable[int]) -> tuple[int, ...]:
        """How many of the samples at `positions` are of each source of the mixture; () without one."""
        if self._turns is None:
            return ()
        drawn = Counter(self._turns[position][0] for position in positions)
        return tuple(drawn[source] for source in range(self._turns.sources))

    def open(self, start: int) -> grain.DatasetIterator | None:
        """Prefetching iterator over this lane's samples from position `start`; None at the end."""
        if start >= len(self.samples):
            return None
        return iter(self._read(self.samples.slice(slice(start, None, self.lanes))))


class PackedBatches(grain.IterDataset):
    """Grain dataset of `Batch`: reads a stream through a window and packs first-fit.

    Each batch has the mel bucket of the oldest sample in the window, so none waits for ever, and
    takes samples of that bucket in order. The last batches of a stream are filled with empty
    rows: every sample is seen exactly once per epoch.
    """

    def __init__(
        self,
        stream: SampleStream,
        shape: BatchShape,
        config: DataConfig,
        quarantine: Quarantine,
        cache: EncoderCache | None = None,
    ) -> None:
        super().__init__()
        self._args = (stream, shape, config, quarantine, cache)

    def __iter__(self) -> "PackedBatchIterator":
        return PackedBatchIterator(*self._args)

    def __str__(self) -> str:
        return "PackedBatches"


class PackedBatchIterator(grain.DatasetIterator):
    """Iterator of `PackedBatches`, with `get_state` and `set_state` for checkpoints."""

    def __init__(
        self,
        stream: SampleStream,
        shape: BatchShape,
        config: DataConfig,
        quarantine: Quarantine,
        cache: EncoderCache | None = None,
    ) -> None:
        super().__init__()
        self._stream, self._shape, self._config = stream, shape, config
        self._quarantine, self._cache = quarantine, cache
        self._next = stream.lane
        self._window = math.ceil(config.window_samples / stream.lanes)
        self._read = self._quarantined = 0
        self._pending: list[Pending] = []
        self._to_reload: list[int] = []
        self._reader: grain.DatasetIterator | None = None
        self._opened = False

    def __next__(self) -> Batch:
        if not self._opened:
            self._open()
        self._fill_window()
        if not self._pending:
            raise StopIteration
        bucket = self._pending[0][1]
        candidates = [(i, p[2]) for i, p in enumerate(self._pending) if p[1] == bucket]
        rows, placed = first_fit(
            [sample for _, sample in candidates], self._shape, packing=self._config.packing
        )
        taken = {candidates[i][0] for i in placed}
        sources = self._stream.count_sources(self._pending[i][0] for i in taken)
        self._pending = [p for i, p in enumerate(self._pending) if i not in taken]
        return make_batch(
            rows,
            self._shape,
            mel_frames=bucket,
            quarantined=self._quarantined,
            epoch=min(self._next, len(self._stream.samples)) / self._stream.samples_per_epoch,
            cache=self._cache,
            sources=sources,
        )

    def get_state(self) -> dict[str, Any]:
        """JSON: where the next batch continues."""
        return {
            "next": self._next,
            "pending": [p[0] for p in self._pending] or list(self._to_reload),
            "read": self._read,
            "quarantined": self._quarantined,
            **self._stream.identity,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called.

        Raises:
            ConfigError: the state belongs to other data or another order.
        """
        for name, ours in self._stream.identity.items():
            if state[name] != ours:
                raise ConfigError(
                    f"the data position was saved with {name} = {state[name]!r}, this run has "
                    f"{ours!r}: resume with the data and the settings the checkpoint was made with"
                )
        self.close()
        self._closed = False
        self._next, self._pending = state["next"], []
        self._read, self._quarantined = state["read"], state["quarantined"]
        self._to_reload = list(state["pending"])

    def close(self) -> None:
        """Stop loading; worker processes end."""
        self._closed = True
        self._opened = False
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _open(self) -> None:
        self._opened = True
        self._quarantine.rewind(self._next)
        self._reader = self._stream.open(self._next)
        if self._to_reload:
            with ThreadPoolExecutor(self._config.num_threads) as pool:
                items: list[Any] = list(pool.map(self._stream.samples.__getitem__, self._to_reload))
            for position, item in zip(self._to_reload, items, strict=True):
                self._admit(position, item)
            self._to_reload = []

    def _fill_window(self) -> None:
        while self._reader is not None and len(self._pending) < self._window:
            item = next(self._reader, None)
            if item is None:
                self.close()
                self._opened = True
                self._quarantine.judge(quarantined=self._quarantined, read=self._read, at_end=True)
                return
            position, self._next = self._next, self._next + self._stream.lanes
            self._read += 1
            self._admit(position, item)

    def _admit(self, position: int, item: Sample | BadSample) -> None:
        try:
            if isinstance(item, BadSample):
                raise item.error
            bucket = self._shape.bucket(item)
            if self._stream.augment is not None:
                item = self._stream.augment(item, position)
            self._pending.append((position, bucket, item))
        except DataError as error:
            self._quarantine.reject(position, error)
            self._quarantined += 1
            self._quarantine.judge(quarantined=self._quarantined, read=self._read)
