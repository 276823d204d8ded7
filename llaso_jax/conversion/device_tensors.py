"""Parameters on devices as tensors that are fetched one by one."""

import dataclasses

import jax
import numpy as np

from llaso_jax.conversion.binding import Pieces
from llaso_jax.conversion.tensors import Box, whole
from llaso_jax.modeling.functional import Params, flatten
from llaso_jax.sharding.processes import on_host


@dataclasses.dataclass(frozen=True)
class DeviceTensor:
    """An array on devices, or one layer of a stacked one. Only its own shape.

    Where the devices belong to several processes, all of them have to read it.
    """

    array: jax.Array
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape if self.index is None else self.array.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return np.dtype(self.array.dtype)

    @property
    def by_rows(self) -> bool:
        """No: every slice would be a program of its own."""
        return False

    def read(self, box: Box | None = None) -> np.ndarray:
        """Values inside `box`, on the host."""
        array = self.array if self.index is None else _layer(self.array, self.index)
        if box not in (None, whole(self.shape)):
            array = array[box]
        return on_host(array) if isinstance(array, jax.Array) else np.asarray(array)

    def reshape(self, shape: tuple[int, ...]) -> "DeviceTensor":
        """Only its own shape."""
        assert tuple(shape) == self.shape, (shape, self.shape)
        return self


def pieces_of(params: Params, stacked: set[str]) -> Pieces:
    """Nested parameters as tensors by path; those of the paths `stacked` layer by layer."""
    return {
        path: [DeviceTensor(array, i) for i in range(array.shape[0])]
        if path in stacked
        else [DeviceTensor(array)]
        for path, array in flatten(params).items()
    }


@jax.jit
def _layer(stacked: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)
