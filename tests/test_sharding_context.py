"""Attention over sequences that lie on several devices: what one device gives, and the bytes that move for it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import random
from reference import jit
from tolerances import LEAF, assert_close

from llaso_jax.modeling.kernels.attention import UnsupportedAttentionError, attention
from llaso_jax.modeling.kernels.attention.reference import reference_attention
from llaso_jax.modeling.kernels.attention.ulysses import key_copies
from llaso_jax.sharding.context import zigzag_order
from llaso_jax.sharding.hlo import parse
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.rules import ShardingError, use_rules
from llaso_jax.sharding.strategies import strategy

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 64, 8, 2, 16


class Case(NamedTuple):
    """One call: which mesh and strategy, and how it is masked."""

    mesh: str
    strategy: str
    causal: bool
    ids: str | None
    zigzag: bool = False
    implementation: str = "auto"
    kv_heads: int = KV_HEADS


CASES = {
    "ulysses, fewer key heads than devices": Case("context=8", "context-ulysses", True, "packed"),
    "ulysses, not causal": Case("context=8", "context-ulysses", False, None),
    "ulysses, with tensor": Case(
        "data=2,tensor=2,context=2", "tensor+context-ulysses", True, "packed", kv_heads=4
    ),
    "ring, zig-zag": Case("context=8", "context-ring", True, "packed", zigzag=True),
    "ring, in order": Case("context=4,data=2", "context-ring", True, "packed"),
    "ring, queries without any key": Case("context=8", "context-ring", False, "apart"),
    "ring of two, with tensor": Case(
        "data=2,tensor=2,context=2", "tensor+context-ring", True, "packed", zigzag=True
    ),
}
SLOW = {
    f"{kind}, {name}": Case(
        "context=4,data=2", f"context-{kind}", True, "packed", kind == "ring", name
    )
    for kind in ("ring", "ulysses")
    for name in ("pallas_tpu", "pallas_gpu")
}


def segments(kind: str | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """i32[ROWS, LENGTH] of queries and keys: three samples and padding, and only padding; or a row that sees no key."""
    packed = np.repeat([1, 2, 3, 0], [9, 30, 14, 11])
    own = np.stack([packed, np.zeros(LENGTH)]).astype(np.int32)
    return {
        None: (None, None),
        "packed": (own, own),
        "apart": (own, np.stack([packed, packed]) + 1),
    }[kind]


def inputs(kv_heads: int) -> tuple[np.ndarray, ...]:
    """q, k, v, and what outputs are weighed by."""
    return tuple(
        random(ROWS, LENGTH, heads, WIDTH, seed=seed)
        for seed, heads in enumerate((HEADS, kv_heads, kv_heads, HEADS))
    )


def results(compute, q, k, v, weight) -> dict[str, jax.Array]:
    """The output, and the gradients of q, k and v."""

    def objective(q, k, v):
        out = compute(q, k, v)
        return (out * weight).sum(), out

    (_, out), grads = jax.value_and_grad(objective, (0, 1, 2), has_aux=True)(q, k, v)
    return {"out": out, **dict(zip(("d_q", "d_k", "d_v"), grads, strict=True))}


@functools.cache
def expected(causal: bool, ids: str | None, kv_heads: int) -> dict[str, np.ndarray]:
    q_ids, kv_ids = segments(ids)
    compute = functools.partial(
        reference_attention, causal=causal, q_segment_ids=q_ids, kv_segment_ids=kv_ids
    )
    return jax.tree.map(np.asarray, jit(functools.partial(results, compute))(*inputs(kv_heads)))


@functools.cache
def measured(case: Case) -> tuple[dict[str, np.ndarray], str]:
    """Results in their first order, and the program, on 8 devices."""
    order = zigzag_order(LENGTH, int(case.mesh.split("context=")[1][0]))
    order = order if case.zigzag else np.arange(LENGTH)
    q_ids, kv_ids = (
        None if ids is None else jnp.asarray(ids[:, order]) for ids in segments(case.ids)
    )
    compute = functools.partial(
        attention,
        causal=case.causal,
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        zigzag=case.zigzag,
        implementation=case.implementation,
    )
    with use_rules(make_mesh(case.mesh), strategy(case.strategy)):
        arrays = [x[:, order] for x in inputs(case.kv_heads)]
        program = jit(functools.partial(results, compute)).lower(*arrays).compile()
    back = np.argsort(order)
    found = {name: np.asarray(x)[:, back] for name, x in program(*arrays).items()}
    return found, program.as_text()


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_outputs_and_gradients_are_those_of_one_device(name: str):
    case = {**CASES, **SLOW}[name]
    assert_close(measured(case)[0], expected(case.causal, case.ids, case.kv_heads), LEAF, name)


def moved(hlo: str, opcode: str) -> int:
    """Bytes that one device gives to the collectives called `opcode`, loops counted as often as they run."""
    total = 0
    for operation, times in parse(hlo).operations(opcode, f"{opcode}-start"):
        assert {kind for kind, _ in operation.shapes} <= {"f32", "s32"}
        total += times * 4 * sum(int(np.prod(shape)) for _, shape in operation.shapes)
    return total


@pytest.mark.parametrize("name", ["ulysses, fewer key heads than devices", "ulysses, with tensor"])
def test_ulysses_exchanges_the_bytes_of_its_formula(name: str):
    case = CASES[name]
    mesh = make_mesh(case.mesh).shape
    rows, ranks = ROWS // mesh["data"], mesh["context"]
    heads, kv_heads = HEADS // mesh["tensor"], case.kv_heads // mesh["tensor"]
    copies = key_copies(kv_heads, ranks)
    assert copies == {8: 4, 2: 1}[ranks]
    forward = 4 * rows * LENGTH // ranks * WIDTH * (2 * heads + 2 * copies * kv_heads)
    assert moved(measured(case)[1], "all-to-all") == 2 * forward, "forward, and as much back"
    assert moved(measured(case)[1], "collective-permute") == 0


@pytest.mark.parametrize("name", ["ring, zig-zag", "ring of two, with tensor"])
def test_a_ring_passes_on_the_bytes_of_its_formula(name: str):
    case = CASES[name]
    mesh = make_mesh(case.mesh).shape
    ranks = mesh["context"]
    positions = ROWS // mesh["data"] * LENGTH // ranks
    keys = 4 * positions * 2 * case.kv_heads // mesh["tensor"] * WIDTH
    ids = 4 * positions
    # In a program of one layer XLA sends a device's own keys on once, for the forward and the backward pass.
    there_and_back = (2 * (ranks - 1) - 1) * (keys + ids)
    assert moved(measured(case)[1], "collective-permute") == there_and_back + ranks * keys
    assert moved(measured(case)[1], "all-to-all") == 0


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zig_zag_gives_every_device_as_many_causal_pairs(ranks: int):
    order = zigzag_order(64, ranks)
    assert sorted(order) == list(range(64))
    pairs = [(part + 1).sum() for part in order.reshape(ranks, -1)]
    assert len(set(pairs)) == 1
    in_order = [(part + 1).sum() for part in np.arange(64).reshape(ranks, -1)]
    assert max(in_order) > 1.4 * pairs[0]


@pytest.mark.parametrize(
    ("name", "length", "heads", "options", "told"),
    [
        (
            "context-ring",
            56,
            8,
            {"zigzag": True},
            r"56 positions .* into 16 equal .*sequence_length",
        ),
        ("context-ulysses", 60, 8, {}, r"60 positions does not split into 8 equal parts"),
        ("context-ulysses", 64, 12, {}, r"12 query heads .* to 8 devices .*or context-ring"),
        ("context-ulysses", 64, 8, {"zigzag": True}, r"zigzag is the order of a ring"),
    ],
)
def test_what_cannot_be_split_is_an_error_with_both_numbers(name, length, heads, options, told):
    q = jnp.zeros((1, length, heads, 4))
    with use_rules(make_mesh("context=8"), strategy(name)):
        for implementation in ("auto", "chunked"):
            with pytest.raises((ShardingError, ValueError), match=told):
                attention(q, q, q, causal=True, implementation=implementation, **options)


def test_a_ring_of_an_implementation_without_partial_results_is_refused_by_name():
    q = jnp.zeros((1, 64, 8, 4))
    with (
        use_rules(make_mesh("context=8"), strategy("context-ring")),
        pytest.raises(
            UnsupportedAttentionError, match="splash cannot attend to a part of the keys"
        ),
    ):
        attention(q, q, q, causal=True, implementation="splash")
