"""Byte offsets of the records of a JSON array or JSON-lines file, found without parsing it.

LLaSO's files hold 13 million records in many gigabytes. They are read once, in blocks, and the
offsets are kept on disk; afterwards any record is one small read.
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llaso_jax.errors import DataError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
BACKSLASH = ord("\\")
_STRUCTURAL = np.zeros(256, bool)
_STRUCTURAL[list(b'"{}[]')] = True
_DEPTH_STEP = np.zeros(256, np.int64)
_DEPTH_STEP[list(b"{[")] = 1
_DEPTH_STEP[list(b"}]")] = -1


def load_index(json_file: Path, cache_dir: Path | None = None) -> np.ndarray:
    """The offsets of `json_file`, scanned on first use and memory-mapped afterwards.

    The index lies in `cache_dir`; without one beside the file, or in the user's cache where that
    folder cannot be written. Its name holds the file's path, size and modification time, so a
    changed file is scanned again.

    Returns:
        int64[n, 2]: first byte of each record and the byte after its last.

    Raises:
        DataError: not a JSON array of objects nor JSON lines, with the byte where it stops being one.
    """
    try:
        status = json_file.stat()
    except OSError as error:
        raise DataError(f"{json_file} cannot be read ({error}); `train_json` names it") from error
    key = f"{json_file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    name = f"{json_file.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.idx"
    beside = json_file.parent if os.access(json_file.parent, os.W_OK) else user_cache()
    index = (cache_dir or beside) / name
    if not index.exists():
        _write_index(json_file, index)
    if not index.stat().st_size:
        return np.zeros((0, 2), np.int64)
    return np.memmap(index, np.dtype("<i8"), mode="r").reshape(-1, 2)


def user_cache() -> Path:
    """Where this user keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llaso_jax"


def _write_index(json_file: Path, index: Path) -> None:
    """Write beside and rename, so that a killed scan leaves no half index behind."""
    temporary = index.with_name(f"{index.name}.{uuid.uuid4().hex}.tmp")
    records = 0
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with json_file.open("rb") as file, temporary.open("wb") as out:
            for offsets in scan_records(file):
                out.write(offsets.astype("<i8").tobytes())
                records += len(offsets)
        temporary.replace(index)
    except OSError as error:
        raise DataError(
            f"{json_file} cannot be indexed in {index.parent} ({error}); "
            "set `index_dir` to a folder that can be written"
        ) from error
    finally:
        if index.parent.is_dir():
            temporary.unlink(missing_ok=True)
    logger.info("indexed %d records of %s in %s", records, json_file, index)


def scan_records(file: BinaryIO) -> Iterator[np.ndarray]:
    """Yield int64[k, 2] offsets block by block: of a JSON array if the file starts with `[`,
    of JSON lines if it starts with `{`."""
    start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    file.seek(0)
    if start == b"[":
        yield from _scan_array(file)
    elif start in (b"{", b""):
        yield from _scan_lines(file)
    else:
        raise DataError(
            f"the file starts with {start!r}: a JSON array '[' or JSON lines '{{' are needed",
            position=f"byte 0 of {file.name}",
        )


def _scan_lines(file: BinaryIO) -> Iterator[np.ndarray]:
    offset, carry = 0, b""
    while block := file.read(BLOCK_BYTES):
        data = carry + block
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        cut = int(ends[-1]) + 1 if len(ends) else 0
        yield _line_offsets(data[:cut], ends, offset)
        offset, carry = offset + cut, data[cut:]
    yield _line_offsets(carry, np.array([len(carry)]), offset)


def _line_offsets(data: bytes, ends: np.ndarray, offset: int) -> np.ndarray:
    if not data:
        return np.zeros((0, 2), np.int64)
    starts = np.r_[0, ends[:-1] + 1]
    full = [bool(data[s:e].strip()) for s, e in zip(starts, ends, strict=True)]
    return np.stack([starts, ends], axis=1)[full].astype(np.int64) + offset


def _scan_array(file: BinaryIO) -> Iterator[np.ndarray]:
    """Find the objects of the outer array by counting brackets outside of strings.

    The bracket structure of a whole block is found with a few array operations.
    """
    offset, depth, in_string = 0, 0, False
    between = b"["  # a separator holds exactly this, besides white space
    gap, gap_start, open_record = b"", 0, -1
    while data := _read_block(file):
        places, step = _brackets(data, in_string)
        quotes = np.frombuffer(data, np.uint8)[places] == ord('"')
        in_string ^= bool(quotes.sum() % 2)
        places, step = places[~quotes], step[~quotes]
        after = depth + np.cumsum(step)
        starts = places[(step == 1) & (after == 2)] + offset
        ends = places[(step == -1) & (after == 1)] + 1 + offset
        depth = int(after[-1]) if len(after) else depth
        # Whatever lies between two records must be one comma.
        edges = [*([open_record] if open_record >= 0 else []), *starts.tolist()]
        previous_end = offset if open_record < 0 else None
        for i, start in enumerate(edges):
            if start >= offset:
                assert previous_end is not None
                gap += data[previous_end - offset : start - offset]
                _check_separator(gap, between, gap_start, file)
                gap, between = b"", b","
            if i < len(ends):
                previous_end = gap_start = int(ends[i])
        open_record = edges[-1] if len(edges) > len(ends) else -1
        if open_record < 0 and previous_end is not None:
            gap += data[previous_end - offset :]
        yield np.stack([np.array(edges[: len(ends)], np.int64), ends], axis=1).reshape(-1, 2)
        offset += len(data)
    if open_record >= 0:
        raise DataError(
            "the file ends inside a record: it is truncated, or a quote or bracket is missing",
            position=f"record that starts at byte {open_record} of {file.name}",
        )
    closing = b"[]" if between == b"[" else b"]"
    _check_separator(gap, closing, gap_start, file)


def _read_block(file: BinaryIO) -> bytes:
    """A block that does not end in a backslash: escapes are never cut in two."""
    block = file.read(BLOCK_BYTES)
    while block.endswith(b"\\") and (more := file.read(64)):
        block += more
    return block


def _brackets(data: bytes, in_string: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions of real quotes and of brackets outside strings, and each one's depth step."""
    array = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(_STRUCTURAL[array])
    quote = array[places] == ord('"')
    before = array[np.maximum(places - 1, 0)] == BACKSLASH
    escaped = quote & before & (places > 0)
    # One backslash is the rule; runs of them are counted one by one.
    runs = escaped & (array[np.maximum(places - 2, 0)] == BACKSLASH) & (places > 1)
    for i in np.flatnonzero(runs).tolist():
        escaped[i] = _is_escaped(data, int(places[i]))
    if escaped.any():
        places, quote = places[~escaped], quote[~escaped]
    inside = (np.cumsum(quote) + in_string) % 2 == 1
    real = quote | ~inside
    places = places[real]
    return places, _DEPTH_STEP[array[places]]


def _is_escaped(data: bytes, place: int) -> bool:
    """Whether an odd number of backslashes stands right before `place`."""
    first = place
    while first and data[first - 1] == BACKSLASH:
        first -= 1
    return (place - first) % 2 == 1


def _check_separator(gap: bytes, needed: bytes, start: int, file: BinaryIO) -> None:
    found = b"".join(gap.removeprefix(b"\xef\xbb\xbf").split())
    if found != needed:
        shown = found[:40] + (b"..." if len(found) > 40 else b"")
        raise DataError(
            f"malformed JSON: {shown.decode(errors='replace')!r} where {needed.decode()!r} is "
            "needed between records; the array must hold objects only",
            position=f"byte {start} of {file.name}",
        )
