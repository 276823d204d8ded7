"""Linear layers over several axes: the definition, and no copy of a weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llaso_jax.modeling.layers import Linear, normal

SHAPES = {
    "matrix": ((96,), (128,)),
    "heads out": ((96,), (4, 32)),
    "heads in": ((4, 32), (96,)),
    "heads in and out": ((4, 32), (8, 16)),
}


def linear(shapes, *, bias: bool) -> Linear:
    dims_in, dims_out = shapes
    names = ("heads", "head_dim")
    return Linear(
        dims_in,
        dims_out,
        in_axes=names if len(dims_in) == 2 else ("embed",),
        out_axes=names if len(dims_out) == 2 else ("ffn",),
        bias=bias,
        init=normal(None, 96),
        bias_init=normal(1.0, 1),
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_sums_over_its_inputs(shapes, bias):
    layer = linear(shapes, bias=bias)
    x = jax.random.normal(jax.random.key(1), (2, 3, *shapes[0]))
    weight = np.asarray(layer.weight[...], np.float64)
    inner = len(shapes[0])
    axes = (range(2, 2 + inner), range(-inner, 0))
    expected = np.tensordot(np.asarray(x, np.float64), weight, axes)
    if layer.bias is not None:
        expected = expected + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_a_weight_is_read_where_it_lies(shapes):
    """XLA:CPU would transpose a copy of a weight that is given with three axes."""
    graph, state = nnx.split(linear(shapes, bias=False))
    apply = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    x = jnp.ones((1, 1, *shapes[0]))
    memory = apply.lower(state, x).compile().memory_analysis()
    assert memory is not None
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < weight_bytes / 4
