"""cuDNN's attention on NVIDIA GPUs, through jax.nn.dot_product_attention."""

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.attention.errors import UnsupportedAttentionError
from llaso_jax.sharding.rules import target_device


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
) -> jax.Array:
    """See `llaso_jax.modeling.kernels.attention.attention`. Not for a model's rows, which have segment ids always.

    Raises:
      UnsupportedAttentionError: another platform, another dtype than bf16, or segment ids, which cuDNN knows only as a
        dense mask of S x T entries.
    """
    platform, _ = target_device()
    if platform != "gpu":
        raise UnsupportedAttentionError(f"cudnn runs on NVIDIA GPUs, not on {platform}.")
    if q_segment_ids is not None or kv_segment_ids is not None:
        raise UnsupportedAttentionError(
            "cudnn takes no segment ids, which the decoder's rows always have: choose pallas_gpu or auto."
        )
    if q.dtype != jnp.bfloat16:
        raise UnsupportedAttentionError(
            f"cudnn takes bfloat16, got {q.dtype}: set precision.compute to bfloat16 or choose pallas_gpu."
        )
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
