"""What the pipeline yields: the arrays the step takes, and what only people and logs need."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llaso_jax.data.encoder_cache import EncoderCache
from llaso_jax.data.packing import BatchShape, Row, assemble


@dataclass(frozen=True)
class BatchStats:
    """Counts of one batch, or of one lane of it.

    Attributes:
        samples: samples in it.
        tokens: positions in use, audio included, of `token_capacity` = B * S.
        answers: supervised tokens.
        chunks: audio chunks in use, of `chunk_capacity` = B * C.
        audio_seconds: real audio.
        seconds_dropped: audio cut off by `max_audio_seconds`.
        tokens_dropped: text cut off by `model_max_length`.
        quarantined: bad samples so far, over the whole run.
        epoch: share of the data read so far: 1.5 is half-way through the second pass.
        chunks_to_encode: chunks in use whose features were looked for in an encoder cache and not found.
        sources: samples of each source of the mixture; () without one.
    """

    samples: int
    tokens: int
    token_capacity: int
    answers: int
    chunks: int
    chunk_capacity: int
    audio_seconds: float
    seconds_dropped: float
    tokens_dropped: int
    quarantined: int
    epoch: float
    chunks_to_encode: int = 0
    sources: tuple[int, ...] = ()

    @property
    def padding(self) -> float:
        """Share of token positions that hold nothing."""
        return 1 - self.tokens / self.token_capacity


@dataclass(frozen=True)
class Batch:
    """One step's data, or one lane of it.

    Attributes:
        arrays: exactly the batch contract (see `packing.assemble`); with an encoder cache also
            `features` [B, C, T, D] and `known` bool[B, C], which of them are there.
        sample_ids: of each row, in segment order.
        stats: counts for progress and logs.
        missing: (row, chunk) -> name in the encoder cache, where features are not there.
    """

    arrays: dict[str, np.ndarray]
    sample_ids: tuple[tuple[str, ...], ...]
    stats: BatchStats
    missing: Mapping[tuple[int, int], str] = field(default_factory=dict)


def make_batch(
    rows: Sequence[Row],
    shape: BatchShape,
    *,
    mel_frames: int,
    quarantined: int = 0,
    epoch: float = 0.0,
    cache: EncoderCache | None = None,
    sources: tuple[int, ...] = (),
) -> Batch:
    """Assemble `rows` and count what is in them; features of their audio are looked for in `cache`."""
    samples = [sample for row in rows for sample in row.samples]
    arrays = assemble(rows, shape, mel_frames=mel_frames)
    missing: Mapping[tuple[int, int], str] = {}
    if cache is not None:
        arrays["features"], missing = cache.look_up(rows, shape, mel_frames=mel_frames)
        arrays["known"] = np.ones(arrays["mel_frames"].shape, bool)
        for place in missing:
            arrays["known"][place] = False
    return Batch(
        arrays=arrays,
        sample_ids=tuple(tuple(s.sample_id for s in row.samples) for row in rows),
        stats=BatchStats(
            samples=len(samples),
            tokens=sum(row.tokens for row in rows),
            token_capacity=shape.rows * shape.tokens,
            answers=sum(row.answers for row in rows),
            chunks=sum(row.chunks for row in rows),
            chunk_capacity=shape.rows * shape.chunks,
            audio_seconds=sum(s.audio_seconds for s in samples),
            seconds_dropped=sum(s.seconds_dropped for s in samples),
            tokens_dropped=sum(s.tokens_dropped for s in samples),
            quarantined=quarantined,
            epoch=epoch,
            chunks_to_encode=len(missing),
            sources=sources,
        ),
        missing=missing,
    )


def empty_batch(shape: BatchShape, *, cache: EncoderCache | None = None, sources: int = 0) -> Batch:
    """A batch of padding only, for a lane whose data ends before the others'; `sources`: of the mixture."""
    rows = [Row() for _ in range(shape.rows)]
    none = (0,) * sources
    return make_batch(rows, shape, mel_frames=shape.mel_buckets[-1], cache=cache, sources=none)


@dataclass
class PipelineStats:
    """Running totals over batches, for progress bars and reports."""

    samples: int = 0
    tokens: int = 0
    token_capacity: int = 0
    answers: int = 0
    audio_seconds: float = 0.0
    seconds_dropped: float = 0.0
    tokens_dropped: int = 0
    quarantined: int = 0
    epoch: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def add(self, stats: BatchStats) -> None:
        """Count one more batch."""
        for name in ("samples", "tokens", "token_capacity", "answers", "audio_seconds"):
            setattr(self, name, getattr(self, name) + getattr(stats, name))
        self.seconds_dropped += stats.seconds_dropped
        self.tokens_dropped += stats.tokens_dropped
        self.quarantined, self.epoch = stats.quarantined, stats.epoch

    @property
    def padding(self) -> float:
        """Share of all token positions so far that held nothing."""
        return 1 - self.tokens / self.token_capacity if self.token_capacity else 0.0

    @property
    def samples_per_second(self) -> float:
        """Since this object was made."""
        return self.samples / max(time.monotonic() - self.started, 1e-9)

    @property
    def audio_seconds_per_second(self) -> float:
        """Seconds of real audio per second since this object was made."""
        return self.audio_seconds / max(time.monotonic() - self.started, 1e-9)
