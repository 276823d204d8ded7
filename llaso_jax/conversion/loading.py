"""Reading gathered weights into device arrays, parameter by parameter, straight into their shards."""

import contextlib
import math
import mmap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from llaso_jax.conversion.errors import UnmappedParameterError
from llaso_jax.conversion.tensors import Tensor, target_dtype
from llaso_jax.conversion.weights import Weights
from llaso_jax.modeling.functional import Params, abstract_params, unflatten

_HUGE_PAGE = 2**21
Progress = Callable[[str, int], None]
"""Called with the name and the bytes of each tensor that is done."""


def load_params(
    weights: Weights,
    shardings: Mapping[str, Sharding] | None = None,
    *,
    dtype: Any = None,
    progress: Progress | None = None,
) -> Params:
    """Read weights onto devices.

    Every tensor is read from its file once (its rows of this process only). Host memory stays near the
    largest parameter, all its layers together.

    Args:
      weights: from `gather_weights`.
      shardings: by path, as modeling.functional.param_shardings gives them. Default: all on the first device.
      dtype: of all parameters; default what each source has (f64 becomes f32).
      progress: called after every parameter.

    Returns:
      Nested dict of the parts that `weights` has.

    Raises:
      UnmappedParameterError: a parameter without sharding.
    """
    infos = abstract_params(weights.cfg)
    default = SingleDeviceSharding(jax.devices()[0])
    flat = {}
    for path, layers in weights.pieces.items():
        if shardings is not None and path not in shardings:
            raise UnmappedParameterError(
                f"{path} has no sharding among the {len(shardings)} given."
            )
        info = infos[path]
        stacked = info.stacked
        array = _place(
            info.shape,
            layers,
            stacked,
            default if shardings is None else shardings[path],
            target_dtype(layers[0], dtype),
        )
        flat[path] = array.block_until_ready()  # on an accelerator its host memory is free now
        if progress is not None:
            progress(path, array.nbytes)
    return unflatten(flat)


def _place(
    shape: tuple[int, ...],
    layers: list[Tensor],
    stacked: bool,
    sharding: Sharding,
    dtype: np.dtype,
) -> jax.Array:
    """One parameter as a sharded array: each layer is read once and handed out to the shards it is in."""
    boxes = {
        device: tuple(index.indices(size)[:2] for index, size in zip(box, shape, strict=True))
        for device, box in sharding.addressable_devices_indices_map(shape).items()
        if box is not None
    }
    shapes = {box: tuple(stop - start for start, stop in box) for box in set(boxes.values())}
    buffers = {box: _host_array(shape, dtype) for box, shape in shapes.items()}
    # What this process needs of each layer: (start, stop) per axis, the layers first if they are stacked.
    bounds = [
        (min(start for start, _ in spans), max(stop for _, stop in spans))
        for spans in zip(*buffers, strict=True)
    ]
    inner = bounds[1:] if stacked else bounds
    needed = tuple(slice(*span) for span in inner)

    def fill(layer: int) -> None:
        values = layers[layer].read(needed).astype(dtype, copy=False)
        for box, buffer in buffers.items():
            part = tuple(
                slice(start - origin, stop - origin)
                for (start, stop), (origin, _) in zip(
                    box[1:] if stacked else box, inner, strict=True
                )
            )
            if not stacked:
                buffer[...] = values[part]
            elif box[0][0] <= layer < box[0][1]:
                buffer[layer - box[0][0]] = values[part]

    def put(device_and_box: tuple[Any, Any]) -> jax.Array:
        device, box = device_and_box
        return jax.device_put(buffers[box], device)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(*bounds[0]) if stacked else [0]))
        shards = list(pool.map(put, boxes.items()))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _host_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory of its own for one array, page-aligned: the CPU backend uses it as it is, without another copy.

    Pages of 2 MiB where the kernel has them: fresh memory costs a fault for every page, and most of
    a copy's time with pages of 4 KiB.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE_PAGE:
        return np.empty(shape, dtype)
    # Private: the kernel keeps huge pages from shared memory, which is Python's default.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
