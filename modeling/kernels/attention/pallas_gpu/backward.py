"""The backward kernels: dQ by blocks of queries, dK and dV by blocks of keys (arXiv 2307.08691, algorithm 2).

Two kernels instead of one with atomic sums: results are the same in every run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from llaso_jax.modeling.kernels.attention.blocks import Spans, score_scale
from llaso_jax.modeling.kernels.attention.pallas_gpu.common import (
    Inputs,
    Static,
    dot,
    ids_specs,
    launch,
    load_line,
    load_rows,
    over_span,
    seen,
    span_specs,
    store_rows,
)


class Rows(NamedTuple):
    """Of each query: d_out [B, S, N, H], and f32[B, N, S] logsumexp and mean, the sum of d_out * out."""

    d_out: jax.Array
    lse: jax.Array
    mean: jax.Array


def backward_q(inputs: Inputs, rows: Rows, span: Spans, static: Static) -> jax.Array:
    """Gradient of q: [B, S, N, H]."""
    q, k, _, ids = inputs
    batch, length, heads, width = q.shape
    group = inputs.group
    queries = pl.BlockSpec((None, length, None, width), lambda i, n, b: (b, 0, n, 0))
    keys = pl.BlockSpec((None, k.shape[1], None, width), lambda i, n, b: (b, 0, n // group, 0))
    line = pl.BlockSpec((None, None, length), lambda i, n, b: (b, n, 0))
    call = launch(
        functools.partial(_kernel_q, static),
        static,
        "attention_backward_q",
        grid=(span.start.shape[1], heads, batch),
        products=3,
        head_dim=width,
        heads=batch * heads,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        in_specs=[*span_specs(span), *ids_specs(ids), queries, keys, keys, queries, line, line],
        out_specs=queries,
    )
    return call(*span, *ids, *inputs[:3], *rows)


def _kernel_q(static: Static, *refs: Any) -> None:
    *span, q_ids, kv_ids, q, k, v, d_out, lse, mean, d_q = refs
    block_q, block_kv = static.size[:2]
    q_length, kv_length = static.lengths
    width = q.shape[-1]
    q_start = pl.program_id(0) * block_q
    queries, d_rows = (load_rows(x, q_start, block_q, q_length) for x in (q, d_out))
    own_lse, own_mean = (load_line(x, q_start, block_q, q_length) for x in (lse, mean))
    own_ids = q_ids[pl.ds(q_start, block_q)]

    def add(j: Any, sums: jax.Array, *, masked: bool) -> jax.Array:
        kv_start = j * block_kv
        keys, values = (load_rows(x, kv_start, block_kv, kv_length) for x in (k, v))
        scores = dot(queries, keys.T) * score_scale(width)
        if masked:
            ids = kv_ids[pl.ds(kv_start, block_kv)]
            visible = seen(q_start, kv_start, own_ids, ids, causal=static.causal)
            scores = jnp.where(visible, scores, -jnp.inf)
        weights = jnp.exp2(scores - own_lse[:, None])
        d_scores = weights * (dot(d_rows, values.T) - own_mean[:, None])
        return sums + dot(d_scores.astype(k.dtype), keys)

    sums = over_span(span, add, jnp.zeros((block_q, width), jnp.float32))
    store_rows(d_q, sums * width**-0.5, q_start, q_length)


def backward_kv(
    inputs: Inputs, rows: Rows, span: Spans, static: Static
) -> tuple[jax.Array, jax.Array]:
    """Gradients of k and v: [B, T, K, H], summed over the query heads of each."""
    q, k, _, ids = inputs
    batch, length, heads, width = k.shape
    group, q_length = inputs.group, q.shape[1]
    queries = pl.BlockSpec((None, q_length, group, width), lambda j, n, b: (b, 0, n, 0))
    keys = pl.BlockSpec((None, length, None, width), lambda j, n, b: (b, 0, n, 0))
    line = pl.BlockSpec((None, group, q_length), lambda j, n, b: (b, n, 0))
    shape = jax.ShapeDtypeStruct(k.shape, k.dtype)
    call = launch(
        functools.partial(_kernel_kv, static),
        static,
        "attention_backward_kv",
        grid=(span.start.shape[1], heads, batch),
        products=4,
        head_dim=width,
        heads=batch * q.shape[2],
        out_shape=(shape, shape),
        in_specs=[*span_specs(span), *ids_specs(ids), queries, keys, keys, queries, line, line],
        out_specs=[keys, keys],
    )
    return call(*span, *ids, *inputs[:3], *rows)


def _kernel_kv(static: Static, *refs: Any) -> None:
    *span, q_ids, kv_ids, q, k, v, d_out, lse, mean, d_k, d_v = refs
    block_q, block_kv = static.size[:2]
    q_length, kv_length = static.lengths
    _, group, width = q.shape
    kv_start = pl.program_id(0) * block_kv
    keys, values = (load_rows(x, kv_start, block_kv, kv_length) for x in (k, v))
    own_ids = kv_ids[pl.ds(kv_start, block_kv)]

    def add(
        i: Any, carry: tuple[jax.Array, jax.Array], *, member: Any, masked: bool
    ) -> tuple[jax.Array, jax.Array]:
        k_sums, v_sums = carry
        q_start = i * block_q
        queries, d_rows = (load_rows(x, q_start, block_q, q_length, member) for x in (q, d_out))
        own_lse, own_mean = (load_line(x, q_start, block_q, q_length, member) for x in (lse, mean))
        scores = dot(queries, keys.T) * score_scale(width)
        if masked:
            ids = q_ids[pl.ds(q_start, block_q)]
            visible = seen(q_start, kv_start, ids, own_ids, causal=static.causal)
            scores = jnp.where(visible, scores, -jnp.inf)
        weights = jnp.exp2(scores - own_lse[:, None])
        v_sums += dot(weights.astype(d_out.dtype).T, d_rows)
        d_scores = weights * (dot(d_rows, values.T) - own_mean[:, None])
        return k_sums + dot(d_scores.astype(q.dtype).T, queries), v_sums

    def of_head(member: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return over_span(span, functools.partial(add, member=member), carry)

    zeros = jnp.zeros((block_kv, width), jnp.float32)
    k_sums, v_sums = jax.lax.fori_loop(0, group, of_head, (zeros, zeros))
    store_rows(d_k, k_sums * width**-0.5, kv_start, kv_length)
    store_rows(d_v, v_sums, kv_start, kv_length)
