"""What the TPU kernels share: their launch over a list of block pairs, places in it, and the mask of a pair."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llaso_jax.modeling.kernels.attention.blocks import (
    ALL,
    LANES,
    NONE,
    SOME,
    Padded,
    Schedule,
    whole_blocks,
)
from llaso_jax.modeling.kernels.attention.pallas_tpu.sizes import BlockSizes

VMEM_LIMIT = 48 * 2**20
"""Bytes a kernel may use: v5p has 64 MiB, v5e and v6e 128 MiB (jax's TpuInfo); the default is 16 or 32."""


class Static(NamedTuple):
    """What a kernel is compiled for, beside its shapes."""

    causal: bool
    size: BlockSizes
    scale: float  # of the scores, in base 2
    interpret: bool


def precision(dtype: Any) -> jax.lax.Precision | None:
    """f32 products of f32 inputs; the default would round these to bf16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """f32 product of two matrices, summed over axis `contract[0]` of a and `contract[1]` of b."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, axes, precision=precision(a.dtype), preferred_element_type=jnp.float32
    )


def column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, LANES], the same value in all lanes: entries that lie along lanes come to lie along sublanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def edges(outer: Any, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether `pair` is the first and whether it is the last one of its outer block."""
    last = outer.shape[0] - 1
    here = outer[pair]
    first = (pair == 0) | (outer[jnp.maximum(pair - 1, 0)] != here)
    return first, (pair == last) | (outer[jnp.minimum(pair + 1, last)] != here)


def row_of(row: Any, array: Any) -> Any:
    """Where a batch row is in an array [R, ...]: R is 1 where all rows are alike."""
    return row if array.shape[0] > 1 else 0


def hide(static: Static, scores: jax.Array, ids: Any, blocks: tuple[Any, Any], q_axis: int) -> Any:
    """Scores of a pair of `blocks` (queries, keys), -inf where a key is not seen; `ids` broadcast against them."""
    seen = ids[0] == ids[1]
    if static.causal:
        starts = blocks[0] * static.size.q, blocks[1] * static.size.kv
        q = starts[0] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, q_axis)
        kv = starts[1] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - q_axis)
        seen &= q >= kv
    return jnp.where(seen, scores, -jnp.inf)


def visit(kind: Any, add: Callable[..., None]) -> None:
    """`add(masked=...)` for a pair of this kind, nothing for NONE."""
    pl.when(kind == SOME)(functools.partial(add, masked=True))
    pl.when(kind == ALL)(functools.partial(add, masked=False))


class Inputs(NamedTuple):
    """q: [B, N, S', H], k and v: [B, K, T', H], in whole blocks, and the segment ids beside them."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    ids: Padded

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.q.shape[1] // self.k.shape[1]


def heads_first(array: jax.Array, block: int) -> jax.Array:
    """[B, S, N, H] -> [B, N, S', H], padded with zeros to whole blocks."""
    length = array.shape[1]
    room = whole_blocks(length, block) - length
    return jnp.pad(array, ((0, 0), (0, room), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def heads_last(array: jax.Array, length: int) -> jax.Array:
    """The inverse of `heads_first`."""
    return array[:, :, :length].transpose(0, 2, 1, 3)


def compiler_params(*semantics: Any) -> pltpu.CompilerParams:
    """Dimensions of the grid: "parallel" ones may run on several cores, "arbitrary" ones in order."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


class Specs(NamedTuple):
    """Which block of each array a step of the grid has; `line`: of a value per query, [B, N, 1, S']."""

    q_ids: pl.BlockSpec
    kv_ids: pl.BlockSpec
    queries: pl.BlockSpec
    keys: pl.BlockSpec
    line: pl.BlockSpec


def specs(inputs: Inputs, size: BlockSizes, by: str) -> Specs:
    """Blocks of a grid (row, query head, pair), `by` "q", or (row, key/value head, pair, member of its group)."""
    width, group = inputs.q.shape[-1], inputs.group

    def place(b: Any, n: Any, p: Any, *rest: Any) -> tuple[Any, ...]:
        """(query head, key/value head, block of queries, block of keys)."""
        *member, outer, inner, kind = rest
        fetched = inner[row_of(b, inner), p]
        if by == "q":
            return n, n // group, outer[p], fetched
        # A pair of NONE keeps what the last member of the group before it had.
        left = kind[row_of(b, kind), p] == NONE
        return n * group + jnp.where(left, group - 1, member[0]), n, fetched, outer[p]

    def spec(block: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(block, lambda b, *rest: index(b, *place(b, *rest)))

    return Specs(
        spec((1, 1, size.q), lambda b, n, k, i, j: (row_of(b, inputs.ids.q), 0, i)),
        spec((1, 1, size.kv), lambda b, n, k, i, j: (row_of(b, inputs.ids.kv), 0, j)),
        spec((1, 1, size.q, width), lambda b, n, k, i, j: (b, n, i, 0)),
        spec((1, 1, size.kv, width), lambda b, n, k, i, j: (b, k, j, 0)),
        spec((1, 1, 1, size.q), lambda b, n, k, i, j: (b, n, 0, i)),
    )


class Program(NamedTuple):
    """One kernel: how it is called, what it makes, and how many matrix products a pair of blocks takes."""

    name: str
    kernel: Callable[..., None]
    by: str  # the outer blocks: "q" or "kv"
    out_shape: Any
    out_specs: Any
    scratch: list[Any]
    products: int


def launch(
    program: Program, inputs: Inputs, rows: Sequence[jax.Array], pairs: Schedule, static: Static
) -> Any:
    """Run a kernel over all pairs of blocks. `rows`: d_out and values per query, where the kernel takes them."""
    own = specs(inputs, static.size, program.by)
    batch, heads, _, width = inputs.q.shape
    grid = (batch, heads, len(pairs.outer))
    if program.by == "kv":
        grid = (batch, inputs.k.shape[1], len(pairs.outer), inputs.group)
    entries = batch * heads * len(pairs.outer) * static.size.q * static.size.kv
    arrays = [*inputs[:3], *rows, *jax.tree.leaves(program.out_shape)]
    return pl.pallas_call(
        functools.partial(program.kernel, static),
        out_shape=program.out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[
                *own[:3],
                own.keys,
                own.keys,
                *[own.queries, own.line, own.line][: len(rows)],
            ],
            out_specs=program.out_specs(own),
            scratch_shapes=program.scratch,
        ),
        compiler_params=compiler_params("parallel", "parallel", *["arbitrary"] * (len(grid) - 2)),
        cost_estimate=pl.CostEstimate(
            flops=2 * program.products * entries * width,
            transcendentals=entries,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        ),
        interpret=static.interpret,
        name=program.name,
    )(*pairs, inputs.ids.q[:, None], inputs.ids.kv[:, None], *inputs[:3], *rows)
