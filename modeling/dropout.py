"""Dropout as a pure function: masks come from a key that the caller activates, and none active means none dropped.

    with use_dropout(key):
        loss = bind(cfg, params).loss_sum(batch)

A stack of layers hands each layer a key of its own (`layer_keys`), so a mask depends on the key, the layer and the
name of the place it is drawn at, and not on mesh or rematerialization.
"""

import contextlib
import contextvars
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_active: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar(
    "dropout_key", default=None
)


@contextlib.contextmanager
def use_dropout(key: jax.Array | None) -> Iterator[None]:
    """While tracing inside this context, `dropout` draws its masks from `key`; None: nothing is dropped."""
    token = _active.set(key)
    try:
        yield
    finally:
        _active.reset(token)


def layer_keys(num: int) -> jax.Array | None:
    """One key per layer from the active one, to be scanned with the layers; None if none is active."""
    key = _active.get()
    return None if key is None else jax.random.split(key, num)


def dropout(x: jax.Array, rate: float, *, name: str) -> jax.Array:
    """Zero each entry of `x` with probability `rate` and scale the others by 1 / (1 - rate), if a key is active.

    Args:
      x: any shape.
      rate: 0 <= rate < 1.
      name: of the place in the model: two places with one name drop the same entries.

    Source: torch.nn.Dropout.
    """
    key = _active.get()
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(
        jax.random.fold_in(key, zlib.crc32(name.encode())), 1 - rate, x.shape
    )
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
