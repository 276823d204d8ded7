"""Decode attention as a GPU kernel: the cache in parts that run side by side, their results joined by their logsumexp.

One query per row keeps few programs busy, so each takes PART keys of one row and head (Flash-Decoding: Dao et al.,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Parts past a row's length end at once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llaso_jax.modeling.kernels.attention.blocks import FLOOR, score_scale
from llaso_jax.modeling.kernels.attention.errors import (
    check_dtypes,
    check_head_dim,
    check_platform,
)
from llaso_jax.modeling.kernels.attention.pallas_gpu.common import dot
from llaso_jax.sharding.rules import target_device

PART = 512
"""Keys of a program: 1,600 positions of 8 rows and 8 heads are 256 programs for the 132 cores of an H100."""
BLOCK = 64
MEMBERS = 16
"""Rows of a matrix product at least: a group's queries are padded to them."""


def gpu_decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    *,
    part: int = PART,
    block: int = BLOCK,
) -> jax.Array:
    """See `llaso_jax.modeling.kernels.attention.decode_attention`; `part` is a multiple of `block` keys.

    Raises:
      UnsupportedAttentionError: another platform than GPU, or a CPU that interprets; a head_dim that is not a power
        of 2 from 16 to 256.
    """
    platform, _ = target_device()
    check_platform("pallas_gpu", "gpu", platform)
    _, batch, heads, room, width = k_cache.shape
    check_head_dim("pallas_gpu", width)
    check_dtypes("pallas_gpu", q, k_cache, v_cache)
    group = q.shape[1] // heads
    members = max(MEMBERS, pl.next_power_of_2(group))
    grouped = q.reshape(batch, heads, group, width)
    queries = jnp.pad(grouped, ((0, 0), (0, 0), (0, members - group), (0, 0)))
    parts = pl.cdiv(room, part)
    whole_cache = pl.BlockSpec(k_cache.shape, lambda i, n, b: (0,) * 5)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, part, block),
        grid=(parts, heads, batch),
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, parts, members, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, parts, members), jnp.float32),
        ),
        in_specs=[
            pl.BlockSpec((None,), lambda i, n, b: (b,)),
            pl.BlockSpec((), lambda i, n, b: ()),
            pl.BlockSpec((None, None, members, width), lambda i, n, b: (b, n, 0, 0)),
            whole_cache,
            whole_cache,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, members, width), lambda i, n, b: (b, n, i, 0, 0)),
            pl.BlockSpec((None, None, None, members), lambda i, n, b: (b, n, i, 0)),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * members * room * width,
            transcendentals=batch * heads * members * room,
            bytes_accessed=2 * math.prod(k_cache.shape[1:]) * k_cache.dtype.itemsize,
        ),
        interpret=platform == "cpu",
        name="attention_decode",
    )(lengths, layer, queries, k_cache, v_cache)
    weights = jnp.exp2(lse - lse.max(2, keepdims=True))
    total = weights.sum(2)
    joined = (weights[..., None] * out).sum(2) / total[..., None]
    return joined[:, :, :group].astype(q.dtype).reshape(q.shape)


def _kernel(part: int, block: int, *refs: Any) -> None:
    length_ref, layer_ref, q, k, v, out, lse = refs
    length, layer = length_ref[()], layer_ref[()]
    first = pl.program_id(0) * part
    where = layer, pl.program_id(2), pl.program_id(1)
    queries = q[...]
    members, width = queries.shape

    def add(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sums, top, total = carry
        start = first + i * block
        there = start + jnp.arange(block) < length

        def rows(ref: Any) -> jax.Array:
            at = ref.at[(*where, pl.ds(start, block), slice(None))]
            return plgpu.load(at, mask=there[:, None], other=0)

        scores = dot(queries, rows(k).T) * score_scale(width)
        scores = jnp.where(there[None, :], scores, -jnp.inf)
        highest = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - highest[:, None])
        shrink = jnp.exp2(top - highest)
        sums = shrink[:, None] * sums + dot(weights.astype(v.dtype), rows(v))
        return sums, highest, shrink * total + weights.sum(1)

    empty = (
        jnp.zeros((members, width), jnp.float32),
        jnp.full(members, FLOOR, jnp.float32),
        jnp.zeros(members, jnp.float32),
    )
    left = jnp.clip(length - first, 0, part)
    sums, top, total = jax.lax.fori_loop(0, pl.cdiv(left, block), add, empty)
    total = jnp.where(total == 0, 1, total)
    out[...] = sums / total[:, None]
    lse[...] = top + jnp.log2(total)
