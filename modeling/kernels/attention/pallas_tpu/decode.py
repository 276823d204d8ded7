"""Decode attention as a TPU kernel: one query per row and the filled blocks of its cache, all heads at a time."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llaso_jax.modeling.kernels.attention.blocks import FLOOR, LANES, score_scale, whole_blocks
from llaso_jax.modeling.kernels.attention.errors import check_dtypes, check_platform
from llaso_jax.modeling.kernels.attention.pallas_tpu.common import compiler_params, precision
from llaso_jax.sharding.rules import target_device

SUBLANES = 8
BLOCK = 512
"""Keys of a step: 8 heads of 128 are 1 MiB in bf16, a copy of about 1.3 us on v5e against 0.35 us a step costs."""


def tpu_decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    *,
    block: int = BLOCK,
) -> jax.Array:
    """See `llaso_jax.modeling.kernels.attention.decode_attention`; `block` is a multiple of 128 keys.

    Raises:
      UnsupportedAttentionError: another platform than TPU, or a CPU that interprets; other dtypes than f32 or bf16.
    """
    platform, _ = target_device()
    check_platform("pallas_tpu", "tpu", platform)
    check_dtypes("pallas_tpu", q, k_cache, v_cache)
    _, batch, heads, room, width = k_cache.shape
    group = q.shape[1] // heads
    members = whole_blocks(group, SUBLANES)
    grouped = q.reshape(batch, heads, group, width)
    queries = jnp.pad(grouped, ((0, 0), (0, 0), (0, members - group), (0, 0)))
    block = min(block, whole_blocks(room, LANES))

    def at_cache(b: Any, j: Any, lengths: Any, layer: Any) -> tuple[Any, ...]:
        last = jnp.maximum(pl.cdiv(lengths[b], block) - 1, 0)
        return layer[0], b, 0, jnp.minimum(j, last), 0

    at_row = pl.BlockSpec((1, heads, members, width), lambda b, j, *_: (b, 0, 0, 0))
    keys = pl.BlockSpec((1, 1, heads, block, width), at_cache)
    out = pl.pallas_call(
        functools.partial(_kernel, block),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(room, block)),
            in_specs=[at_row, keys, keys],
            out_specs=at_row,
            scratch_shapes=[
                pltpu.VMEM((heads, members, LANES), jnp.float32),
                pltpu.VMEM((heads, members, LANES), jnp.float32),
                pltpu.VMEM((heads, members, width), jnp.float32),
            ],
        ),
        compiler_params=compiler_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * members * room * width,
            transcendentals=batch * heads * members * room,
            bytes_accessed=2 * math.prod(k_cache.shape[1:]) * k_cache.dtype.itemsize,
        ),
        interpret=platform == "cpu",
        name="attention_decode",
    )(lengths, layer[None], queries, k_cache, v_cache)
    return out[:, :, :group].reshape(q.shape)


def _kernel(
    block: int,
    lengths: Any,
    layer: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    top: Any,
    total: Any,
    sums: Any,
) -> None:
    """top, total: [K, members, LANES] maximum and sum of weights so far; sums: [K, members, H] weighted values."""
    length, step = lengths[pl.program_id(0)], pl.program_id(1)
    batched = functools.partial(
        jax.lax.dot_general, precision=precision(k.dtype), preferred_element_type=jnp.float32
    )

    @pl.when(step == 0)
    def _start() -> None:
        top[...] = jnp.full_like(top, FLOOR)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(step * block < length)
    def _add() -> None:
        width = q.shape[-1]
        scores = batched(q[0], k[0, 0], (((2,), (2,)), ((0,), (0,)))) * score_scale(width)
        index = step * block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        scores = jnp.where(index < length, scores, -jnp.inf)
        before = top[...]
        highest = jnp.maximum(before, scores.max(2, keepdims=True))
        weights = jnp.exp2(scores - highest[:, :, :1])
        shrink = jnp.exp2(before - highest)
        # Past its end a cache reads as anything, and 0 * NaN is NaN.
        values = v[0, 0]
        row = step * block + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
        values = jnp.where(row < length, values, 0)
        top[...] = highest
        total[...] = shrink * total[...] + weights.sum(2, keepdims=True)
        added = batched(weights.astype(v.dtype), values, (((2,), (1,)), ((0,), (0,))))
        sums[...] = shrink[:, :, :1] * sums[...] + added

    @pl.when(step == pl.num_programs(1) - 1)
    def _finish() -> None:
        whole = jnp.where(total[...] == 0, 1, total[...])
        out[0] = (sums[...] / whole[:, :, :1]).astype(out.dtype)
