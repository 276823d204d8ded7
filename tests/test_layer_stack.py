"""Stacks of layers that are taken apart: the same numbers, from the same memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reference import random_params, tiny_config
from test_inference_decoding import TEXT, prompts

from llaso_jax.inference.decoding import generate_tokens, place_params
from llaso_jax.inference.sampling import GenerationConfig
from llaso_jax.modeling import functional
from llaso_jax.modeling.functional import decoding_params, init_params
from llaso_jax.modeling.layer_stack import over_layers, take_apart
from llaso_jax.sharding.mesh import make_mesh

CFG = tiny_config(text={"num_hidden_layers": 3}, audio={"encoder_layers": 1})


def params():
    tree = jax.eval_shape(lambda: init_params(CFG, jax.random.key(0)))
    return random_params(tree, seed=5)


def test_layers_look_into_the_memory_of_their_stack():
    stack = jnp.arange(3 * 32 * 64, dtype=jnp.float32).reshape(3, 32, 64)
    layers = take_apart(stack)
    start = stack.unsafe_buffer_pointer()
    layer_bytes = stack.nbytes // 3
    assert [layer.unsafe_buffer_pointer() - start for layer in layers] == [
        0,
        layer_bytes,
        2 * layer_bytes,
    ]
    np.testing.assert_array_equal(np.stack(layers), np.arange(3 * 32 * 64).reshape(3, 32, 64))


def test_layers_outlive_their_stack():
    stack = jnp.full((2, 64, 64), 7.0)
    layers = take_apart(stack)
    del stack
    jnp.zeros((2, 64, 64)).block_until_ready()  # would take freed memory
    np.testing.assert_array_equal(layers[1], np.full((64, 64), 7.0))


def test_a_donated_stack_does_not_change_its_layers():
    stack = jnp.full((2, 64, 64), 7.0)
    layers = take_apart(stack)
    jax.jit(lambda x: x * 0, donate_argnums=0)(stack).block_until_ready()
    np.testing.assert_array_equal(layers[0], np.full((64, 64), 7.0))


def test_layers_are_sharded_as_their_stack():
    mesh = make_mesh("4x2")
    sharding = NamedSharding(mesh, P(None, "tensor", "fsdp"))
    stack = jax.device_put(np.arange(2 * 32 * 64, dtype=np.float32).reshape(2, 32, 64), sharding)
    for index, layer in enumerate(take_apart(stack)):
        assert layer.sharding.is_equivalent_to(NamedSharding(mesh, P("tensor", "fsdp")), 2)
        np.testing.assert_array_equal(layer, np.asarray(stack)[index])


def test_a_stack_and_its_layers_run_alike():
    rng = np.random.default_rng(0)
    stack = {"w": jnp.asarray(rng.standard_normal((3, 8, 8)), jnp.float32)}
    x = jnp.ones((2, 8))

    def step(x, layer, index):
        x = jnp.tanh(x @ layer["w"]) + index
        return x, x.sum()

    apart = {"w": take_apart(stack["w"])}
    for ours, theirs in zip(
        over_layers(step, x, apart, jnp.arange(3)),
        over_layers(step, x, stack, jnp.arange(3)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("mesh_text", [None, pytest.param("4x2", marks=pytest.mark.slow)])
def test_a_large_decoder_taken_apart_writes_the_same(monkeypatch, mesh_text):
    mesh = None if mesh_text is None else make_mesh(mesh_text)
    stored = (
        jax.tree.map(jnp.asarray, params()) if mesh is None else place_params(CFG, params(), mesh)
    )
    batch, settings = prompts(TEXT, CFG), GenerationConfig(max_new_tokens=8)
    stacked = generate_tokens(CFG, stored, batch, settings, mesh=mesh)
    assert decoding_params(CFG, stored) is stored  # small
    monkeypatch.setattr(functional, "APART_BYTES", 1)
    layers = decoding_params(CFG, stored)["language_model"]["layers"]
    assert len(layers["mlp"]["up_proj"]["weight"]) == 3
    assert isinstance(layers["mlp"]["up_proj"]["weight"], tuple)
    apart = generate_tokens(CFG, stored, batch, settings, mesh=mesh)
    np.testing.assert_array_equal(apart.tokens, stacked.tokens)
