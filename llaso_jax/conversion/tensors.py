"""Tensors that are described now and read later, whatever file they are in.

A reader turns a file into `Tensors`: names -> objects with `shape` and `dtype` that read any box of
themselves on demand. Nothing stays in memory and no file stays open in between.
"""

import dataclasses
import itertools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from llaso_jax.conversion.errors import CorruptFileError

Box = tuple[slice, ...]
"""One slice with explicit start and stop per axis."""

BLOCK_BYTES = 64_000_000
"""What is read at a time where weights stream from file to file."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_DTYPES: tuple[np.dtype, ...] = (
    np.dtype(np.float32),
    BFLOAT16,
    np.dtype(np.float16),
    np.dtype(np.float64),
)


class Tensor(Protocol):
    """A tensor that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Its dtype as stored."""
        ...

    @property
    def by_rows(self) -> bool:
        """Whether reading some rows of the first axis costs no more than those rows."""
        ...

    def read(self, box: Box | None = None) -> np.ndarray:
        """The values inside `box` (default: all), as stored."""
        ...

    def reshape(self, shape: tuple[int, ...]) -> "Tensor":
        """The same values in another shape, still not read."""
        ...


Tensors = Mapping[str, Tensor]


def target_dtype(tensor: Tensor, dtype: Any = None) -> np.dtype:
    """What `tensor` is stored in here: `dtype`, or its own; float64 becomes float32."""
    wanted = tensor.dtype if dtype is None else np.dtype(dtype)
    return np.dtype(np.float32) if wanted == np.float64 else wanted


def whole(shape: tuple[int, ...]) -> Box:
    """The box that covers all of `shape`."""
    return tuple(slice(0, size) for size in shape)


def row_boxes(
    tensor: Tensor, shape: tuple[int, ...], *, block_bytes: int = BLOCK_BYTES, multiple: int = 1
) -> Iterator[Box]:
    """Boxes of consecutive rows that make up `shape`, the first rows of `tensor`, to be read in turn.

    Args:
      tensor: one that cannot be read by rows has one box.
      shape: that of `tensor`, or with fewer rows.
      block_bytes: the least that is read at a time, as long as there are rows left.
      multiple: rows of every box but the last are a multiple of it.
    """
    rows, *columns = shape
    step = rows
    if tensor.by_rows:
        bytes_of_multiple = multiple * math.prod(columns) * tensor.dtype.itemsize
        step = multiple * max(1, block_bytes // max(1, bytes_of_multiple))
    for start in range(0, rows, max(1, step)):
        yield (slice(start, min(start + step, rows)), *whole(tuple(columns)))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and equal values; read by rows of `a`."""
    return a.shape == b.shape and all(
        np.array_equal(a.read(box), b.read(box)) for box in row_boxes(a, a.shape)
    )


class ByteFile:
    """Read-only bytes of one file, or of several that continue each other."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        sizes = [path.stat().st_size for path in paths]
        self.ends = list(itertools.accumulate(sizes))
        self.size = self.ends[-1]

    def __str__(self) -> str:
        return " + ".join(map(str, self.paths))

    def read(self, offset: int, count: int) -> np.ndarray:
        """u8[count] bytes from `offset`.

        Raises:
          CorruptFileError: the file ends before.
        """
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CorruptFileError(
                f"{self} ends at byte {self.size}, but bytes {offset} to {offset + count} are needed: "
                "it is cut short. Copy or download it again."
            )
        starts = [0, *self.ends]
        for path, end, start in zip(self.paths, self.ends, starts, strict=False):
            if start <= offset and offset + count <= end:
                return _map(path, offset - start, count)
        parts = []
        for path, end, start in zip(self.paths, self.ends, starts, strict=False):
            first, last = max(offset, start), min(offset + count, end)
            if first < last:
                parts.append(_map(path, first - start, last - first))
        return np.concatenate(parts)


def _map(path: Path, offset: int, count: int) -> np.ndarray:
    """u8[count], read-only and mapped: nothing is copied, and the pages are the kernel's to take back."""
    if not count:
        return np.empty(0, np.uint8)
    skipped = offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        try:
            pages = mmap.mmap(
                file.fileno(), skipped + count, access=mmap.ACCESS_READ, offset=offset - skipped
            )
        except ValueError as error:
            raise CorruptFileError(f"{path} became shorter while it was read ({error}).") from error
    pages.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(pages, np.uint8, count, skipped)


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A contiguous tensor inside a file. Reshapes and leading slices of it are free."""

    file: ByteFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def by_rows(self) -> bool:
        """Yes."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes it takes up in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, box: Box | None = None) -> np.ndarray:
        """Values inside `box`: only its rows of the first axis are read from the file."""
        if not self.shape or box is None:
            flat = self.file.read(self.offset, self.nbytes).view(self.dtype)
            # Files need not align their tensors; arrays have to be.
            return (flat if flat.flags.aligned else flat.copy()).reshape(self.shape)
        rows = self.rows(box[0].start, box[0].stop)
        return rows.read()[(slice(None), *box[1:])]

    def reshape(self, shape: tuple[int, ...]) -> "FileTensor":
        """The same bytes in another shape."""
        assert math.prod(shape) == math.prod(self.shape), (self.shape, shape)
        return dataclasses.replace(self, shape=tuple(shape))

    def rows(self, start: int, stop: int) -> "FileTensor":
        """Entries start..stop of the first axis."""
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(self, offset=self.offset + start * row, shape=shape)


@dataclasses.dataclass(frozen=True)
class ComputedTensor:
    """A tensor that is computed when it is read: dequantized, permuted, random.

    `stored` names the type it has in the file, where that is another than `dtype`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[[], np.ndarray]
    stored: str | None = None

    @property
    def by_rows(self) -> bool:
        """No: all of it is computed."""
        return False

    def read(self, box: Box | None = None) -> np.ndarray:
        """Values inside `box`; the whole tensor is computed for it."""
        values = self.compute()
        assert values.size == math.prod(self.shape), (values.shape, self.shape)
        values = values.astype(self.dtype, copy=False).reshape(self.shape)
        return values if box is None else values[box]

    def reshape(self, shape: tuple[int, ...]) -> "ComputedTensor":
        """The same values in another shape."""
        assert math.prod(shape) == math.prod(self.shape), (self.shape, shape)
        return dataclasses.replace(self, shape=tuple(shape))


def array_tensor(values: np.ndarray) -> ComputedTensor:
    """A tensor over values that are in memory already."""
    return ComputedTensor(values.shape, values.dtype, lambda: values)
