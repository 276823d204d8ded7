"""The safetensors format, both ways: `u64 header length | JSON header | tensor bytes`, little-endian.

Read and written here rather than with the `safetensors` library, because its numpy side has no bfloat16,
maps whole files, and writes only tensors that are all in memory at once.
Source: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llaso_jax.conversion.errors import CorruptFileError, DuplicateTensorError
from llaso_jax.conversion.tensors import BFLOAT16, ByteFile, FileTensor

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the format's own limit


def looks_like_safetensors(file: ByteFile) -> bool:
    """Whether the first bytes are a header length and the start of a JSON object."""
    return file.size >= 9 and bytes(file.read(8, 1)) == b"{"


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """Tensors of one .safetensors file, not read yet.

    Raises:
      CorruptFileError: header, offsets and file size do not agree.
      DuplicateTensorError: a name that is in the header twice.
    """
    file = ByteFile(path)
    if file.size < 8:
        raise CorruptFileError(f"{path} has {file.size} bytes; a safetensors header alone needs 8.")
    length = int(file.read(0, 8).view("<u8")[0])
    if length > min(MAX_HEADER, file.size - 8):
        raise CorruptFileError(
            f"{path} announces a header of {length} bytes, but only {file.size - 8} follow (and the "
            f"format allows {MAX_HEADER}): it is cut short or not a safetensors file."
        )
    header = _parse_header(path, bytes(file.read(8, length)))
    data_start, data_size = 8 + length, file.size - 8 - length
    tensors: dict[str, FileTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, dtype, begin, end = _parse_entry(path, name, entry)
        if end > data_size:
            raise CorruptFileError(
                f"{path}: {name} ends at data byte {end}, but the file holds {data_size}: it is cut "
                "short. Copy or download it again."
            )
        needed = math.prod(shape) * dtype.itemsize
        if end - begin != needed:
            raise CorruptFileError(
                f"{path}: {name} of shape {shape}, dtype {dtype} needs {needed} bytes, but its "
                f"offsets {begin} to {end} hold {end - begin}."
            )
        spans.append((begin, end, name))
        tensors[name] = FileTensor(file, data_start + begin, shape, dtype)
    _check_cover(path, spans, data_size)
    return tensors


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise DuplicateTensorError(f"{path}: the header names {', '.join(twice)} twice.")
        return dict(pairs)

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptFileError(
            f"{path}: the header is not JSON ({error}): not a safetensors file, or damaged."
        ) from error
    if not isinstance(header, dict):
        raise CorruptFileError(f"{path}: the header is a {type(header).__name__}, not an object.")
    return header


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    try:
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        dtype_name = entry["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{path}: header entry of {name} is malformed: {entry!r}."
        ) from error
    if dtype_name not in DTYPES:
        raise CorruptFileError(
            f"{path}: {name} has dtype {dtype_name!r}; known are {', '.join(DTYPES)}."
        )
    if min((*shape, begin, end - begin)) < 0:
        raise CorruptFileError(f"{path}: {name} has negative sizes: {entry!r}.")
    return shape, DTYPES[dtype_name], begin, end


def _check_cover(path: Path, spans: list[tuple[int, int, str]], data_size: int) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CorruptFileError(
                f"{path}: {name} starts at data byte {begin}, but the tensor before ends at {position}."
            )
        position = end
    if position != data_size:
        raise CorruptFileError(
            f"{path}: tensors take up {position} bytes, but {data_size} follow the header."
        )


def write_safetensors(
    path: Path,
    specs: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    values: Iterable[np.ndarray],
) -> None:
    """Write tensors one after the other, in blocks; only some blocks are in memory at a time.

    Args:
      path: file to write.
      specs: name -> shape and dtype, in the order of `values`.
      values: the tensors, each whole or in rows that follow each other, made as they are asked for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (shape, dtype) in specs.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the library aligns the data to 8 bytes too
    blocks = iter(values)
    with path.open("wb", buffering=0) as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for name, (shape, dtype) in specs.items():
            left = math.prod(shape) * dtype.itemsize
            while left:
                block = next(blocks)
                assert block.dtype == dtype, (name, block.dtype, dtype)
                assert block.nbytes <= left, (name, block.shape, shape)
                left -= block.nbytes
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                while data:
                    data = data[file.write(data) :]
    assert next(blocks, None) is None, "more blocks than specs"
