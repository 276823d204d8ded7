"""Products of linear layers in bfloat16: sums in float32, and on the CPU no product with a bfloat16 result."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llaso_jax.modeling.kernels import product
from llaso_jax.modeling.kernels.product import matrix_product


@pytest.fixture(params=[(40, 24), (24, 40)], ids=["narrows", "widens"])
def arrays(request):
    """x [2, 3, I], weight [O, I], a gradient of the result [2, 3, O]; all bfloat16."""
    inputs, outputs = request.param
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 3, inputs), (outputs, inputs), (2, 3, outputs)
    made = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return [array.astype(jnp.bfloat16) for array in made]


def exact(function, *arrays):
    """In float64, rounded once."""
    result = function(*(np.asarray(array, np.float64) for array in arrays))
    return np.asarray(result, np.float32).astype(jnp.bfloat16)


def both(x, weight, d_out):
    out, backward = jax.vjp(matrix_product, x, weight)
    return out, *backward(d_out)


def test_result_and_gradients_are_exact_sums_rounded_once(arrays):
    out, d_x, d_weight = jax.jit(both)(*arrays)
    x, weight, d_out = arrays
    np.testing.assert_array_equal(out, exact(lambda x, w: x @ w.T, x, weight))
    np.testing.assert_array_equal(d_x, exact(lambda d, w: d @ w, d_out, weight))
    np.testing.assert_array_equal(
        d_weight, exact(lambda d, x: np.einsum("BSO,BSI->OI", d, x), d_out, x)
    )


def results(*arrays) -> set[str]:
    """Element types of what products give, in the program as it is lowered."""
    text = jax.jit(lambda *given: both(*given)).lower(*arrays).as_text()
    return set(re.findall(r"dot_general.*-> tensor<(?:\d+x)*(\w+)>", text))


def test_on_the_cpu_products_give_float32_in_both_directions(arrays):
    assert results(*arrays) == {"f32"}


def test_on_accelerators_products_give_what_travels_between_devices(arrays, monkeypatch):
    monkeypatch.setattr(product, "target_device", lambda: ("tpu", "TPU v5e"))
    assert results(*arrays) == {"bf16"}


def test_float32_stays_a_plain_product(arrays):
    arrays = [array.astype(jnp.float32) for array in arrays]
    assert "custom_vjp" not in str(jax.make_jaxpr(matrix_product)(*arrays[:2]))
    out, *_ = both(*arrays)
    np.testing.assert_allclose(out, arrays[0] @ arrays[1].T, rtol=1e-6, atol=1e-6)
