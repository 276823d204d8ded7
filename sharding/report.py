"""Where every parameter lies: shape, layout, bytes on each device, and what is there more than once."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jax.sharding import NamedSharding

from llaso_jax.sharding.rules import mesh_axes_of


class ShardRow(NamedTuple):
    """One parameter on a mesh.

    path: its name.
    shape: of the whole array.
    dtype: as stored.
    layout: mesh axes of every dimension, "-" where it is not split: "fsdp,-".
    device_bytes: of the shard that each device holds.
    copies: devices that hold the same shard.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    device_bytes: int
    copies: int


def shard_row(
    path: str, shape: tuple[int, ...], dtype: str, itemsize: int, sharding: NamedSharding
) -> ShardRow:
    """The row of one parameter; the mesh of `sharding` may be abstract."""
    layout = []
    for entry in (*sharding.spec, *[None] * (len(shape) - len(sharding.spec))):
        layout.append("+".join(mesh_axes_of(entry)) or "-")
    shard = sharding.shard_shape(shape)
    shards = math.prod(shape) // math.prod(shard)
    return ShardRow(
        path,
        shape,
        dtype,
        ",".join(layout),
        itemsize * math.prod(shard),
        sharding.mesh.size // shards,
    )


def replicated_share(rows: Iterable[ShardRow]) -> float:
    """Share of all devices' bytes that are second and further copies of a shard, 0 to 1."""
    held = unique = 0.0
    for row in rows:
        held += row.device_bytes
        unique += row.device_bytes / row.copies
    return 1 - unique / held if held else 0.0


def aligned(rows: Sequence[Sequence[str]], *, right_from: int | None = None) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell; those from `right_from` on end at one place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if right_from is None else right_from
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def shard_table(rows: Iterable[ShardRow], totals: Mapping[str, int]) -> str:
    """Text with one line per parameter and one per total (a name and bytes per device), aligned."""
    rows = list(rows)
    header = ("parameter", "shape", "dtype", "layout", "bytes/device", "copies")
    cells = [header] + [
        (
            row.path,
            "x".join(map(str, row.shape)),
            row.dtype,
            row.layout,
            f"{row.device_bytes:,}",
            str(row.copies),
        )
        for row in rows
    ]
    lines = [*aligned(cells, right_from=4), ""]
    lines += [f"{name}: {value:,} bytes per device" for name, value in totals.items()]
    lines.append(
        f"held more than once: {replicated_share(rows):.2%} of all devices' parameter bytes"
    )
    return "\n".join(lines) + "\n"
