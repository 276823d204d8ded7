"""Device meshes from a short text: `8x1`, named `data=2,tensor=2,context=2`, or of slices `dcn_data=2,fsdp=4`."""

import logging
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from llaso_jax.sharding.rules import ShardingError

logger = logging.getLogger(__name__)

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "tensor", "context")
"""data: replicas; fsdp: batch and parameter shards; tensor: heads, ffn, vocab; context: sequence."""


SLICED_AXES: tuple[str, ...] = ("data", "fsdp")
"""Axes that may go from slice to slice: their collectives come once a step or a layer and can be hidden."""
_DCN = "dcn_"


class MeshShape(NamedTuple):
    """Sizes of all mesh axes: inside each slice, and over the slices between which data goes by the network (DCN)."""

    inside: dict[str, int]
    slices: dict[str, int]

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the whole mesh: an axis first goes over slices, then inside them."""
        return {axis: size * self.slices[axis] for axis, size in self.inside.items()}

    @property
    def slice_count(self) -> int:
        """Number of slices."""
        return math.prod(self.slices.values())


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of all mesh axes, slices included.

    Raises:
      ShardingError: see `parse_shape`.
    """
    return parse_shape(text).sizes


def parse_shape(text: str) -> MeshShape:
    """The mesh that a text names.

    `FxT` is `fsdp=F,tensor=T`; a single number is `fsdp` alone; axes left out have size 1. `dcn_data` and `dcn_fsdp`
    are numbers of slices: `dcn_data=2,fsdp=4` is 2 slices of 4 devices.

    Raises:
      ShardingError: text in neither form, an unknown or repeated axis, or a size below 1.
    """
    text = text.strip()
    inside, slices = (dict.fromkeys(MESH_AXES, 1) for _ in range(2))
    if re.fullmatch(r"\d+(x\d+)?", text):
        fsdp, _, tensor = text.partition("x")
        inside["fsdp"], inside["tensor"] = int(fsdp), int(tensor or 1)
    else:
        seen: set[str] = set()
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
            if match is None:
                raise ShardingError(
                    f"mesh {text!r} is not understood: write 8x1 (fsdp x tensor) or name the axes, "
                    f"such as fsdp=4,tensor=2."
                )
            axis, size = match[1], int(match[2])
            name = axis.removeprefix(_DCN)
            if name not in MESH_AXES:
                raise ShardingError(
                    f"mesh axis {axis!r} is unknown; the axes are {', '.join(MESH_AXES)}."
                )
            if name != axis and name not in SLICED_AXES:
                raise ShardingError(
                    f"mesh axis {axis!r}: {name} talks in every layer and stays inside a slice; axes between "
                    f"slices are {' and '.join(_DCN + sliced for sliced in SLICED_AXES)}."
                )
            if axis in seen:
                raise ShardingError(f"mesh {text!r} names the axis {axis!r} twice.")
            seen.add(axis)
            (inside if name == axis else slices)[name] = size
    if min(*inside.values(), *slices.values()) < 1:
        raise ShardingError(
            f"mesh {text!r} has an axis of size 0; every axis needs at least 1 device."
        )
    return MeshShape(inside, slices)


def abstract_mesh(text: str) -> AbstractMesh:
    """The mesh that `text` names without its devices: enough for shardings of shapes.

    Raises:
      ShardingError: see `parse_shape`.
    """
    sizes = parse_mesh(text)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def provide_cpu_devices(count: int) -> None:
    """Make `count` virtual CPU devices if this process may run on CPU and has not started JAX yet.

    A no-op where JAX is told to use, or finds, another kind of device: virtual devices exist only
    on the CPU backend.
    """
    asked_for = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if count <= max(1, asked_for):
        return  # asked for already (JAX_NUM_CPU_DEVICES, a larger mesh before): never take any away
    try:
        jax.config.update("jax_num_cpu_devices", max(count, 1))
    except RuntimeError:
        # The backend has started (in a notebook, say): its device count stays as it is.
        return


def make_mesh(text: str, *, devices: list[Any] | None = None) -> Mesh:
    """Mesh with the axes of `MESH_AXES` over `devices` (default: all of all processes; on machines
    with nothing but CPUs virtual ones, made here unless processes that run together made theirs).

    Between slices an axis is outermost: its first half lies in the first of two slices. Devices that know no slice,
    as those of a CPU, are cut into equal parts in their order, which is that of processes.

    Raises:
      ShardingError: the mesh needs another number of devices, or of slices, than there are.
    """
    shape = parse_shape(text)
    sizes = shape.sizes
    needed = math.prod(sizes.values())
    if devices is None:
        together = jax.distributed.is_initialized()
        if not together:
            provide_cpu_devices(needed)
        devices = jax.devices()
        if devices[0].platform == "cpu" and not together:
            # The CPU can stand in for any mesh up to the number of devices it simulates.
            devices = devices[:needed]
            if needed > 1:
                logger.info(
                    "no accelerator found: simulating %d devices on the CPU for mesh %s",
                    needed,
                    text,
                )
    if len(devices) != needed:
        raise ShardingError(
            f"mesh {text!r} needs {needed} devices ({_describe(sizes)}), but {len(devices)} "
            f"{devices[0].platform} device(s) are available. Choose --mesh so that the product is "
            f"{len(devices)}, such as --mesh {len(devices)}x1."
        )
    types = (AxisType.Auto,) * len(sizes)
    slices = _slices(text, shape, devices)
    if len(slices) == 1:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=types)
    # As jax.experimental.mesh_utils.create_hybrid_device_mesh, which knows no slices of a CPU.
    blocks = np.empty(len(slices), object)
    for number, members in enumerate(slices):
        inside = jax.make_mesh(
            tuple(shape.inside.values()), tuple(sizes), devices=members, axis_types=types
        )
        blocks[number] = inside.devices
    grid = blocks.reshape(tuple(shape.slices.values()))
    return Mesh(np.block(grid.tolist()), tuple(sizes), axis_types=types)


def _slices(text: str, shape: MeshShape, devices: list[Any]) -> list[list[Any]]:
    """The devices of each slice, in order.

    Raises:
      ShardingError: other slices than the mesh asks for.
    """
    count = shape.slice_count
    if all(hasattr(device, "slice_index") for device in devices):
        numbers = [device.slice_index for device in devices]
    else:
        numbers = [place * count // len(devices) for place in range(len(devices))]
    found = {
        number: [device for device, own in zip(devices, numbers, strict=True) if own == number]
        for number in sorted(set(numbers))
    }
    size = math.prod(shape.inside.values())
    if len(found) != count or any(len(members) != size for members in found.values()):
        lie = ", ".join(str(len(members)) for members in found.values())
        raise ShardingError(
            f"mesh {text!r} asks for {count} slice(s) of {size} devices, but the devices lie in {len(found)} "
            f"slice(s) of {lie}. Name what goes between slices, such as "
            f"--mesh dcn_data={len(found)},fsdp={len(devices) // len(found)}."
        )
    return list(found.values())


def _describe(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
