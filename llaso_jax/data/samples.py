"""One record becomes one sample: tokens with audio spliced in, answers, log-mel chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from llaso_jax.data.audio import AudioPolicy
from llaso_jax.data.config import AudioLayout
from llaso_jax.data.features import AudioFeatures, FeatureReader
from llaso_jax.data.prompt import (
    AUDIO_ID,
    EncodedPrompt,
    PromptConfig,
    check_tokenizer,
    encode_prompt,
)
from llaso_jax.data.records import Record, RecordSource
from llaso_jax.errors import DataError
from llaso_jax.modeling.frames import audio_slots, projected_frames

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Sample:
    """A training sample before packing; s positions, n supervised tokens, c audio chunks.

    Attributes:
        sample_id: for logs and error messages.
        tokens: int32[s], pad id at audio positions.
        slot_chunk: int32[s], which chunk a position shows; -1 for text.
        slot_frame: int32[s], which projected frame of it; -1 for text.
        answer_index: int32[n], positions whose NEXT token is supervised.
        answer_token: int32[n], those tokens.
        mels: c times float32[M, touched frames]: complete with `pad_mel`.
        mel_frames: int32[c], valid mel frames.
        audio_seconds: audio used.
        seconds_dropped: audio past `max_audio_seconds`.
        tokens_dropped: text past `model_max_length`.
        task: of its record's metadata, if it names one.
        may_be_masked: False where the metadata say `"spec_augment": false`.
    """

    sample_id: str
    tokens: np.ndarray
    slot_chunk: np.ndarray
    slot_frame: np.ndarray
    answer_index: np.ndarray
    answer_token: np.ndarray
    mels: tuple[np.ndarray, ...]
    mel_frames: np.ndarray
    audio_seconds: float
    seconds_dropped: float
    tokens_dropped: int
    task: str | None = None
    may_be_masked: bool = True

    def prompt(self) -> "Sample":
        """What generation starts from: everything before the last answer, nothing supervised."""
        gaps = np.flatnonzero(np.diff(self.answer_index) > 1)
        first = self.answer_index[gaps[-1] + 1 if len(gaps) else 0]
        end = int(first) + 1
        return replace(
            self,
            tokens=self.tokens[:end],
            slot_chunk=self.slot_chunk[:end],
            slot_frame=self.slot_frame[:end],
            answer_index=self.answer_index[:0],
            answer_token=self.answer_token[:0],
        )


@dataclass(frozen=True)
class BadSample:
    """A record that could not become a sample, on its way from a worker to the packer."""

    error: DataError


class SampleLoader:
    """Makes samples of records; can be pickled to worker processes.

    Raises:
        ConfigError: the tokenizer lacks what `prompt` needs.

    Raises (from `load`):
        DataError: AudioError, PromptError, … with the sample's id and position.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        prompt: PromptConfig,
        layout: AudioLayout,
        max_audio_seconds: float | None = None,
        audio_policy: AudioPolicy = "error",
        feature_cache_mb: int = 0,
    ) -> None:
        check_tokenizer(tokenizer, prompt)
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._layout = layout
        self._features = FeatureReader(
            mel_bins=layout.mel_bins,
            max_audio_seconds=max_audio_seconds,
            audio_policy=audio_policy,
            cache_bytes=feature_cache_mb * 1_000_000,
        )
        self.pad_id = int(tokenizer.pad_token_id)  # type: ignore[arg-type]

    def load(self, record: Record) -> Sample:
        """Tokenize the conversation, read the audio and join them."""
        try:
            prompt = encode_prompt(
                record.turns, self._tokenizer, self._prompt, audios=len(record.voices)
            )
            audios = self._features.read(record.voices)
        except DataError as error:
            raise error.located(sample_id=record.sample_id, position=record.position)  # noqa: B904
        sample = join(prompt, audios, self._layout, pad_id=self.pad_id, sample_id=record.sample_id)
        return replace(
            sample,
            task=record.metadata.get("task"),
            may_be_masked=record.metadata.get("spec_augment") is not False,
        )


class SampleSource:
    """Grain random-access source of `Sample`, or `BadSample` where a record cannot become one."""

    def __init__(self, records: RecordSource, loader: SampleLoader) -> None:
        self._records = records
        self._loader = loader

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"SampleSource({self._records!r})"

    def __getitem__(self, index: int) -> Sample | BadSample:
        try:
            return self._loader.load(self._records[index])
        except DataError as error:
            return BadSample(error.with_traceback(None))


def join(
    prompt: EncodedPrompt,
    audios: Sequence[AudioFeatures],
    layout: AudioLayout,
    *,
    pad_id: int,
    sample_id: str,
) -> Sample:
    """The sample of a tokenized conversation and its audios, one for each place-holder."""
    tokens, slot_chunk, slot_frame, supervised = splice(
        prompt, [audio.mel_frames for audio in audios], layout, pad_id=pad_id
    )
    answers = np.flatnonzero(supervised).astype(np.int32)
    return Sample(
        sample_id=sample_id,
        tokens=tokens,
        slot_chunk=slot_chunk,
        slot_frame=slot_frame,
        answer_index=answers - 1,
        answer_token=tokens[answers],
        mels=tuple(mel for audio in audios for mel in audio.mels),
        mel_frames=np.array([n for audio in audios for n in audio.mel_frames], np.int32),
        audio_seconds=sum(audio.seconds_used for audio in audios),
        seconds_dropped=sum(audio.seconds_dropped for audio in audios),
        tokens_dropped=prompt.tokens_dropped,
    )


def splice(
    prompt: EncodedPrompt,
    chunk_frames: Sequence[Sequence[int]],
    layout: AudioLayout,
    *,
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Replace each audio place-holder by the slots of that audio's chunks, in order.

    Args:
        prompt: with one place-holder per audio.
        chunk_frames: for each audio, the valid mel frames of each of its chunks.

    Returns:
        tokens int32[s], slot_chunk int32[s], slot_frame int32[s], supervised bool[s].
    """
    places = np.flatnonzero(prompt.token_ids == AUDIO_ID)
    assert len(places) == len(chunk_frames), "encode_prompt checks place-holders against audios"
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add_text(start: int, end: int) -> None:
        none = np.full(end - start, -1, np.int32)
        parts.append((prompt.token_ids[start:end], none, none, prompt.supervised[start:end]))

    start, chunk = 0, 0
    for place, frames in zip(places.tolist(), chunk_frames, strict=True):
        add_text(start, place)
        start = place + 1
        for valid in frames:
            slots = audio_slots(valid, mode=layout.mode, stack=layout.stack)
            if layout.mode != "padded":
                assert slots == projected_frames(valid, stack=layout.stack), "slots != frames"
            parts.append(
                (
                    np.full(slots, pad_id, np.int32),
                    np.full(slots, chunk, np.int32),
                    np.arange(slots, dtype=np.int32),
                    np.zeros(slots, bool),
                )
            )
            chunk += 1
    add_text(start, len(prompt.token_ids))
    tokens, slot_chunk, slot_frame, supervised = (
        np.concatenate(x) for x in zip(*parts, strict=True)
    )
    return tokens, slot_chunk, slot_frame, supervised
