"""Attention some queries at a time: plain XLA, on every platform, with memory that grows with S and not with S*T.

The backward pass computes the scores again from q, k and the saved maximum and log-sum of each row, as in
FlashAttention (arXiv 2205.14135, algorithm 4): dS = P * (dO V^T - rowsum(dO * O)). Keys of the future are masked,
not skipped. Maximum and log-sum are kept apart: the scores of a row without any key are -1e30, where log(T) is lost.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.attention.reference import MASKED
from llaso_jax.modeling.kernels.chunks import cut, join

CHUNK = 256
"""Queries of a row and head whose scores are there at a time."""


class Segments(NamedTuple):
    """i32[B, S] and i32[B, T]: a query sees keys of its own segment."""

    q: jax.Array
    kv: jax.Array


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    chunk: int = CHUNK,
) -> jax.Array:
    """See `llaso_jax.modeling.kernels.attention.attention`. Memory: B*N*chunk*T f32 scores."""
    b, s, n, h = q.shape
    kv = k.shape[2]
    segments = None
    if q_segment_ids is not None and kv_segment_ids is not None:
        segments = Segments(q_segment_ids, kv_segment_ids)
    # Query head i uses key/value head i // (N/K): grouping queries avoids repeating K and V.
    grouped = q.reshape(b, s, kv, n // kv, h)
    out = _attention(grouped, k, v, segments, causal, min(chunk, s))
    return out.reshape(b, s, n, h)


def _value(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments | None,
    causal: bool,
    chunk: int,
) -> jax.Array:
    return _forward(q, k, v, segments, causal, chunk)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments | None,
    causal: bool,
    chunk: int,
):
    """[B, S, K, G, H] results, and what the backward pass needs: maximum and log-sum are f32[B, S, K, G]."""

    def step(_, part: _Part):
        scores, _ = _scores(part, k, segments, causal)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(-1)
        weights = (weights / total[..., None]).astype(v.dtype)
        out = jnp.einsum("BKGST,BTKH->BSKGH", weights, v, preferred_element_type=jnp.float32)
        return None, (
            out.astype(q.dtype),
            jnp.moveaxis(top, -1, 1),
            jnp.moveaxis(jnp.log(total), -1, 1),
        )

    _, results = jax.lax.scan(step, None, _parts(q, segments, chunk))
    out, top, log_sum = (join(chunks, q.shape[1]) for chunks in results)
    return out, (q, k, v, segments, out, top, log_sum)


def _backward(causal: bool, chunk: int, saved, d_out: jax.Array):
    q, k, v, segments, out, top, log_sum = saved
    # f32[B, S, K, G]: what softmax's gradient subtracts from every score of a row.
    mean = jnp.einsum("BSKGH,BSKGH->BSKG", out, d_out, preferred_element_type=jnp.float32)

    def step(sums, parts):
        part, (d_out, *of_rows) = parts
        top, log_sum, mean = (jnp.moveaxis(array, 1, -1)[..., None] for array in of_rows)
        d_k, d_v = sums
        scores, mask = _scores(part, k, segments, causal)
        weights = jnp.exp(scores - top - log_sum)
        d_v += jnp.einsum(
            "BKGST,BSKGH->BTKH", weights.astype(v.dtype), d_out, preferred_element_type=jnp.float32
        )
        d_weights = jnp.einsum("BSKGH,BTKH->BKGST", d_out, v, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - mean) * q.shape[-1] ** -0.5
        if mask is not None:  # a row without any key has weights, but no scores to change
            d_scores = jnp.where(mask, d_scores, 0)
        d_scores = d_scores.astype(q.dtype)
        d_k += jnp.einsum("BKGST,BSKGH->BTKH", d_scores, part.q, preferred_element_type=jnp.float32)
        d_q = jnp.einsum("BKGST,BTKH->BSKGH", d_scores, k, preferred_element_type=jnp.float32)
        return (d_k, d_v), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    others = tuple(cut(array, chunk) for array in (d_out, top, log_sum, mean))
    (d_k, d_v), d_q = jax.lax.scan(step, zeros, (_parts(q, segments, chunk), others))
    return join(d_q, q.shape[1]), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attention = jax.custom_vjp(_value, nondiff_argnums=(4, 5))
_attention.defvjp(_forward, _backward)


class _Part(NamedTuple):
    """Some queries [B, chunk, K, G, H], the indices i32[chunk] they have, and their segments."""

    q: jax.Array
    index: jax.Array
    segment: jax.Array | None


def _parts(q: jax.Array, segments: Segments | None, chunk: int) -> _Part:
    """All queries, chunk by chunk along a new first axis."""
    queries = cut(q, chunk)
    index = jnp.arange(len(queries) * chunk).reshape(len(queries), chunk)
    return _Part(queries, index, None if segments is None else cut(segments.q, chunk))


def _scores(
    part: _Part, k: jax.Array, segments: Segments | None, causal: bool
) -> tuple[jax.Array, jax.Array | None]:
    """f32[B, K, G, chunk, T] masked scores, and the mask, of a shape that broadcasts to theirs."""
    scores = jnp.einsum("BSKGH,BTKH->BKGST", part.q, k, preferred_element_type=jnp.float32)
    scores = scores * k.shape[-1] ** -0.5
    mask = None
    if causal:
        mask = (part.index[:, None] >= jnp.arange(k.shape[1])[None, :])[None]
    if segments is not None and part.segment is not None:
        same = part.segment[:, :, None] == segments.kv[:, None, :]
        mask = same if mask is None else same & mask
    if mask is None:
        return scores, None
    mask = mask[:, None, None]
    return jnp.where(mask, scores, MASKED), mask
