"""Positions of a batch cut into chunks that a scan goes through, and put together again."""

import jax
import jax.numpy as jnp


def cut(array: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [count, B, chunk, ...], padded with zeros."""
    count = -(-array.shape[1] // chunk)
    pad = [(0, 0), (0, count * chunk - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    parts = jnp.pad(array, pad).reshape(len(array), count, chunk, *array.shape[2:])
    return jnp.moveaxis(parts, 1, 0)


def join(chunks: jax.Array, length: int) -> jax.Array:
    """[count, B, chunk, ...] -> [B, length, ...]: the inverse of `cut`."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(len(joined), -1, *chunks.shape[3:])[:, :length]
