"""Log-mel features of whole recordings, and a memory of those read last."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llaso_jax.data.audio import AudioPolicy, LoadedAudio, chunk_audio, load_audio
from llaso_jax.data.log_mel import log_mel, mel_frames


@dataclass(frozen=True)
class AudioFeatures:
    """One recording as the encoder takes it, cut into 30 s chunks.

    Attributes:
        mels: of each chunk float32[M, touched frames]: complete with `pad_mel`.
        mel_frames: valid mel frames of each chunk.
        seconds_used: audio in `mels`.
        seconds_dropped: audio past `max_audio_seconds`.
    """

    mels: tuple[np.ndarray, ...]
    mel_frames: tuple[int, ...]
    seconds_used: float
    seconds_dropped: float

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(mel.nbytes for mel in self.mels)


def audio_features(audio: LoadedAudio, *, mel_bins: int) -> AudioFeatures:
    """Log-mel features of a loaded recording of any length."""
    chunks = chunk_audio(audio.samples)
    return AudioFeatures(
        mels=tuple(log_mel(chunk, mel_bins=mel_bins) for chunk in chunks),
        mel_frames=tuple(mel_frames(len(chunk)) for chunk in chunks),
        seconds_used=audio.seconds_used,
        seconds_dropped=audio.seconds_dropped,
    )


class FeatureReader:
    """Reads recordings as features; keeps those used last, up to `cache_bytes` of them.

    Decoding and features are most of what a short clip costs (3.5 of 4.7 ms for 1 s of Opus), and
    a small corpus is read many times over. Files must not change while they are kept. Safe in
    threads; a copy pickled to another process starts empty.
    """

    def __init__(
        self,
        *,
        mel_bins: int,
        max_audio_seconds: float | None = None,
        audio_policy: AudioPolicy = "error",
        cache_bytes: int = 0,
    ) -> None:
        self._mel_bins = mel_bins
        self._max_seconds = max_audio_seconds
        self._policy: AudioPolicy = audio_policy
        self._cache_bytes = cache_bytes
        self._forget()

    def read(self, paths: Sequence[Path]) -> list[AudioFeatures]:
        """Features of each file. Raises AudioError for one that cannot be used."""
        return [self._read(path) for path in paths]

    def _read(self, path: Path) -> AudioFeatures:
        with self._lock:
            if path in self._kept:
                self._kept.move_to_end(path)
                return self._kept[path]
        audio = load_audio(path, max_seconds=self._max_seconds, policy=self._policy)
        features = audio_features(audio, mel_bins=self._mel_bins)
        with self._lock:
            if features.nbytes <= self._cache_bytes and path not in self._kept:
                self._kept[path] = features
                self._kept_bytes += features.nbytes
                while self._kept_bytes > self._cache_bytes:
                    self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return features

    def _forget(self) -> None:
        self._kept: OrderedDict[Path, AudioFeatures] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in vars(self).items() if k not in ("_kept", "_kept_bytes", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget()
