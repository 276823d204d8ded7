"""JAX's own TPU kernel, splash attention: to compare with, and to fall back on by name."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from llaso_jax.modeling.kernels.attention.blocks import pad_ids
from llaso_jax.modeling.kernels.attention.errors import check_platform
from llaso_jax.modeling.kernels.attention.pallas_tpu.common import heads_first, heads_last
from llaso_jax.modeling.kernels.attention.pallas_tpu.sizes import BlockSizes, block_sizes
from llaso_jax.sharding.rules import target_device


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    sizes: BlockSizes | None = None,
) -> jax.Array:
    """See `llaso_jax.modeling.kernels.attention.attention`; `sizes` replaces the block sizes of the table.

    Raises:
      UnsupportedAttentionError: another platform than TPU, or a CPU that interprets.
    """
    platform, kind = target_device()
    check_platform("splash", "tpu", platform)
    lengths = q.shape[1], k.shape[1]
    size = sizes or block_sizes("backward", kind, *lengths, q.dtype.itemsize)
    # The kernel has no scale of its own.
    queries = heads_first(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), size.q)
    keys, values = (heads_first(array, size.kv) for array in (k, v))
    padded = queries.shape[2], keys.shape[2]
    kernel = _kernel(q.shape[2], padded, size, causal, platform == "cpu")
    ids = None
    if q_segment_ids is not None or padded != lengths:
        both = pad_ids(q_segment_ids, kv_segment_ids, lengths, size)
        per_row = (jnp.broadcast_to(x, (len(q), x.shape[1])) for x in both)
        ids = splash_attention_kernel.SegmentIds(*per_row)
    out = heads_last(cast(jax.Array, jax.vmap(kernel)(queries, keys, values, ids)), lengths[0])
    if q_segment_ids is None or kv_segment_ids is None:
        return out
    # Where a query sees no key the kernel averages all values.
    seen = jax.vmap(functools.partial(_sees_a_key, causal))(q_segment_ids, kv_segment_ids)
    return jnp.where(seen[..., None, None], out, 0)


def _kernel(
    heads: int, lengths: tuple[int, int], size: BlockSizes, causal: bool, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    mask = (splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask)(lengths)
    q, kv = size
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_q_dq=q,
            block_kv_dq=kv,
        ),
        interpret=interpret,
    )


def _sees_a_key(causal: bool, q_ids: jax.Array, kv_ids: jax.Array) -> jax.Array:
    """bool[S]: whether some key has the query's id, at its index or before where `causal`."""
    order = jnp.argsort(kv_ids, stable=True)
    place = jnp.minimum(jnp.searchsorted(kv_ids[order], q_ids), len(kv_ids) - 1)
    first = order[place]
    found = kv_ids[first] == q_ids
    return found & (first <= jnp.arange(len(q_ids))) if causal else found
