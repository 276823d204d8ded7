"""Attention as its definition: what every faster implementation is tested against."""

import jax
import jax.numpy as jnp

# Finite: softmax of a fully masked row is then no NaN, but weights that can be set to zero.
MASKED = -1e30


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
) -> jax.Array:
    """See `llaso_jax.modeling.kernels.attention.attention`. Memory: B*N*S*T f32 scores."""
    b, s, n, h = q.shape
    t, kv = k.shape[1:3]
    # Query head i uses key/value head i // (N/K): grouping queries avoids repeating K and V.
    grouped = q.reshape(b, s, kv, n // kv, h)
    scores = jnp.einsum("BSKGH,BTKH->BKGST", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * h**-0.5
    mask = None
    if causal:
        mask = (jnp.arange(s)[:, None] >= jnp.arange(t)[None, :])[None]
    if q_segment_ids is not None and kv_segment_ids is not None:
        same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        mask = same if mask is None else same & mask
    if mask is not None:
        mask = mask[:, None, None]
        scores = jnp.where(mask, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if mask is not None:
        weights = jnp.where(mask, weights, 0)  # a query without any key gets zeros
    return jnp.einsum("BKGST,BTKH->BSKGH", weights, v).reshape(b, s, n, h)
