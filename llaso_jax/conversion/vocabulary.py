"""Embedding rows that no checkpoint has: new tokens, and padding that lets the table split over a mesh."""

import functools

import numpy as np

from llaso_jax.conversion.tensors import Box, Tensor, whole

_BLOCK = 4096  # rows read at a time for the mean


class GrownRows:
    """A table [V, D] with `new` rows of its mean below it, then zeros up to `total` rows.

    Source of the mean: LLaSO llaso/train/train.py `smart_tokenizer_and_embedding_resize`.
    """

    def __init__(self, table: Tensor, new: int, total: int) -> None:
        assert len(table.shape) == 2, table.shape
        assert table.shape[0] + new <= total, (table.shape, new, total)
        self.table = table
        self.new = new
        self.shape = (total, table.shape[1])
        self.dtype = table.dtype

    @property
    def by_rows(self) -> bool:
        """As its table."""
        return self.table.by_rows

    def read(self, box: Box | None = None) -> np.ndarray:
        """Values inside `box`."""
        rows, columns = box or whole(self.shape)
        old = self.table.shape[0]
        out = np.zeros((rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        if rows.start < old:
            stop = min(rows.stop, old)
            out[: stop - rows.start] = self.table.read((slice(rows.start, stop), columns))
        first, last = max(rows.start, old), min(rows.stop, old + self.new)
        if first < last:
            out[first - rows.start : last - rows.start] = self.mean[columns]
        return out

    def reshape(self, shape: tuple[int, ...]) -> "GrownRows":
        """Only its own shape: a table of embeddings is never split."""
        assert tuple(shape) == self.shape, (shape, self.shape)
        return self

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """[D] mean of the old rows, summed in f64."""
        old, width = self.table.shape
        total = np.zeros(width, np.float64)
        for start in range(0, old, _BLOCK):
            block = (slice(start, min(start + _BLOCK, old)), slice(0, width))
            total += self.table.read(block).astype(np.float64).sum(0)
        return (total / old).astype(np.float32).astype(self.dtype)
