"""Block sizes of the GPU kernels: one small table."""

from typing import NamedTuple


class BlockSizes(NamedTuple):
    """Queries and keys of a block, powers of 2, and how the kernel is compiled."""

    q: int
    kv: int
    warps: int = 4
    stages: int = 2


# By bytes of an entry. A program holds its own block in registers and `stages` of the others in shared memory, of which
# an H100 has 227 KiB. Chosen by what compiles without spilling registers (docs/kernels.md), not by a stopwatch.
FORWARD = {2: BlockSizes(128, 64, warps=8, stages=3), 4: BlockSizes(64, 32)}
BACKWARD = {2: BlockSizes(64, 64, warps=8), 4: BlockSizes(32, 32)}
