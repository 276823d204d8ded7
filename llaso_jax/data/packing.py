"""Lay samples out in the fixed-shape rows of a batch: first fit, segments never mixed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llaso_jax.data.config import AudioLayout, DataConfig
from llaso_jax.data.log_mel import pad_mel
from llaso_jax.data.samples import Sample
from llaso_jax.errors import DataError
from llaso_jax.modeling.frames import projected_frames


@dataclass(frozen=True)
class BatchShape:
    """The static sizes of a batch, or of one lane of it, and the id that fills unused positions.

    Attributes:
        rows, tokens, chunks, answers, mel_bins: B, S, C, A, M of the batch contract.
        mel_buckets: the values F takes.
        stack: encoder frames per projected frame.
        pad_id: token id of positions without text.
    """

    rows: int
    tokens: int
    chunks: int
    answers: int
    mel_bins: int
    mel_buckets: tuple[int, ...]
    stack: int
    pad_id: int

    @classmethod
    def of(
        cls, config: DataConfig, layout: AudioLayout, *, pad_id: int, lanes: int = 1
    ) -> "BatchShape":
        """The shape that `config` and the model's `layout` ask for, of one of `lanes` lanes."""
        config.check(layout)
        return cls(
            rows=config.rows // lanes,
            tokens=config.sequence_length,
            chunks=config.chunks_per_row,
            answers=config.answers_per_row,
            mel_bins=layout.mel_bins,
            mel_buckets=config.mel_buckets,
            stack=layout.stack,
            pad_id=pad_id,
        )

    def bucket(self, sample: Sample) -> int:
        """The smallest mel bucket that holds the longest chunk of `sample`.

        Raises:
            DataError: the sample fits no row, naming the setting to raise.
        """
        longest = int(sample.mel_frames.max(initial=0))
        for size, limit, what, setting in (
            (len(sample.tokens), self.tokens, "positions", "sequence_length"),
            (len(sample.mels), self.chunks, "audio chunks", "chunks_per_row"),
            (len(sample.answer_token), self.answers, "supervised tokens", "answers_per_row"),
            (longest, self.mel_buckets[-1], "mel frames in a chunk", "mel_buckets"),
        ):
            if size > limit:
                raise DataError(
                    f"{size} {what} do not fit a row of {limit}: raise `{setting}`, or shorten "
                    "the audio with `max_audio_seconds` and `audio_policy: truncate`",
                    sample_id=sample.sample_id,
                )
        return next(bucket for bucket in self.mel_buckets if bucket >= longest)


@dataclass
class Row:
    """Samples that share a row, and how much of it they take."""

    samples: list[Sample] = field(default_factory=list)
    tokens: int = 0
    chunks: int = 0
    answers: int = 0

    def fits(self, sample: Sample, shape: BatchShape) -> bool:
        """Whether `sample` can join this row."""
        return (
            self.tokens + len(sample.tokens) <= shape.tokens
            and self.chunks + len(sample.mels) <= shape.chunks
            and self.answers + len(sample.answer_token) <= shape.answers
        )

    def add(self, sample: Sample) -> None:
        """Append `sample` as the row's next segment."""
        self.samples.append(sample)
        self.tokens += len(sample.tokens)
        self.chunks += len(sample.mels)
        self.answers += len(sample.answer_token)


def first_fit(
    samples: Sequence[Sample], shape: BatchShape, *, packing: bool = True
) -> tuple[list[Row], list[int]]:
    """Put each sample, in order, into the first row that holds it.

    Returns:
        `shape.rows` rows, some perhaps empty, and the numbers of the samples they hold.
    """
    rows = [Row() for _ in range(shape.rows)]
    placed = []
    for i, sample in enumerate(samples):
        for row in rows:
            if (packing or not row.samples) and row.fits(sample, shape):
                row.add(sample)
                placed.append(i)
                break
    return rows, placed


def assemble(rows: Sequence[Row], shape: BatchShape, *, mel_frames: int) -> dict[str, np.ndarray]:
    """The arrays of the batch contract, chunks padded to F = `mel_frames`.

    Returns:
        tokens, audio_slot, positions, segment_ids int32[B, S]; mel float32[B, C, M, F];
        mel_frames int32[B, C]; answer_index, answer_token int32[B, A].
        audio_slot is chunk * T + frame with T = projected_frames(F), within the row.
    """
    B, S, C, A = len(rows), shape.tokens, shape.chunks, shape.answers
    slots_per_chunk = projected_frames(mel_frames, stack=shape.stack)
    tokens = np.full((B, S), shape.pad_id, np.int32)
    audio_slot = np.full((B, S), -1, np.int32)
    positions = np.zeros((B, S), np.int32)
    segment_ids = np.zeros((B, S), np.int32)
    mel = np.zeros((B, C, shape.mel_bins, mel_frames), np.float32)
    frames = np.zeros((B, C), np.int32)
    answer_index = np.full((B, A), -1, np.int32)
    answer_token = np.full((B, A), shape.pad_id, np.int32)
    for b, row in enumerate(rows):
        start = chunk = answer = 0
        for segment, sample in enumerate(row.samples, 1):
            end = start + len(sample.tokens)
            tokens[b, start:end] = sample.tokens
            positions[b, start:end] = np.arange(end - start)
            segment_ids[b, start:end] = segment
            slots = (chunk + sample.slot_chunk) * slots_per_chunk + sample.slot_frame
            audio_slot[b, start:end] = np.where(sample.slot_chunk < 0, -1, slots)
            supervised = len(sample.answer_token)
            answer_index[b, answer : answer + supervised] = sample.answer_index + start
            answer_token[b, answer : answer + supervised] = sample.answer_token
            for i, features in enumerate(sample.mels):
                pad_mel(features, mel_frames, out=mel[b, chunk + i])
            frames[b, chunk : chunk + len(sample.mels)] = sample.mel_frames
            assert sample.slot_frame.max(initial=-1) < slots_per_chunk, (
                f"sample {sample.sample_id!r}: slot {sample.slot_frame.max()} of a chunk that has "
                f"{slots_per_chunk} frames"
            )
            start, chunk, answer = end, chunk + len(sample.mels), answer + supervised
    return {
        "tokens": tokens,
        "audio_slot": audio_slot,
        "positions": positions,
        "segment_ids": segment_ids,
        "mel": mel,
        "mel_frames": frames,
        "answer_index": answer_index,
        "answer_token": answer_token,
    }
