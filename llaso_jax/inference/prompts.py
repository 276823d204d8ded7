"""Batches of prompts as generation reads them: one right-padded prompt per row, few shapes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llaso_jax.data.audio import LoadedAudio
from llaso_jax.data.config import AudioLayout
from llaso_jax.data.features import audio_features
from llaso_jax.data.packing import BatchShape, Row, assemble
from llaso_jax.data.prompt import PromptConfig, Turn, encode_prompt
from llaso_jax.data.samples import Sample, join
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.frames import CHUNK_MEL_FRAMES, projected_frames
from llaso_jax.modeling.speech_lm import SpeechLMConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT_KEYS = ("tokens", "positions", "segment_ids")
AUDIO_KEYS = ("audio_slot", "mel", "mel_frames")
SMALLEST_BUCKET = 64

Prompts = dict[str, np.ndarray]
"""The batch contract's tokens, positions, segment_ids and, with audio, audio_slot, mel, mel_frames."""


def bucket(length: int) -> int:
    """`length` rounded up to a few sizes: four per doubling from 256 on, so at most 25 % is added.

    Example: 1 -> 64, 65 -> 128, 300 -> 320, 1600 -> 1792.
    """
    quantum = max(SMALLEST_BUCKET, (1 << max(length - 1, 1).bit_length()) >> 3)
    return -(-length // quantum) * quantum


def prompts_of(batch: Mapping[str, np.ndarray]) -> Prompts:
    """The entries of `batch` that generation reads, on the host."""
    keys = TEXT_KEYS + (AUDIO_KEYS if "mel" in batch else ())
    missing = [key for key in keys if key not in batch]
    if missing:
        raise ConfigError(
            f"the batch lacks {', '.join(missing)}; generation reads {', '.join(keys)}, as "
            "LLaSOProcessor makes them."
        )
    return {key: np.asarray(batch[key]) for key in keys}


def check_prompts(cfg: SpeechLMConfig, prompts: Prompts) -> None:
    """Raise ConfigError unless each row is one right-padded prompt, or empty, with slots in its audio."""
    segments = prompts["segment_ids"]
    rows, length = segments.shape
    lengths = (segments > 0).sum(-1)
    expected = np.arange(length)[None] < lengths[:, None]
    if not (segments == expected).all():
        raise ConfigError(
            "segment_ids are not those of right-padded prompts, one per row: 1 on the prompt, "
            "then 0 on padding. A packed training batch cannot be generated from."
        )
    if not rows:
        raise ConfigError("the batch has no rows; at least one prompt is needed.")
    if "mel" not in prompts:
        return
    _, chunks, bins, frames = prompts["mel"].shape
    if bins != cfg.audio.num_mel_bins:
        raise ConfigError(
            f"mel has {bins} bins, the encoder {cfg.audio.num_mel_bins}: make the inputs with the "
            "LLaSOProcessor of this model's folder."
        )
    room = chunks * projected_frames(frames, stack=cfg.projector.stack)
    if prompts["audio_slot"].max() >= room:
        raise ConfigError(
            f"audio_slot {prompts['audio_slot'].max()} is past the {room} frames that {chunks} "
            f"chunk(s) of {frames} mel frames become: the inputs were made for another model."
        )


def pad_prompts(prompts: Prompts, *, row_multiple: int = 1) -> Prompts:
    """Lengthen rows to their bucket and add empty rows up to a multiple of `row_multiple`."""
    rows, length = prompts["tokens"].shape
    more_rows = -rows % row_multiple
    more = bucket(length) - length
    fill = {"audio_slot": -1}
    padded = {}
    for key, array in prompts.items():
        columns = more if array.ndim == 2 and key != "mel_frames" else 0
        width = [(0, more_rows), (0, columns), (0, 0), (0, 0)][: array.ndim]
        padded[key] = np.pad(array, width, constant_values=fill.get(key, 0))
    return padded


def layout_of(cfg: SpeechLMConfig) -> AudioLayout:
    """What the model of `cfg` takes of a piece of audio."""
    return AudioLayout(
        mode=cfg.audio_mode, stack=cfg.projector.stack, mel_bins=cfg.audio.num_mel_bins
    )


def prompt_sample(
    turns: Sequence[Turn],
    audios: Sequence[LoadedAudio],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    layout: AudioLayout,
    prompt: PromptConfig,
    sample_id: str = "prompt",
) -> Sample:
    """A conversation that ends with a human turn, as the sample whose answer is to be generated.

    Args:
      turns: one `<audio>` place-holder per audio.
      audios: in the order of their place-holders, of any length: 30 s chunks are made of them.

    Raises:
      PromptError: place-holders that do not match the audios, wrong turns, or too much text.
    """
    encoded = encode_prompt(turns, tokenizer, prompt, audios=len(audios), for_generation=True)
    features = [audio_features(audio, mel_bins=layout.mel_bins) for audio in audios]
    pad_id = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    return join(encoded, features, layout, pad_id=pad_id, sample_id=sample_id)


def collate(samples: Sequence[Sample], *, layout: AudioLayout, rows: int | None = None) -> Prompts:
    """One prompt per row, right-padded; `rows` above their number adds empty rows.

    Chunks are padded to 30 s, in true_length mode to the bucket of the longest.
    """
    longest = max((int(s.mel_frames.max(initial=0)) for s in samples), default=0)
    whole = layout.mode != "true_length"
    frames = CHUNK_MEL_FRAMES if whole else min(bucket(longest), CHUNK_MEL_FRAMES)
    packed = [Row() for _ in range(rows or len(samples))]
    for row, sample in zip(packed, samples, strict=False):
        row.add(sample)
    shape = BatchShape(
        rows=len(packed),
        tokens=bucket(max(row.tokens for row in packed)),
        chunks=max(row.chunks for row in packed),
        answers=max(row.answers for row in packed),
        mel_bins=layout.mel_bins,
        mel_buckets=(frames,),
        stack=layout.stack,
        pad_id=0,
    )
    arrays = assemble(packed, shape, mel_frames=frames)
    return {key: arrays[key] for key in TEXT_KEYS + (AUDIO_KEYS if shape.chunks else ())}
