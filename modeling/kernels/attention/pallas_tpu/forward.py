"""The forward kernel: FlashAttention's running softmax (arXiv 2205.14135, algorithm 1), in base 2."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llaso_jax.modeling.kernels.attention.blocks import FLOOR, LANES, Schedule
from llaso_jax.modeling.kernels.attention.pallas_tpu.common import (
    Inputs,
    Program,
    Static,
    column,
    dot,
    edges,
    hide,
    launch,
    row_of,
    visit,
)


def forward(inputs: Inputs, pairs: Schedule, static: Static) -> tuple[jax.Array, jax.Array]:
    """[B, N, S', H] results and f32[B, N, 1, S'] logsumexp of the scores, base 2 (FLOOR without any key)."""
    batch, heads, length, width = inputs.q.shape
    block = static.size.q
    program = Program(
        "attention_forward",
        _kernel,
        by="q",
        out_shape=(
            jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ),
        out_specs=lambda own: [own.queries, own.line],
        scratch=[
            pltpu.VMEM((block, LANES), jnp.int32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, width), jnp.float32),
        ],
        products=2,
    )
    return launch(program, inputs, (), pairs, static)


def _kernel(static: Static, outer: Any, inner: Any, kind: Any, *refs: Any) -> None:
    """top, total: maximum and sum of the weights of each query so far; sums: its weighted values."""
    q_ids, kv_ids, q, k, v, out, lse, own_ids, top, total, sums = refs
    row, pair = row_of(pl.program_id(0), kind), pl.program_id(2)
    first, last = edges(outer, pair)

    @pl.when(first)
    def _start() -> None:
        own_ids[...] = column(q_ids[0])
        top[...] = jnp.full_like(top, FLOOR)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def add(*, masked: bool) -> None:
        scores = dot(q[0, 0], k[0, 0], (1, 1)) * static.scale
        if masked:
            ids = own_ids[:, :1], kv_ids[0]
            scores = hide(static, scores, ids, (outer[pair], inner[row, pair]), 0)
        before = top[...]
        highest = jnp.maximum(before, scores.max(1, keepdims=True))
        weights = jnp.exp2(scores - highest[:, :1])
        shrink = jnp.exp2(before - highest)
        top[...] = highest
        total[...] = shrink * total[...] + weights.sum(1, keepdims=True)
        sums[...] = shrink[:, :1] * sums[...] + dot(weights.astype(v.dtype), v[0, 0], (1, 0))

    visit(kind[row, pair], add)

    @pl.when(last)
    def _finish() -> None:
        whole = jnp.where(total[...] == 0, 1, total[...])
        out[0, 0] = (sums[...] / whole[:, :1]).astype(out.dtype)
        lse[0, 0] = (top[...] + jnp.log2(whole)).T[:1]
