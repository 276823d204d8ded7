"""An implementation's own backward pass, and what it needs under a name that rematerialization policies can keep."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

RESIDUALS = "attention"
Ids = jax.Array | None
"""Segment ids of queries or of keys."""


def named(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Results and logsumexp: with them saved, a layer's scores are neither kept nor computed a third time."""
    return checkpoint_name(out, RESIDUALS), checkpoint_name(lse, RESIDUALS)


def differentiable(
    forward: Callable[..., tuple[jax.Array, Any]],
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
) -> Callable[..., jax.Array]:
    """The call (q, k, v, q_ids, kv_ids, plan) -> result of an implementation; `plan`: hashable, what is not an array.

    Args:
      forward: of the same arguments; the result and what `backward` needs.
      backward: (plan, what `forward` left, gradient of the result) -> gradients of q, k and v.
    """

    def value(q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Ids, kv_ids: Ids, plan: Any):
        return forward(q, k, v, q_ids, kv_ids, plan)[0]

    def gradients(plan: Any, saved: Any, d_out: jax.Array):
        return *backward(plan, saved, d_out), None, None

    call = jax.custom_vjp(value, nondiff_argnums=(5,))
    call.defvjp(forward, gradients)
    return call
