"""What the GPU kernels share: loads and stores up to an array's end, and the mask of a pair of blocks."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llaso_jax.modeling.kernels.attention.blocks import Padded, Spans
from llaso_jax.modeling.kernels.attention.pallas_gpu.sizes import BlockSizes


class Static(NamedTuple):
    """What a kernel is compiled for, beside its shapes."""

    causal: bool
    size: BlockSizes
    lengths: tuple[int, int]  # queries and keys
    interpret: bool


class Inputs(NamedTuple):
    """q: [B, S, N, H], k and v: [B, T, K, H], and segment ids up to whole blocks."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    ids: Padded

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.q.shape[2] // self.k.shape[2]


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """f32 product of two matrices; f32 inputs are not rounded to tf32."""
    precise = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precise)


def inside(start: Any, block: int, length: int) -> jax.Array:
    """bool[block]: positions of a block that exist."""
    return start + jnp.arange(block) < length


def load_rows(ref: Any, start: Any, block: int, length: int, *where: Any) -> jax.Array:
    """[block, H] from `start` on, zeros past `length`; `where` selects among axes between."""
    there = inside(start, block, length)[:, None]
    return plgpu.load(ref.at[(pl.ds(start, block), *where, slice(None))], mask=there, other=0)


def load_line(ref: Any, start: Any, block: int, length: int, *where: Any) -> jax.Array:
    """[block] of a value per position, zeros past `length`."""
    there = inside(start, block, length)
    return plgpu.load(ref.at[(*where, pl.ds(start, block))], mask=there, other=0)


def store_rows(ref: Any, value: jax.Array, start: Any, length: int) -> None:
    """Write [block, H] from `start` on, up to `length`."""
    there = inside(start, len(value), length)[:, None]
    plgpu.store(ref.at[pl.ds(start, len(value)), :], value.astype(ref.dtype), mask=there)


def seen(
    q_start: Any, kv_start: Any, q_ids: jax.Array, kv_ids: jax.Array, *, causal: bool
) -> jax.Array:
    """bool[queries, keys]: what is visible in a pair of blocks."""
    same = q_ids[:, None] == kv_ids[None, :]
    if not causal:
        return same
    q, kv = q_start + jnp.arange(len(q_ids)), kv_start + jnp.arange(len(kv_ids))
    return same & (q[:, None] >= kv[None, :])


def over_span(span: Any, body: Callable[..., Any], carry: Any) -> Any:
    """`body(block, carry, masked=...)` over the blocks of one outer block's span."""
    start, whole, part, end = (ref[()] for ref in span)

    def stretch(first: Any, last: Any, carry: Any, *, masked: bool) -> Any:
        return jax.lax.fori_loop(first, last, lambda i, c: body(i, c, masked=masked), carry)

    carry = stretch(start, whole, carry, masked=True)
    carry = stretch(whole, part, carry, masked=False)
    return stretch(part, end, carry, masked=True)


def span_specs(span: Spans) -> list[pl.BlockSpec]:
    """Of a grid (outer block, head, batch row): the four numbers of a program."""
    many = len(span.start) > 1
    return [pl.BlockSpec((None, None), lambda i, n, b: (b if many else 0, i)) for _ in span]


def ids_specs(ids: Padded) -> list[pl.BlockSpec]:
    """Of a grid (outer block, head, batch row): all segment ids of the row."""

    def spec(array: jax.Array) -> pl.BlockSpec:
        many = len(array) > 1
        return pl.BlockSpec((None, array.shape[1]), lambda i, n, b: (b if many else 0, 0))

    return [spec(ids.q), spec(ids.kv)]


def launch(
    kernel: Callable[..., None],
    static: Static,
    name: str,
    *,
    grid: tuple[int, ...],
    products: int,
    head_dim: int,
    heads: int,
    out_shape: Any,
    **specs: Any,
) -> Callable[..., Any]:
    """A Triton kernel that makes `products` matrix products for all scores of `heads` heads (of all rows)."""
    scores = heads * math.prod(static.lengths) // (2 if static.causal else 1)
    outputs = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(out_shape))
    flops = 2 * products * scores * head_dim
    call = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=static.size.warps, num_stages=static.size.stages
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=scores,
            bytes_accessed=2 * products * outputs,
        ),
        interpret=static.interpret,
        name=name,
        **specs,
    )
    # XLA's call of a Triton kernel has no place for an estimate; its scope's name has (sharding/hlo.py).
    return jax.named_scope(f"flops={flops}")(call)
