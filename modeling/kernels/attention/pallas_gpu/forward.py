"""The forward kernel: FlashAttention-2's loop over keys (arXiv 2307.08691, algorithm 1), in base 2."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llaso_jax.modeling.kernels.attention.blocks import FLOOR, Spans, score_scale
from llaso_jax.modeling.kernels.attention.pallas_gpu.common import (
    Inputs,
    Static,
    dot,
    ids_specs,
    inside,
    launch,
    load_rows,
    over_span,
    seen,
    span_specs,
    store_rows,
)


def forward(inputs: Inputs, span: Spans, static: Static) -> tuple[jax.Array, jax.Array]:
    """[B, S, N, H] results and f32[B, N, S] logsumexp of the scores, base 2 (FLOOR without any key)."""
    q, k, _, ids = inputs
    batch, length, heads, width = q.shape
    group = inputs.group
    queries = pl.BlockSpec((None, length, None, width), lambda i, n, b: (b, 0, n, 0))
    keys = pl.BlockSpec((None, k.shape[1], None, width), lambda i, n, b: (b, 0, n // group, 0))
    call = launch(
        functools.partial(_kernel, static),
        static,
        "attention_forward",
        grid=(span.start.shape[1], heads, batch),
        products=2,
        head_dim=width,
        heads=batch * heads,
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        in_specs=[*span_specs(span), *ids_specs(ids), queries, keys, keys],
        out_specs=[queries, pl.BlockSpec((None, None, length), lambda i, n, b: (b, n, 0))],
    )
    return call(*span, *ids, *inputs[:3])


def _kernel(static: Static, *refs: Any) -> None:
    *span, q_ids, kv_ids, q, k, v, out, lse = refs
    block_q, block_kv = static.size[:2]
    q_length, kv_length = static.lengths
    width = q.shape[-1]
    q_start = pl.program_id(0) * block_q
    queries = load_rows(q, q_start, block_q, q_length)
    own_ids = q_ids[pl.ds(q_start, block_q)]

    def add(j: Any, carry: tuple[jax.Array, ...], *, masked: bool) -> tuple[jax.Array, ...]:
        sums, top, total = carry
        kv_start = j * block_kv
        scores = dot(queries, load_rows(k, kv_start, block_kv, kv_length).T) * score_scale(width)
        if masked:
            ids = kv_ids[pl.ds(kv_start, block_kv)]
            visible = seen(q_start, kv_start, own_ids, ids, causal=static.causal)
            scores = jnp.where(visible, scores, -jnp.inf)
        highest = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - highest[:, None])
        shrink = jnp.exp2(top - highest)
        values = load_rows(v, kv_start, block_kv, kv_length)
        sums = shrink[:, None] * sums + dot(weights.astype(v.dtype), values)
        return sums, highest, shrink * total + weights.sum(1)

    empty = (
        jnp.zeros((block_q, width), jnp.float32),
        jnp.full(block_q, FLOOR, jnp.float32),
        jnp.zeros(block_q, jnp.float32),
    )
    sums, top, total = over_span(span, add, empty)
    total = jnp.where(total == 0, 1, total)
    store_rows(out, sums / total[:, None], q_start, q_length)
    there = inside(q_start, block_q, q_length)
    plgpu.store(lse.at[pl.ds(q_start, block_q)], top + jnp.log2(total), mask=there)
