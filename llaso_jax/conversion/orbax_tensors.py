"""Orbax checkpoints tensor by tensor: arrays that are read later, and arrays written as their pieces come.

Orbax saves and restores whole trees of device arrays. Here a parameter never has to exist whole: TensorStore
underneath reads and writes any box of an array, and Orbax keeps its own files around it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from llaso_jax.conversion.tensors import BLOCK_BYTES, Box, Tensor, row_boxes, whole
from llaso_jax.modeling.functional import unflatten

CHUNK_BYTES = 8_000_000
"""Chunks of a stored array are about as large: the least that one read takes in."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A parameter in an Orbax checkpoint, or one layer of a stacked one. Only its own shape."""

    store: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        """Its dtype as stored."""
        return self.store.dtype.numpy_dtype

    @property
    def by_rows(self) -> bool:
        """Yes, as far as chunks are."""
        return True

    def read(self, box: Box | None = None) -> np.ndarray:
        """Values inside `box`; chunks that touch it are read."""
        return np.asarray(self.store[box or whole(self.shape)].read().result())

    def reshape(self, shape: tuple[int, ...]) -> "StoredTensor":
        """Only its own shape."""
        assert tuple(shape) == self.shape, (shape, self.shape)
        return self

    def layer(self, index: int) -> "StoredTensor":
        """One entry of the leading axis."""
        return StoredTensor(self.store[index])


def open_arrays(folder: Path, names: Sequence[str]) -> dict[str, StoredTensor]:
    """Open arrays of the Orbax checkpoint in `folder`, by path (`a/b`)."""
    context = ocp.type_handlers.get_ts_context(use_ocdbt=True)

    def spec(name: str) -> ts.Spec:
        info = ocp.type_handlers.ParamInfo(
            name=name.replace("/", "."), parent_dir=epath.Path(folder), ts_context=context
        )
        return ts.Spec(ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True))

    opening = {name: ts.open(spec(name), open=True, context=context) for name in names}
    return {name: StoredTensor(store.result()) for name, store in opening.items()}


@dataclasses.dataclass(frozen=True)
class StreamedParam:
    """A parameter to be written.

    Attributes:
      shape: of the whole parameter.
      dtype: it is stored in.
      layers: its pieces along the leading axis, or the one piece that it is.
      stacked: which of the two.
      shard: box that a device takes at once (of one layer).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: tuple[Tensor, ...]
    stacked: bool
    shard: tuple[int, ...]

    @property
    def chunk(self) -> tuple[int, ...]:
        """What is stored together: rows of a shard, as many as divide it and stay near CHUNK_BYTES."""
        at = 1 if self.stacked else 0
        rows, *columns = self.shard[at:]
        limit = max(1, CHUNK_BYTES // (math.prod(columns) * self.dtype.itemsize))
        most = max((n for n in range(1, min(rows, limit) + 1) if rows % n == 0), default=1)
        # A prime number of rows is cut unevenly rather than into single rows.
        return (1,) * at + (most if 4 * most > min(rows, limit) else min(rows, limit), *columns)

    @property
    def nbytes(self) -> int:
        """Bytes it takes up, without compression."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_arrays(
    folder: Path,
    params: Mapping[str, StreamedParam],
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write an Orbax checkpoint of a nested dict of `params` (by path), one block at a time.

    It is one that Orbax restores as device arrays, on any mesh. Written by the first process alone.

    Args:
      folder: must not exist.
      params: what to write.
      progress: called with path and bytes after every parameter.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedParam, _StreamingHandler(progress)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    # zstd takes 22 % off normally distributed bfloat16, and half as long again (7.7 GB: 18.3 for 12.3 s).
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(unflatten(dict(params))))


class _StreamingHandler(ocp.type_handlers.ArrayHandler):
    """Writes StreamedParams the way ArrayHandler writes arrays, so that it reads them."""

    def __init__(self, progress: Callable[[str, int], None] | None) -> None:
        super().__init__()
        self._progress = progress

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        if jax.process_index() != 0:
            return []
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=value.shape,
                local_shape=value.chunk,
                dtype=value.dtype,
                process_index=0,
                arg=arg,
            )
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            pending: list[ts.WriteFutures] = []
            for box, block in _blocks(value):
                # Four blocks under way, as TensorStore syncs what it wrote (7.7 GB: 19 s with two, 14 with
                # four, 15 with seven).
                while len(pending) > 3:
                    await pending.pop(0)
                pending.append(store[box].write(block, can_reference_source_data_indefinitely=True))
            for write in pending:
                await write
            if self._progress is not None:
                self._progress(info.name.replace(".", "/"), value.nbytes)
        return []


def _blocks(param: StreamedParam) -> Iterator[tuple[Any, np.ndarray]]:
    """The values of `param` with the boxes they go to; blocks of rows that are whole chunks."""
    at = 1 if param.stacked else 0
    for index, layer in enumerate(param.layers):
        for box in row_boxes(
            layer, param.shape[at:], block_bytes=BLOCK_BYTES, multiple=param.chunk[at]
        ):
            place = (index, *box) if param.stacked else box
            yield place, layer.read(box).astype(param.dtype, copy=False)
