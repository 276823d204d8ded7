"""Load any audio file or array as 16 kHz mono float32, or say exactly why that is impossible."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile as sf
import soxr

from llaso_jax.data.wav_header import promised_and_present_bytes
from llaso_jax.errors import AudioError
from llaso_jax.modeling.frames import CHUNK_SAMPLES, SAMPLE_RATE

AudioSource = str | Path | np.ndarray
AudioPolicy = Literal["error", "truncate"]
"""What happens to audio past `max_audio_seconds`: a typed error, or a truncation on record."""

BLOCK_FRAMES = 1 << 18  # read at a time: 8 channels of float32 are 8 MB, whatever the file's length


@dataclass(frozen=True)
class LoadedAudio:
    """Audio as the model takes it.

    Attributes:
        samples: float32[n] at 16 kHz, n >= 1, all finite.
        seconds_total: length of the whole source.
        seconds_used: length of `samples`.
        seconds_dropped: what lies past `max_audio_seconds` (0.0 unless truncated).
    """

    samples: np.ndarray
    seconds_total: float
    seconds_used: float
    seconds_dropped: float


def load_audio(
    source: AudioSource,
    *,
    sampling_rate: int | None = None,
    max_seconds: float | None = None,
    policy: AudioPolicy = "error",
) -> LoadedAudio:
    """Read `source` as 16 kHz mono: channels averaged, other rates resampled (soxr HQ).

    No more than `max_seconds` of a file are decoded.

    Args:
        source: path of a wav, flac, mp3, ogg or opus file, or an array: [n], or 2-D with the
            shorter axis as channels; integers are scaled by their type's range.
        sampling_rate: of an array, in Hz; needed there and refused for files.
        max_seconds: longest audio taken, None for no limit.
        policy: `error` or `truncate` for what is longer.

    Raises:
        AudioError: missing, empty, truncated, unreadable, non-finite or too long.
    """
    if isinstance(source, np.ndarray):
        if sampling_rate is None:
            raise AudioError("an array was given without its sampling rate; pass sampling_rate=…")
        return _load_array(source, sampling_rate, max_seconds, policy)
    if sampling_rate is not None:
        raise AudioError(
            f"sampling_rate={sampling_rate} was given for the file {source}; a file states its own"
        )
    return _load_file(Path(source), max_seconds, policy)


def chunk_audio(samples: np.ndarray) -> list[np.ndarray]:
    """Cut float32[n] into consecutive 30 s chunks of exactly 480,000 samples; the last is shorter.

    LLaSO's own code cuts 480,001 (llaso/train/train.py:1007) and so loses one sample per boundary.
    """
    return [samples[i : i + CHUNK_SAMPLES] for i in range(0, len(samples), CHUNK_SAMPLES)]


def _load_array(
    array: np.ndarray, rate: int, max_seconds: float | None, policy: AudioPolicy
) -> LoadedAudio:
    if array.ndim not in (1, 2):
        raise AudioError(f"audio array has shape {array.shape}; [n] or [channels, n] is needed")
    if rate <= 0:
        raise AudioError(f"sampling rate {rate} Hz; a positive number is needed")
    if np.issubdtype(array.dtype, np.integer):
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min or -1)
    elif not np.issubdtype(array.dtype, np.floating):
        raise AudioError(f"audio array has dtype {array.dtype}; floats or integers are needed")
    if array.ndim == 2:
        array = array if array.shape[0] > array.shape[1] else array.T
    keep = _frames_to_read(len(array), rate, max_seconds, policy, "the array")
    return _finish(iter([array[:keep]]), len(array), keep, rate, "the array")


def _load_file(path: Path, max_seconds: float | None, policy: AudioPolicy) -> LoadedAudio:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise AudioError(f"{path} is not a file")
        if size == 0:
            raise AudioError(f"{path} holds 0 bytes; an audio file is needed")
        _refuse_truncated_wav(path)
        with sf.SoundFile(path) as file:
            if not file.frames:
                raise AudioError(f"{path} holds 0 samples; at least one is needed")
            keep = _frames_to_read(file.frames, file.samplerate, max_seconds, policy, str(path))
            return _finish(_blocks(file, keep), file.frames, keep, file.samplerate, str(path))
    except FileNotFoundError as error:
        raise AudioError(
            f"{path} does not exist; check `data_root` and the record's `voice`"
        ) from error
    except sf.LibsndfileError as error:
        raise AudioError(
            f"{path} ({size} bytes) is not readable as audio: {error.error_string} "
            "wav, flac, mp3, ogg or opus is needed"
        ) from error
    except OSError as error:
        raise AudioError(f"{path} cannot be read: {error}") from error


def _refuse_truncated_wav(path: Path) -> None:
    sizes = promised_and_present_bytes(path)
    if sizes and sizes[0] > sizes[1]:
        raise AudioError(
            f"{path} is truncated: its header promises {sizes[0]} bytes of samples, "
            f"{sizes[1]} are there; copy the file again"
        )


def _frames_to_read(
    frames: int, rate: int, max_seconds: float | None, policy: AudioPolicy, name: str
) -> int:
    if max_seconds is None or frames <= max_seconds * rate:
        return frames
    if policy == "error":
        raise AudioError(
            f"{name} is {frames / rate:.1f} s long; `max_audio_seconds` is {max_seconds:g}. "
            "Raise it, or set `audio_policy: truncate` to use the beginning only"
        )
    return math.ceil(max_seconds * rate)


def _blocks(file: sf.SoundFile, frames: int) -> Iterator[np.ndarray]:
    """The first `frames` frames of `file`; a file that ends before them is an error."""
    left = frames
    while left:
        block = file.read(min(BLOCK_FRAMES, left), dtype="float32", always_2d=True)
        if not len(block):
            raise AudioError(
                f"{file.name} is truncated: its header promises {file.frames} samples, "
                f"decoding stopped after {frames - left}; copy the file again"
            )
        left -= len(block)
        yield block


def _finish(
    blocks: Iterator[np.ndarray], frames: int, kept: int, rate: int, name: str
) -> LoadedAudio:
    """Mix down and resample block by block, so that no more than one block is held multi-channel."""
    if not frames:
        raise AudioError(f"{name} holds 0 samples; at least one is needed")
    resampler = (
        None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")
    )
    parts = []
    for block in blocks:
        mono = block if block.ndim == 1 else block.mean(axis=1)
        mono = np.ascontiguousarray(mono, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise AudioError(f"{name} holds NaN or infinite samples; export it again")
        parts.append(mono if resampler is None else resampler.resample_chunk(mono))
    if resampler is not None:
        parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = np.concatenate(parts)
    if kept < frames:
        # ceil() above may keep a part of a sample too much
        samples = samples[: round(kept * SAMPLE_RATE / rate)]
    if not len(samples):
        raise AudioError(f"{name} is {frames} samples at {rate} Hz: less than one at 16 kHz")
    return LoadedAudio(
        samples=samples,
        seconds_total=frames / rate,
        seconds_used=len(samples) / SAMPLE_RATE,
        seconds_dropped=(frames - kept) / rate,
    )
