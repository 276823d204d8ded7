"""The product of a linear layer, x W^T, in the form that each platform is fast at.

XLA:CPU has fast bfloat16 products only where the result is float32: on two cores with AMX, 1536 x 3072 by 3072 x 8192
takes 121 ms so, 485 ms in float32 and 420 ms with a bfloat16 result (1536 x 576 by 576 x 1536: 6, 18 and 19 ms). JAX
differentiates such a product into products of float32 with bfloat16, which are slow again: hence a gradient of its
own. (That of the weight contracts rows, and takes as long as in float32.) Accelerators keep the plain product, whose
sums over devices travel in bfloat16.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llaso_jax.sharding.rules import target_device

PRODUCT = "matrix_product"
"""Name of results for rematerialization: a policy sees no product inside a custom gradient."""


def matrix_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x W^T.

    Args:
      x: [..., I].
      weight: [O, I], of the same dtype.

    Returns:
      [..., O] in that dtype; sums are float32.
    """
    if x.dtype == jnp.bfloat16 and target_device()[0] == "cpu":
        return checkpoint_name(_wide_product(x, weight), PRODUCT)
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


@jax.custom_vjp
def _wide_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _product(x, weight, x.ndim - 1, 1).astype(x.dtype)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _wide_product(x, weight), (x, weight)


def _backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    d_x = _product(d_out, weight, d_out.ndim - 1, 0).astype(x.dtype)
    return d_x, _of_rows(d_out, x).astype(weight.dtype)


_wide_product.defvjp(_forward, _backward)


def _of_rows(d_out: jax.Array, x: jax.Array) -> jax.Array:
    """f32[O, I]: the gradient of the weight. XLA:CPU transposes the first operand: the narrower one is."""
    d_out, x = (array.reshape(-1, array.shape[-1]) for array in (d_out, x))
    if d_out.shape[1] <= x.shape[1]:
        return _product(d_out, x, 0, 0)
    return _product(x, d_out, 0, 0).T


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """f32: `a` and `b` contracted over one axis of each."""
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
