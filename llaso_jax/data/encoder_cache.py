"""Outputs of a frozen speech encoder on disk, found again by what they were made from.

A file holds the features of one audio chunk. Its name is the SHA-256 of what the encoder reads, log-mel frames
and their padding; its folder's that of everything else that decides the result: weights, architecture, audio mode,
dtype, program, device. So what is found is what the encoder would give, bit for bit, whatever the audio files are
called; and nothing is ever out of date.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llaso_jax.data.config import AudioLayout
from llaso_jax.data.packing import BatchShape, Row
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.frames import audio_slots, encoder_frames

logger = logging.getLogger(__name__)

IDENTITY_FILE = "identity.json"
_CHECKSUM_BYTES = 4
_FULL = (errno.ENOSPC, errno.EDQUOT)


class EncodedRows(NamedTuple):
    """What is known of a batch's audio, or of one lane of it.

    features: [B, C, T, D]; zeros where a chunk is not known, and past the frames that are read.
    missing: (row, chunk) -> name, of the chunks that have to be encoded.
    """

    features: np.ndarray
    missing: dict[tuple[int, int], str]


class EncoderCache:
    """Features of one encoder in `folder`; any number of processes may read and write it at once.

    Reading may be done by any thread, writing by one. A damaged file counts as none. Where `limit_bytes` is
    reached, or the disk is full, nothing more is kept, and a line in the log says so.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        identity: Mapping[str, Any],
        layout: AudioLayout,
        width: int,
        dtype: Any,
        limit_bytes: int,
        writers: int = 1,
    ) -> None:
        """Nothing is written yet.

        Args:
            folder: of all encoders' features.
            identity: JSON of what decides an encoder's output, besides the audio.
            layout: how many frames of a chunk reach the language model: no others are kept.
            width: D.
            dtype: of the features.
            limit_bytes: of all encoders' features in `folder`.
            writers: processes that add to it, which share what is left of the limit.

        Raises:
            ConfigError: a folder that cannot be made or written.
        """
        self.root = Path(folder)
        self._layout, self._width, self._dtype = layout, width, np.dtype(dtype)
        whole = {**identity, "layout": [layout.mode, layout.stack], "dtype": self._dtype.name}
        self._identity = json.dumps(whole, sort_keys=True, indent=2) + "\n"
        self.folder = self.root / hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"`encoder_cache`: {self.root} cannot be made ({error}); name another folder, or null"
            ) from error
        if not os.access(self.root, os.W_OK):
            raise ConfigError(
                f"`encoder_cache`: {self.root} cannot be written; name another folder, or null"
            )
        self._writers = writers
        self._room = max(limit_bytes - _bytes_in(self.root), 0) // writers
        self._full = False

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes more, of all writers together, fit in the limit and in 9/10 of the free disk."""
        free = shutil.disk_usage(self.root).free
        return size <= self._room * self._writers and size <= 0.9 * free

    def kept_frames(self, valid: int, mel_frames: int) -> int:
        """Encoder frames kept of a chunk of `valid` mel frames, padded to `mel_frames`."""
        slots = audio_slots(valid, mode=self._layout.mode, stack=self._layout.stack)
        return min(slots * self._layout.stack, encoder_frames(mel_frames))

    def chunk_bytes(self, valid: int, mel_frames: int) -> int:
        """What such a chunk takes on disk."""
        kept = self.kept_frames(valid, mel_frames)
        return kept * self._width * self._dtype.itemsize + _CHECKSUM_BYTES

    def name(self, mel: np.ndarray, valid: int, mel_frames: int) -> str:
        """Name of the features of a chunk: float32[M, n] of `log_mel`, padded to `mel_frames`."""
        text = f"{mel.shape[0]} {valid} {mel_frames} "
        return hashlib.sha256(text.encode() + mel.tobytes()).hexdigest()

    def read(self, name: str, frames: int) -> np.ndarray | None:
        """[frames, D], or None where it is not kept."""
        try:
            content = self._path(name).read_bytes()
        except OSError:
            return None
        data, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        whole = len(data) == frames * self._width * self._dtype.itemsize
        if not whole or zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
            return None
        return np.frombuffer(data, self._dtype).reshape(frames, self._width)

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def write(self, name: str, features: np.ndarray) -> None:
        """Keep [frames, D]; written beside and renamed, so that nobody ever reads a part of it."""
        data = np.ascontiguousarray(features, self._dtype).tobytes()
        size = len(data) + _CHECKSUM_BYTES
        if self._full:
            return
        if size > self._room:
            self._stop("the size set by `encoder_cache_gb` is reached")
            return
        path = self._path(name)
        temporary = path.with_name(f".{name}.{uuid.uuid4().hex}")
        try:
            if not (self.folder / IDENTITY_FILE).exists():
                self._describe()
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.write(zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little"))
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in _FULL:
                raise
            self._stop(f"the disk of {self.root} is full")
            return
        self._room -= size

    def look_up(self, rows: Sequence[Row], shape: BatchShape, *, mel_frames: int) -> EncodedRows:
        """What is kept of the audio in `rows`, whose chunks are padded to `mel_frames`."""
        B, C, T = len(rows), shape.chunks, encoder_frames(mel_frames)
        features = np.zeros((B, C, T, self._width), self._dtype)
        missing = {}
        for b, row in enumerate(rows):
            chunks = [
                (mel, int(valid))
                for sample in row.samples
                for mel, valid in zip(sample.mels, sample.mel_frames, strict=True)
            ]
            for c, (mel, valid) in enumerate(chunks):
                kept, name = self.kept_frames(valid, mel_frames), self.name(mel, valid, mel_frames)
                found = self.read(name, kept)
                if found is None:
                    missing[b, c] = name
                else:
                    features[b, c, :kept] = found
        return EncodedRows(features, missing)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _describe(self) -> None:
        """Say beside the features what they were made with."""
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / f".{IDENTITY_FILE}.{uuid.uuid4().hex}"
        temporary.write_text(self._identity, encoding="utf-8")
        temporary.replace(self.folder / IDENTITY_FILE)

    def _stop(self, why: str) -> None:
        self._full = True
        logger.warning(
            "encoder cache: %s, so no more is kept and audio that is not there is encoded every time. "
            "Every folder in %s with an %s belongs to one encoder and may be deleted.",
            *(why, self.root, IDENTITY_FILE),
        )


def _bytes_in(folder: Path) -> int:
    total, pending = 0, [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                else:
                    try:
                        total += entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:
                        continue  # a temporary file of another process
    return total
