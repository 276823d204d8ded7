"""The same loss and gradients on every mesh, with sharded parameters and real collectives."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from reference import jit, make_batch, random_params, tiny_config
from tolerances import LEAF, assert_close

from llaso_jax.modeling.functional import (
    abstract_params,
    bind,
    flatten,
    param_shardings,
    unflatten,
)
from llaso_jax.sharding.hlo import parse
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.rules import named_sharding, use_rules
from llaso_jax.sharding.strategies import strategy

# Everything that is split divides by 8 (fsdp) and by 4 (tensor).
CFG = tiny_config(
    audio={"encoder_attention_heads": 4}, text={"num_key_value_heads": 4, "head_dim": 8}
)


@functools.cache
def inputs():
    """(parameters, batch of 8 unequal rows)."""
    rng = np.random.default_rng(0)
    rows = []
    for length in range(4, 12):
        prompt = rng.integers(0, 48, length).tolist()
        audio = [24, 24] if length % 2 else [24]
        rows.append([[prompt, *audio, rng.integers(0, 48, 5).tolist()]])
    # A length that is cut into 16 pieces for a ring of 8.
    batch = make_batch(rows, CFG, mel_length=24, sequence=48, answers=4)
    return random_params(unflatten(abstract_params(CFG))), batch


@functools.cache
def compiled(text: str, name: str = "fsdp+tensor", encoder: str | None = None):
    """(loss, gradients, HLO) on a mesh, parameters and batch sharded."""
    mesh, rules = make_mesh(text), strategy(name, encoder)
    params, batch = inputs()
    shardings = unflatten(param_shardings(CFG, mesh, rules))
    params = jax.device_put(params, shardings)
    batch = {
        name: jax.device_put(
            array,
            named_sharding(
                name,
                array.shape,
                ("batch", *[None] * (array.ndim - 1)),
                rules.activation,
                mesh,
            ),
        )
        for name, array in batch.items()
    }

    def step(params, batch):
        with use_rules(mesh, rules):
            return jax.value_and_grad(lambda p: bind(CFG, p).loss_sum(batch))(params)

    program = jit(step, out_shardings=(None, shardings)).lower(params, batch).compile()
    loss, gradients = program(params, batch)
    for path, leaf in flatten(gradients).items():
        assert leaf.sharding == flatten(shardings)[path]
    return float(loss), jax.tree.map(np.asarray, gradients), program.as_text()


@functools.cache
def unsharded():
    """(loss, gradients) of one device without any rules."""
    params, batch = inputs()
    return jit(jax.value_and_grad(lambda p: bind(CFG, p).loss_sum(batch)))(params)


@pytest.mark.parametrize("text", ["1x1", "8x1", "4x2", "2x4", "data=2,fsdp=2,tensor=2"])
def test_loss_and_gradients_do_not_depend_on_the_mesh(text: str):
    expected_loss, expected = unsharded()
    loss, gradients, _ = compiled(text)
    assert_close(loss, expected_loss, LEAF, f"loss on {text}")
    assert_close(gradients, expected, LEAF, f"gradients on {text}")


ALL = "fsdp=2,tensor=2,context=2"
PRODUCTS = [
    ("data=8", "ddp", None),
    ("fsdp=8", "fsdp", None),
    ("data=2,tensor=4", "tensor", None),
    ("data=2,tensor=4", "tensor", "ddp"),
    ("context=8", "context-ring", None),
    ("data=2,context=4", "context-ulysses", None),
    ("fsdp=2,context=4", "fsdp+context-ring", None),
    ("fsdp=4,context=2", "fsdp+context-ulysses", "fsdp"),
    ("tensor=2,context=4", "tensor+context-ring", None),
    ("tensor=4,context=2", "tensor+context-ring", "chunks"),
    ("tensor=2,data=2,context=2", "tensor+context-ulysses", "tensor"),
    (ALL, "fsdp+tensor+context-ulysses", None),
    ("dcn_data=2,fsdp=2,tensor=2", "fsdp+tensor", "fsdp+chunks"),
    ("dcn_fsdp=2,data=2,fsdp=2", "fsdp", None),
]


@pytest.mark.parametrize(
    ("mesh", "name", "encoder"),
    [
        (ALL, "fsdp+tensor+context-ring", None),
        (ALL, "fsdp+tensor+context-ulysses", "fsdp+chunks"),
        *(pytest.param(*product, marks=pytest.mark.slow) for product in PRODUCTS),
    ],
)
def test_every_strategy_gives_the_loss_and_gradients_of_one_device(mesh, name, encoder):
    expected_loss, expected = unsharded()
    loss, gradients, _ = compiled(mesh, name, encoder)
    assert_close(loss, expected_loss, LEAF, f"loss with {name} on {mesh}")
    assert_close(gradients, expected, LEAF, f"gradients with {name} on {mesh}")


def test_a_split_sequence_is_never_gathered_in_a_layer():
    """Of arrays with a row's whole sequence and the model's width there are those of embedding and loss, not more."""
    _, _, hlo = compiled(ALL, "fsdp+tensor+context-ring", None)
    program = parse(hlo)
    width, length = CFG.text.hidden_size, 48
    for operation, times in program.operations("all-gather", "all-gather-start"):
        for _, shape in operation.shapes:
            if times > 1:
                assert length not in shape or width not in shape, (operation.name, shape)


def test_fsdp_gathers_weights_and_reduces_gradients():
    _, _, hlo = compiled("8x1")
    assert re.search(r" all-gather(-start)?\(", hlo)
    assert re.search(r" (reduce-scatter|all-reduce)(-start)?\(", hlo)
    assert "all-gather" not in compiled("1x1")[2]


def test_fsdp_gathers_one_layer_at_a_time():
    """Inside the scan: never an array of all layers, always one of each layer's matrices."""
    _, _, hlo = compiled("8x1")
    gathered = set(re.findall(r"= \(?f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", hlo))
    for path, info in abstract_params(CFG).items():
        if "/layers/" in path and "embed" in info.logical_axes:
            assert ",".join(map(str, info.shape)) not in gathered, path
            one = ",".join(map(str, info.shape[1:]))
            assert {one, f"1,{one}"} & gathered, (path, gathered)


def test_tensor_parallel_splits_attention_over_heads():
    """On 2x4 each device computes one of four heads; 20 or 3 heads must never be gathered silently."""
    cfg = dataclasses.replace(CFG, text=dataclasses.replace(CFG.text, num_key_value_heads=2))
    with pytest.raises(ValueError, match=r"2 along 'kv_heads'.*4 devices of mesh axis tensor"):
        param_shardings(cfg, make_mesh("2x4"))
    shardings = param_shardings(CFG, make_mesh("2x4"))
    q = abstract_params(CFG)["language_model/layers/self_attn/q_proj/weight"]
    sharding = shardings["language_model/layers/self_attn/q_proj/weight"]
    assert sharding.shard_shape(q.shape) == (2, 1, 8, 16)
