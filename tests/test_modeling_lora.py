"""LoRA in the model: what an adapter computes, where it lives, and that nothing but it changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import jit, make_batch, random_params, tiny_config
from tolerances import LEAF, assert_close
from training_setup import trainer

from llaso_jax.conversion.device_tensors import pieces_of
from llaso_jax.conversion.lora_merging import merge_pieces
from llaso_jax.modeling.compute import ComputeConfig, scan_layers
from llaso_jax.modeling.dropout import dropout, use_dropout
from llaso_jax.modeling.functional import (
    abstract_params,
    bind,
    flatten,
    init_params,
    param_shardings,
    unflatten,
)
from llaso_jax.modeling.lora import LoraRule, adapted_layer
from llaso_jax.sharding.mesh import make_mesh

BASE = tiny_config(audio={"encoder_attention_heads": 4}, text={"num_key_value_heads": 4})
RULES = (
    LoraRule("language_model/layers/self_attn/(q|o)_proj", rank=3, alpha=5.0),
    LoraRule("audio_tower/layers/(fc1|self_attn/out_proj)", rank=2, rank_stabilized=True),
    LoraRule("projector/linear_1", rank=4),
)
CFG = dataclasses.replace(BASE, lora=RULES)
ADAPTERS = (
    {"pattern": ".*/lora_[AB]/weight"},
    {"pattern": ".*", "learning_rate_scale": None},
)
BATCH = make_batch(
    [[[[1, 2, 3], 24, [4, 5, 6 + row, 7]]] for row in range(8)], BASE, mel_length=24, answers=3
)


def params(cfg=CFG):
    """Random everywhere, `lora_B` too."""
    return random_params(unflatten(abstract_params(cfg)))


def loss(cfg, weights, compute=None):
    return bind(cfg, weights, compute).loss_sum(BATCH)


def test_a_new_adapter_changes_no_parameter_and_no_answer():
    base, adapted = (flatten(init_params(cfg, jax.random.key(0))) for cfg in (BASE, CFG))
    for path, leaf in base.items():
        np.testing.assert_array_equal(adapted[path], leaf)
    added = adapted.keys() - base.keys()
    assert set(map(adapted_layer, added)) == {
        "language_model/layers/self_attn/q_proj",
        "language_model/layers/self_attn/o_proj",
        "audio_tower/layers/fc1",
        "audio_tower/layers/self_attn/out_proj",
        "projector/linear_1",
    }
    assert all(np.abs(adapted[path]).max() > 0 for path in added if "lora_A" in path)
    answers = [
        jit(lambda p, cfg=cfg: bind(cfg, p).answer_logits(BATCH))(unflatten(leaves))
        for cfg, leaves in ((CFG, adapted), (BASE, base))
    ]
    np.testing.assert_array_equal(*answers)


def test_an_adapter_computes_what_its_merged_weights_compute():
    stacked = {path for path, info in abstract_params(CFG).items() if info.stacked}
    pieces = merge_pieces(CFG, pieces_of(params(), stacked))
    merged = {
        path: np.stack([layer.read() for layer in layers]) if path in stacked else layers[0].read()
        for path, layers in pieces.items()
    }
    assert merged.keys() == abstract_params(BASE).keys()
    plain = {path: leaf for path, leaf in flatten(params()).items() if adapted_layer(path) is None}
    program = jit(lambda p: bind(BASE, p).answer_logits(BATCH))
    adapted = jit(lambda p: bind(CFG, p).answer_logits(BATCH))(params())
    assert_close(program(unflatten(merged)), adapted, LEAF, "logits")
    assert np.abs(program(unflatten(plain)) - adapted).max() > 0.01


def test_adapters_are_sharded_as_the_axes_of_their_weights():
    shardings = param_shardings(CFG, make_mesh("2x4"))
    q_proj = "language_model/layers/self_attn/q_proj"
    assert tuple(shardings[f"{q_proj}/weight"].spec) == (None, "tensor", None, "fsdp")
    assert tuple(shardings[f"{q_proj}/lora_A/weight"].spec) == (None, None, "fsdp")
    assert tuple(shardings[f"{q_proj}/lora_B/weight"].spec) == (None, "tensor", None, None)


@pytest.mark.slow
def test_the_step_is_the_same_on_a_mesh_dropout_included():
    rules = tuple(dataclasses.replace(rule, dropout=0.4) for rule in RULES)
    cfg = dataclasses.replace(CFG, lora=rules)
    results = {}
    for mesh in ("1x1", "2x4"):
        train = trainer(cfg, mesh=mesh, rules=ADAPTERS)
        losses = [float(train(BATCH).loss) for _ in range(2)]
        results[mesh] = losses, train.trained()
    np.testing.assert_allclose(results["2x4"][0], results["1x1"][0], rtol=1e-5)
    assert_close(results["2x4"][1], results["1x1"][1], 1e-3)  # Adam divides by tiny norms


def test_training_adapters_leaves_every_other_parameter_bit_identical():
    train = trainer(CFG, rules=ADAPTERS)
    before = {path: np.asarray(leaf) for path, leaf in flatten(params()).items()}
    started = train.trained()
    assert started.keys() == set(filter(adapted_layer, before))
    for _ in range(2):
        train(BATCH)
    for path, leaf in train.trained().items():
        assert np.abs(leaf - started[path]).max() > 0, path
    for path, leaf in flatten(train.frozen).items():
        np.testing.assert_array_equal(leaf, before[path])


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((100, 100))
    assert dropout(x, 0.3, name="a") is x
    with use_dropout(jax.random.key(0)):
        dropped = dropout(x, 0.3, name="a")
        np.testing.assert_array_equal(dropped, dropout(x, 0.3, name="a"))
        assert np.mean(dropped != dropout(x, 0.3, name="b")) > 0.1
        assert dropout(x, 0.0, name="a") is x
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.7)}
    assert np.mean(dropped == 0) == pytest.approx(0.3, abs=0.02)


@pytest.mark.slow
def test_masks_differ_between_steps_and_not_between_rematerialization_policies():
    cfg = dataclasses.replace(BASE, lora=(LoraRule(".*_proj", rank=2, dropout=0.5),))

    def value_and_grad(remat):
        def objective(weights, key):
            with use_dropout(key):
                return loss(cfg, weights, ComputeConfig(remat=remat))

        return jit(jax.value_and_grad(objective))

    program, weights = value_and_grad("none"), params(cfg)
    value, grads = program(weights, jax.random.key(0))
    again, same = value_and_grad("layer")(weights, jax.random.key(0))
    assert float(again) == pytest.approx(float(value), rel=1e-6)
    assert_close(flatten(same), flatten(grads), LEAF, "gradients")
    assert float(program(weights, jax.random.key(1))[0]) != float(value)
    assert float(jit(lambda p: loss(cfg, p))(weights)) != float(value)


def test_layers_have_masks_of_their_own():
    def body(x, layer):
        return x, dropout(x, 0.5, name="here")

    with use_dropout(jax.random.key(0)):
        _, kept = scan_layers(body, jnp.ones(64), {"weight": jnp.zeros((3, 1))}, "none")
    assert len({tuple(np.asarray(row)) for row in kept}) == 3


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "a", "rank": 0}, "rank=0"),
        ({"pattern": "a", "dropout": 1.0}, "dropout=1.0"),
        ({"pattern": "a", "alpha": 0}, "alpha=0"),
    ],
)
def test_rules_that_make_no_adapter_are_refused(values, told):
    with pytest.raises(ValueError, match=told):
        LoraRule(**values)


def test_a_rule_that_matches_no_linear_layer_lists_those_there_are():
    rule = LoraRule("language_model/layers/self_attn/query")
    with pytest.raises(ValueError, match=r"query.*decides for no linear(.|\n)*self_attn/q_proj"):
        abstract_params(dataclasses.replace(BASE, lora=(rule,)))


def test_the_first_rule_that_matches_decides():
    cfg = dataclasses.replace(
        BASE, lora=(LoraRule("projector/linear_0", rank=2), LoraRule("projector/.*", rank=5))
    )
    ranks = {p: i.shape[0] for p, i in abstract_params(cfg).items() if p.endswith("lora_A/weight")}
    assert ranks == {"projector/linear_0/lora_A/weight": 2, "projector/linear_1/lora_A/weight": 5}
