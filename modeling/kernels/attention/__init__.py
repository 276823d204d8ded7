"""Attention: one call, and one for the step of generation with its cache; several implementations of each."""

from llaso_jax.modeling.kernels.attention.api import attention
from llaso_jax.modeling.kernels.attention.decode import decode_attention, write_cache
from llaso_jax.modeling.kernels.attention.errors import UnsupportedAttentionError

__all__ = ["UnsupportedAttentionError", "attention", "decode_attention", "write_cache"]
