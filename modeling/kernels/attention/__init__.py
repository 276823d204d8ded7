"""Attention: one call, several implementations."""

from llaso_jax.modeling.kernels.attention.api import attention

__all__ = ["attention"]
