"""`LLaSOProcessor`: audio and text to what `LLaSOModel.generate` reads, and token ids back to text."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llaso_jax.data.audio import AudioPolicy, AudioSource, LoadedAudio, load_audio
from llaso_jax.data.config import AudioLayout
from llaso_jax.data.pauses import split_at_pauses
from llaso_jax.data.prompt import AUDIO_PLACEHOLDER, PURE_AUDIO_TEXT, PromptConfig, Turn
from llaso_jax.data.samples import Sample
from llaso_jax.data.tokenizer import eos_token_ids, load_tokenizer
from llaso_jax.errors import AudioError, ConfigError
from llaso_jax.inference.pretrained import (
    find_model,
    load_prompt_config,
    read_config,
    save_prompt_config,
)
from llaso_jax.inference.prompts import collate, layout_of, prompt_sample
from llaso_jax.modeling.frames import CHUNK_SECONDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

MAX_AUDIO_SECONDS = 20.0 * CHUNK_SECONDS  # the most LLaSO was trained on: 20 chunks a file

Audios = AudioSource | Sequence[AudioSource | Sequence[AudioSource]]


class LLaSOProcessor:
    """Makes prompts of audio and text.

    A list is always a batch: `audio=[a, b]` are two samples, `audio=[[a, b]]` is one sample of two
    audios. `text` is one for all samples or a list with one for each.

        processor = LLaSOProcessor.from_pretrained(folder)
        inputs = processor(audio="question.wav", text="Transcribe the audio.")

    Args:
      tokenizer: with LLaSO's tokens (`llaso_jax.data.tokenizer.load_tokenizer`).
      layout: what the model takes of a piece of audio.
      prompt: chat format and system prompt the model was trained with; LLaSO's by default.
      max_audio_seconds: longest audio taken, None for any length.
      audio_policy: longer audio is an `error`, or its beginning is used (`truncate`) and the rest
        reported.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        layout: AudioLayout,
        prompt: PromptConfig | None = None,
        max_audio_seconds: float | None = MAX_AUDIO_SECONDS,
        audio_policy: AudioPolicy = "error",
    ) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.prompt = prompt or PromptConfig()
        self.max_audio_seconds = max_audio_seconds
        self.audio_policy: AudioPolicy = audio_policy

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        max_audio_seconds: float | None = MAX_AUDIO_SECONDS,
        audio_policy: AudioPolicy = "error",
    ) -> "LLaSOProcessor":
        """The processor of the model in `folder`.

        Raises:
          CheckpointError, ConversionError: no model there.
          ConfigError: no tokenizer there.
        """
        folder = find_model(folder)
        return cls(
            load_tokenizer(folder),
            layout=layout_of(read_config(folder)),
            prompt=load_prompt_config(folder),
            max_audio_seconds=max_audio_seconds,
            audio_policy=audio_policy,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer and prompt beside a model (`LLaSOModel.save_pretrained` first)."""
        self.tokenizer.save_pretrained(folder)
        save_prompt_config(folder, self.prompt)

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """Every id that ends an answer."""
        return eos_token_ids(self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """Id behind the end of an answer."""
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def __call__(
        self,
        audio: Audios | None = None,
        text: str | Sequence[str | None] | None = None,
        *,
        sampling_rate: int | None = None,
        audio_first: bool = False,
    ) -> dict[str, np.ndarray]:
        """Prompts as arrays, one per row.

        Args:
          audio: path or array, a list of them, or a list of lists (several audios per sample).
          text: instruction or question; `<audio>` in it marks each audio's place, otherwise audios
            come after the text. None: "Please listen to the audio and answer the question."
          sampling_rate: of arrays, in Hz; files state their own.
          audio_first: put audios before the text instead.

        Returns:
          tokens, positions, segment_ids i32[B, S]; with audio also audio_slot i32[B, S],
          mel f32[B, C, M, F], mel_frames i32[B, C]; and for the record audio_seconds,
          audio_seconds_dropped f32[B], what of each sample's audio is used and what is not.

        Raises:
          AudioError: audio that cannot be used, or is longer than `max_audio_seconds`.
          PromptError: place-holders that do not match the audios, or too much text.
          ConfigError: arguments that do not go together.
        """
        samples = self.samples(audio, text, sampling_rate=sampling_rate, audio_first=audio_first)
        return {
            **collate(samples, layout=self.layout),
            "audio_seconds": np.array([s.audio_seconds for s in samples], np.float32),
            "audio_seconds_dropped": np.array([s.seconds_dropped for s in samples], np.float32),
        }

    def samples(
        self,
        audio: Audios | None = None,
        text: str | Sequence[str | None] | None = None,
        *,
        sampling_rate: int | None = None,
        audio_first: bool = False,
    ) -> list[Sample]:
        """The same prompts before they are batched, for `llaso_jax.inference.batched`."""
        questions = self.questions(
            audio, text, sampling_rate=sampling_rate, audio_first=audio_first
        )
        return [sample for (sample,) in questions]

    def questions(
        self,
        audio: Audios | None = None,
        text: str | Sequence[str | None] | None = None,
        *,
        sampling_rate: int | None = None,
        audio_first: bool = False,
        part_seconds: float | None = None,
    ) -> list[list[Sample]]:
        """The same for `llaso_jax.inference.answers`, a list of prompts for each sample.

        Args:
          part_seconds: longer recordings are cut at pauses into parts of at most so many seconds, and each part gets
            a prompt of its own. None: recordings stay whole.

        Raises:
          ConfigError: also parts of less than a second, or of samples with several audios.
        """
        questions = []
        for number, (sources, words) in enumerate(_pair(audio, text)):
            audios = [self._load(source, sampling_rate) for source in sources]
            turn = Turn("human", _place(words, len(audios), audio_first))
            prompts = self.prompts([turn], audios, part_seconds=part_seconds, sample_id=str(number))
            if dropped := sum(sample.seconds_dropped for sample in prompts):
                logger.warning(
                    "sample %d: %.1f s of audio are past max_audio_seconds=%g and not used",
                    *(number, dropped, self.max_audio_seconds),
                )
            questions.append(prompts)
        return questions

    def prompts(
        self,
        turns: Sequence[Turn],
        audios: Sequence[LoadedAudio],
        *,
        part_seconds: float | None = None,
        sample_id: str = "prompt",
    ) -> list[Sample]:
        """The prompt of a conversation, or one for every part of its recording; see `questions`."""
        heard: list[Sequence[LoadedAudio]] = [audios]
        if part_seconds is not None and audios:
            if len(audios) > 1:
                raise ConfigError(
                    f"{sample_id} has {len(audios)} audios and part_seconds={part_seconds:g}: only one recording "
                    "can be asked about in parts."
                )
            heard = [[part] for part in split_at_pauses(audios[0], part_seconds)]
        return [
            prompt_sample(
                turns,
                some,
                self.tokenizer,
                layout=self.layout,
                prompt=self.prompt,
                sample_id=sample_id,
            )
            for some in heard
        ]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """Text of one row of token ids."""
        flat = [int(i) for i in np.asarray(ids).reshape(-1)]
        return str(self.tokenizer.decode(flat, skip_special_tokens=skip_special_tokens))

    def batch_decode(
        self, rows: Sequence[Sequence[int]] | np.ndarray, *, skip_special_tokens: bool = True
    ) -> list[str]:
        """Text of every row of token ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def _load(self, source: AudioSource, sampling_rate: int | None) -> LoadedAudio:
        if isinstance(source, str | Path):
            return self._limited(source, None)
        if isinstance(source, np.ndarray) or hasattr(source, "__array__"):
            return self._limited(np.asarray(source), sampling_rate)
        raise AudioError(
            f"audio of type {type(source).__name__} was given; a path or an array is needed. A list "
            "is a batch of samples, a list of lists a batch of samples with several audios each."
        )

    def _limited(self, source: AudioSource, sampling_rate: int | None) -> LoadedAudio:
        return load_audio(
            source,
            sampling_rate=sampling_rate,
            max_seconds=self.max_audio_seconds,
            policy=self.audio_policy,
        )


def _pair(audio: Any, text: Any) -> list[tuple[list[Any], str]]:
    """(audios, text) of every sample."""
    if audio is None and text is None:
        raise ConfigError("neither audio nor text was given; at least one is needed.")
    audios = list(audio) if isinstance(audio, list | tuple) else [audio]
    texts = list(text) if isinstance(text, list | tuple) else [text] * len(audios)
    if audio is None:
        audios = [None] * len(texts)
    if not texts or len(audios) != len(texts):
        raise ConfigError(
            f"{len(audios)} audio samples and {len(texts)} texts were given; one text for each, or "
            "one for all, is needed. For several audios in one sample, nest them: audio=[[a, b]]."
        )
    return [
        (_one_or_several(sources), PURE_AUDIO_TEXT if words is None else words)
        for sources, words in zip(audios, texts, strict=True)
    ]


def _one_or_several(sources: Any) -> list[Any]:
    if sources is None:
        return []
    return list(sources) if isinstance(sources, list | tuple) else [sources]


def _place(text: str, audios: int, audio_first: bool) -> str:
    """`text` with a place-holder for each of its audios."""
    if AUDIO_PLACEHOLDER in text:
        if audio_first:
            raise ConfigError(
                f"audio_first was given, and {AUDIO_PLACEHOLDER} in the text says where audio goes: "
                "leave one of them out."
            )
        return text
    placeholders = AUDIO_PLACEHOLDER * audios
    return placeholders + text if audio_first else text + placeholders
