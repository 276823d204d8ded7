"""Strategies by name: the tables they make, what they refuse, and which there are for a number of devices."""

import math
import re

import pytest
from jax.sharding import PartitionSpec as P

from llaso_jax.config import load_config
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.functional import param_shardings
from llaso_jax.planning.plans import judged_plans
from llaso_jax.sharding.mesh import make_mesh, parse_mesh
from llaso_jax.sharding.rules import FSDP_TENSOR, ShardingError, to_spec
from llaso_jax.sharding.strategies import ShardingConfig, plans, strategy

Q = ("layers", "heads", "head_dim", "embed")
X = ("batch", "sequence", "embed")


@pytest.mark.parametrize(
    ("name", "stored", "used", "activation"),
    [
        ("ddp", P(None, None, None, None), P(None, None, None, None), P(("data",), None, None)),
        (
            "fsdp",
            P(None, None, None, ("fsdp",)),
            P(None, None, None, None),
            P(("data", "fsdp"), None, None),
        ),
        (
            "tensor",
            P(None, ("tensor",), None, None),
            P(None, ("tensor",), None, None),
            P(("data",), None, None),
        ),
        (
            "context-ring",
            P(None, None, None, None),
            P(None, None, None, None),
            P(("data",), ("context",), None),
        ),
        (
            "context-ulysses+tensor + fsdp",
            P(None, ("tensor",), None, ("fsdp", "context")),
            P(None, ("tensor",), None, None),
            P(("data", "fsdp"), ("context",), None),
        ),
    ],
)
def test_a_strategy_is_a_table(name: str, stored: P, used: P, activation: P):
    rules = strategy(name)
    assert to_spec(Q, rules.storage) == stored
    assert to_spec(Q, rules.compute) == used
    assert to_spec(X, rules.activation) == activation


def test_the_default_is_what_it_was():
    assert ShardingConfig().rules() == FSDP_TENSOR
    assert strategy("tensor+fsdp") == strategy("ddp+fsdp+tensor") == FSDP_TENSOR


@pytest.mark.parametrize(
    ("name", "encoder", "chunks", "stored"),
    [
        (
            "fsdp+context-ring",
            None,
            ("data", "fsdp", "context", "tensor"),
            ("fsdp", "context", "tensor"),
        ),
        ("fsdp+tensor+context-ring", None, ("data", "fsdp", "context"), ("fsdp", "context")),
        (
            "fsdp+tensor",
            "fsdp+chunks",
            ("data", "fsdp", "context", "tensor"),
            ("fsdp", "context", "tensor"),
        ),
        ("fsdp+tensor", "ddp", ("data", "fsdp"), ()),
        ("fsdp", "tensor+chunks", ("data", "fsdp", "context"), ()),
    ],
)
def test_the_encoder_splits_chunks_over_axes_of_its_own(name, encoder, chunks, stored):
    own = strategy(name, encoder).encoder
    assert own is not None
    assert own.activation["batch"] == chunks
    assert own.storage["embed"] == stored
    assert own.activation["sequence"] == ()


@pytest.mark.parametrize(
    ("name", "encoder", "told"),
    [
        (
            "fsdp+tensr",
            None,
            "sharding.strategy='fsdp+tensr': unknown part 'tensr', did you mean 'tensor'",
        ),
        ("", None, "unknown part ''"),
        ("fsdp+fsdp", None, "names 'fsdp' 2 times"),
        (
            "context-ring+context-ulysses",
            None,
            "has 2 ways to attend over parts of a sequence: choose 1 of context-ring",
        ),
        ("chunks", None, "unknown part 'chunks'"),
        ("fsdp", "context-ring", "sharding.encoder='context-ring': unknown part"),
    ],
)
def test_a_name_that_is_no_strategy_is_an_error(name, encoder, told):
    with pytest.raises(ShardingError, match=re.escape(told)):
        strategy(name, encoder)
    overrides = [f"sharding.strategy={name!r}"]
    overrides += [f"sharding.encoder={encoder}"] if encoder else []
    with pytest.raises(ConfigError, match="sharding: .*" + re.escape(told)):
        load_config("mini", overrides)


@pytest.mark.parametrize(
    ("mesh", "name", "told"),
    [
        (
            "8x1",
            "ddp",
            "axis fsdp has 8 devices, and strategy 'ddp' .* Add fsdp to sharding.strategy",
        ),
        ("4x2", "fsdp", "axis tensor has 2 devices"),
        (
            "fsdp=4,context=2",
            "fsdp+tensor",
            "context has 2 devices.* Add context-ring or context-ulysses",
        ),
    ],
)
def test_devices_without_work_are_an_error(mesh: str, name: str, told: str):
    model = load_config("mini").model
    assert model is not None
    with pytest.raises(ShardingError, match=told):
        param_shardings(model, make_mesh(mesh), strategy(name))


def test_generation_splits_rows_where_training_splits_sequences():
    rules = strategy("fsdp+tensor+context-ring")
    assert rules.whole_rows.activation["batch"] == ("data", "fsdp", "context")
    assert rules.whole_rows.activation["sequence"] == ()
    assert rules.whole_rows is rules.whole_rows
    assert FSDP_TENSOR.whole_rows is FSDP_TENSOR


@pytest.mark.parametrize("devices", [1, 2, 8, 6])
def test_plans_use_every_device_and_every_part(devices: int):
    found = list(plans(devices))
    assert len(set(found)) == len(found)
    for plan in found:
        sizes = parse_mesh(plan.mesh)
        assert math.prod(sizes.values()) == devices
        used = strategy(plan.strategy).mesh_axes
        assert {axis for axis, size in sizes.items() if size > 1} | {"data"} == set(used)
    assert ("fsdp+tensor", "fsdp=4,tensor=2") in found or devices != 8


def test_a_model_fits_some_plans_and_the_others_say_why():
    judged = {
        (fit.plan.strategy, fit.plan.mesh): fit.reason
        for fit in judged_plans(load_config("mini"), 8)
    }
    assert set(judged) == set(plans(8))
    assert judged["fsdp", "fsdp=8"] is None
    assert judged["fsdp+tensor", "fsdp=4,tensor=2"] is None
    assert (
        "4 devices of mesh axis tensor" in judged["fsdp+tensor", "fsdp=2,tensor=4"]
    )  # 2 key heads
    assert "4 query heads" in judged["context-ulysses", "context=8"]
    assert (
        judged["context-ring", "context=8"] is None
    )  # 112 positions in 16 pieces, 24 chunks over 8 devices
    assert judged["fsdp+context-ring", "fsdp=4,context=2"] is None


@pytest.mark.parametrize(
    ("overrides", "strategy_and_mesh", "told"),
    [
        (
            ["stages.0.data.sequence_length=100"],
            ("context-ring", "context=8"),
            "a sequence of 100 positions does not split into 16 equal parts",
        ),
        (
            ["stages.0.data.chunks_per_row=1", "stages.0.accumulation=2"],
            ("fsdp+context-ring", "fsdp=2,context=4"),
            "4 chunks per micro-batch (data.rows / accumulation x data.chunks_per_row) do not split over the 8",
        ),
        (
            ["stages.0.data.rows=6"],
            ("fsdp", "fsdp=8"),
            "6 rows per micro-batch (data.rows / accumulation) do not split over the 8 devices",
        ),
    ],
)
def test_batches_that_do_not_split_are_told_with_both_numbers(overrides, strategy_and_mesh, told):
    recipe = load_config("mini", overrides)
    reasons = {tuple(fit.plan): fit.reason for fit in judged_plans(recipe, 8)}
    assert told in reasons[strategy_and_mesh]
