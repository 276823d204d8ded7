"""The one attention call of the project."""

from typing import Literal, get_args

import jax

from llaso_jax.modeling.kernels.attention.chunked import chunked_attention
from llaso_jax.modeling.kernels.attention.reference import reference_attention
from llaso_jax.sharding.rules import constrain

Implementation = Literal["auto", "reference", "chunked"]
LARGE = 1 << 20
"""Scores of one row and head (S*T) from which on `auto` no longer holds them all at once."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads.

    A query attends to the keys of its own segment and, when `causal`, to those at its own index or before.

    Args:
      q: [B, S, N, H] queries.
      k: [B, T, K, H] keys, N a multiple of K.
      v: [B, T, K, H] values.
      causal: index-based causal masking (needs S == T).
      q_segment_ids: i32[B, S]; None = one segment.
      kv_segment_ids: i32[B, T]; None = one segment. Given together with q_segment_ids.
      implementation: `reference` holds all scores; `chunked` those of some queries, and computes them
        again for gradients; `auto` is `chunked` where one row and head has LARGE scores or more.

    Returns:
      [B, S, N, H] in the dtype of q. Softmax runs in f32.

    Raises:
      ValueError: shapes that do not fit, or only one of the segment ids.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads do not split over {k.shape[2]} key/value heads evenly."
        )
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal attention needs equal lengths, got {q.shape[1]} and {k.shape[1]}."
        )
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("give both q_segment_ids and kv_segment_ids, or neither.")
    names = get_args(Implementation)
    if implementation not in names:
        raise ValueError(
            f"attention implementation {implementation!r}: choose one of {', '.join(names)}."
        )
    q = constrain(q, "batch", "sequence", "heads", "head_dim")
    k = constrain(k, "batch", "sequence", "kv_heads", "head_dim")
    v = constrain(v, "batch", "sequence", "kv_heads", "head_dim")
    if implementation == "auto":
        implementation = "chunked" if q.shape[1] * k.shape[1] >= LARGE else "reference"
    compute = chunked_attention if implementation == "chunked" else reference_attention
    out = compute(
        q, k, v, causal=causal, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids
    )
    return constrain(out, "batch", "sequence", "heads", "head_dim")
