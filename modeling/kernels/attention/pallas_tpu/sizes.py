"""Block sizes of the TPU kernels: one small table."""

from typing import NamedTuple

from llaso_jax.modeling.kernels.attention.blocks import even_block


class BlockSizes(NamedTuple):
    """Queries and keys of a block, both multiples of 128."""

    q: int
    kv: int


# Largest blocks (queries, keys) of the forward kernel and of the two backward kernels. Larger blocks read K and V less
# often and hide more of the 0.35 us that a step of the grid costs; smaller ones waste less on the diagonal. What bounds
# them is VMEM: a block of scores takes 4 bytes an entry, and the kernels hold two to four such blocks. v5p has
# 64 MiB a core, v5e and v6e 128 MiB. Chosen by what compiles and by traffic (docs/kernels.md), not by a stopwatch.
_TARGETS = {
    "v5e": {"forward": (1024, 1024), "backward": (512, 1024)},
    "v5p": {"forward": (1024, 1024), "backward": (512, 1024)},
    "v6e": {"forward": (1024, 1024), "backward": (1024, 1024)},
}
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def block_sizes(
    phase: str, device_kind: str, q_length: int, kv_length: int, itemsize: int
) -> BlockSizes:
    """Blocks of a kernel ("forward" or "backward") on a device kind; v5e's where the kind is not in the table.

    f32 entries (itemsize 4) take half as many queries at a time.
    """
    q, kv = _TARGETS[_KINDS.get(device_kind, "v5e")][phase]
    if itemsize == 4:
        q //= 2
    return BlockSizes(even_block(q_length, q), even_block(kv_length, kv))
