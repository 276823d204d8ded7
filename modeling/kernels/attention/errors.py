"""What a named implementation of attention raises where it cannot serve."""

import jax
import jax.numpy as jnp


class UnsupportedAttentionError(NotImplementedError):
    """An implementation of attention was named for a case that it cannot do. The message says why."""


def check_platform(name: str, own: str, platform: str) -> None:
    """Raise UnsupportedAttentionError unless `platform` is the implementation's own, or a CPU that interprets it."""
    if platform not in (own, "cpu"):
        raise UnsupportedAttentionError(
            f"{name} runs on {own.upper()} (on CPU interpreted), not on {platform.upper()}: choose auto."
        )


def check_dtypes(name: str, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raise UnsupportedAttentionError unless q, k and v are all f32 or all bf16."""
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise UnsupportedAttentionError(
            f"{name} takes q, k and v all float32 or all bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}."
        )


def check_head_dim(name: str, head_dim: int) -> None:
    """Raise UnsupportedAttentionError unless head_dim is a power of 2 that Triton's products take."""
    if head_dim not in (16, 32, 64, 128, 256):
        raise UnsupportedAttentionError(
            f"{name} takes a head_dim of 16, 32, 64, 128 or 256, got {head_dim}: choose chunked."
        )
