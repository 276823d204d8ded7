"""What a RIFF/WAVE header promises against what the file holds.

libsndfile quietly plays what is there, so a half-copied wav would train on half its words.
"""

import struct
from pathlib import Path

STREAMED_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)  # written by encoders that cannot seek back (ffmpeg)


def promised_and_present_bytes(path: Path) -> tuple[int, int] | None:
    """Bytes of samples (promised by the header, present in the file).

    None when `path` is no RIFF/WAVE file, has no data chunk or leaves its length open.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(12)
        if len(header) < 12 or header[:4] != b"RIFF" or header[8:] != b"WAVE":
            return None
        while len(head := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", head)
            if name == b"data":
                if length in STREAMED_SIZES:
                    return None
                return length, min(length, size - file.tell())
            file.seek(length + length % 2, 1)  # chunks are padded to even lengths
    return None
