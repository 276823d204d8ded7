"""Device meshes from a short text: `8x1`, or named `data=2,fsdp=2,tensor=2,context=1`."""

import logging
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from llaso_jax.sharding.rules import ShardingError

logger = logging.getLogger(__name__)

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "tensor", "context")
"""data: replicas; fsdp: batch and parameter shards; tensor: heads, ffn, vocab; context: sequence."""


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of all mesh axes.

    `FxT` is `fsdp=F,tensor=T`; a single number is `fsdp` alone; axes left out have size 1.

    Raises:
      ShardingError: text in neither form, an unknown or repeated axis, or a size below 1.
    """
    text = text.strip()
    sizes = dict.fromkeys(MESH_AXES, 1)
    if re.fullmatch(r"\d+(x\d+)?", text):
        fsdp, _, tensor = text.partition("x")
        sizes["fsdp"], sizes["tensor"] = int(fsdp), int(tensor or 1)
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
            if axis not in sizes:
                raise ShardingError(
                    f"mesh axis {axis!r} is unknown; the axes are {', '.join(MESH_AXES)}."
                )
            if axis in seen:
                raise ShardingError(f"mesh {text!r} names the axis {axis!r} twice.")
            seen.add(axis)
            sizes[axis] = size
    if min(sizes.values()) < 1:
        raise ShardingError(
            f"mesh {text!r} has an axis of size 0; every axis needs at least 1 device."
        )
    return sizes


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

    Raises:
      ShardingError: the mesh needs another number of devices than there are.
    """
    sizes = parse_mesh(text)
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
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        devices=devices,
        axis_types=(AxisType.Auto,) * len(sizes),
    )


def _describe(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
