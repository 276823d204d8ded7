"""Speech as bytes of a file: the same bytes for the same samples, and never half a file."""

import io
import os
from pathlib import Path

import numpy as np
import soundfile as sf

from llaso_jax.speech.samples import SAMPLE_RATE

SUFFIXES = (".opus", ".flac", ".wav")
OPUS_KBITS = 24.0
# libsndfile's compression levels 1 to 0 of Opus run over these bit rates linearly.
LOWEST_OPUS_KBITS, HIGHEST_OPUS_KBITS = 6.0, 256.0
OGG_POLYNOMIAL = 0x04C11DB7


def encode(
    samples: np.ndarray, suffix: str, *, serial: int = 0, kbits: float = OPUS_KBITS
) -> bytes:
    """Bytes of a file that depend on the arguments only.

    Args:
      samples: float32[n] at 16 kHz, -1 to 1.
      suffix: .opus, .flac or .wav (both of 16 bits).
      serial: number of the stream in an Ogg file; tells streams apart that are chained.
      kbits: rate of Opus in kbit/s, 6 to 256.
    """
    buffer = io.BytesIO()
    if suffix == ".opus":
        span = HIGHEST_OPUS_KBITS - LOWEST_OPUS_KBITS
        level = (HIGHEST_OPUS_KBITS - kbits) / span
        sf.write(
            buffer, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level
        )
        return stable_ogg(buffer.getvalue(), serial)
    sf.write(buffer, samples, SAMPLE_RATE, format=suffix[1:].upper(), subtype="PCM_16")
    return buffer.getvalue()


def write_whole(path: Path, data: bytes, *, scratch: Path) -> None:
    """Put `data` at `path` so that the path names the whole file or none, whenever this is killed.

    Args:
      scratch: a folder in the same file system, for the file while it is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = scratch / f"{os.getpid()}{path.suffix}"
    temporary.write_bytes(data)
    temporary.replace(path)


def stable_ogg(data: bytes, serial: int) -> bytes:
    """Rewrite an Ogg Opus stream with a given serial number (libsndfile draws one from the clock)
    and a tags page without its 800 bytes of padding, which would be a third of a short clip."""
    tags = b"OpusTags" + (7).to_bytes(4, "little") + b"libopus" + (0).to_bytes(4, "little")
    out, at, page = bytearray(), 0, 0
    while at < len(data):
        segments = data[at + 26]
        table = data[at + 27 : at + 27 + segments]
        body_at = at + 27 + segments
        body = data[body_at : body_at + sum(table)]
        header = bytearray(data[at : at + 27])
        at = body_at + len(body)
        if body.startswith(b"OpusTags"):
            table, body = bytes([len(tags)]), tags
            header[26] = 1
        header[14:18] = serial.to_bytes(4, "little")
        header[18:22] = page.to_bytes(4, "little")
        header[22:26] = bytes(4)
        checksum = ogg_crc(bytes(header) + table + body)
        header[22:26] = checksum.to_bytes(4, "little")
        out += header + table + body
        page += 1
    return bytes(out)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ OGG_POLYNOMIAL if value & 0x80000000 else value << 1
        table.append(value & 0xFFFFFFFF)
    return table


CRC_TABLE = _crc_table()


def ogg_crc(data: bytes) -> int:
    """The checksum of an Ogg page (RFC 3533), its own field counted as zero."""
    value = 0
    for byte in data:
        value = ((value << 8) & 0xFFFFFFFF) ^ CRC_TABLE[(value >> 24) ^ byte]
    return value
