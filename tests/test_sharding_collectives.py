"""Bytes between devices: compiled programs against sums by hand, and every way that XLA writes groups."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llaso_jax.sharding.collectives import axes_of, collective_bytes, collectives
from llaso_jax.sharding.hlo import HloError, parse
from llaso_jax.sharding.mesh import make_mesh

B, S, D, F = 16, 8, 32, 64
FLOAT = 4


class Case(NamedTuple):
    """A program on a mesh, and what each device sends: by axis and kind."""

    mesh: str
    program: Callable[[Mesh], tuple[Callable, list[tuple[tuple[int, ...], P]]]]
    expected: dict[str, dict[str, float]]


def mlp(x, up, down):
    return jnp.tanh(x @ up) @ down


def square(x, *weights):
    return (mlp(x, *weights) ** 2).sum()


def ddp(mesh: Mesh):
    """Rows split, weights on every device: gradients are summed over all."""
    gradient = jax.grad(square, (1, 2))
    whole = NamedSharding(mesh, P())
    step = lambda *inputs: jax.lax.with_sharding_constraint(gradient(*inputs), whole)  # noqa: E731
    return step, [((B, D), P("data")), ((D, F), P()), ((F, D), P())]


def fsdp(mesh: Mesh):
    """Weights split too: gathered for use, gradients summed into the shards."""

    def loss(x, up, down):
        whole = [jax.lax.all_gather(w, "fsdp", axis=0, tiled=True) for w in (up, down)]
        return square(x, *whole)

    split = P("fsdp")
    step = jax.shard_map(
        jax.grad(loss, (1, 2)), mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )
    return step, [((B, D), split), ((D, F), split), ((F, D), split)]


def tensor(mesh: Mesh):
    """The hidden units split: the second product is a sum over devices, and so is the gradient of the input."""

    def step(x, up, down):
        return jax.value_and_grad(lambda x: square(x, up, down))(x)[1]

    return step, [((B, D), P("fsdp")), ((D, F), P(None, "tensor")), ((F, D), P("tensor"))]


def ulysses(mesh: Mesh):
    """Queries, keys and values change from a part of the positions to a part of the heads, results change back."""

    def attend(q, k, v):
        q, k, v = (jax.lax.all_to_all(x, "context", 2, 1, tiled=True) for x in (q, k, v))
        out = jax.nn.softmax(jnp.einsum("bsnh,btnh->bnst", q, k)) @ v.transpose(0, 2, 1, 3)
        return jax.lax.all_to_all(out.transpose(0, 2, 1, 3), "context", 1, 2, tiled=True)

    spec = P("data", "context")
    function = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return function, [((2, S, 4, D), spec)] * 3


def ring(mesh: Mesh):
    """Keys and values go once around, a neighbour at a time."""
    n = mesh.shape["context"]

    def attend(q, k, v):
        def turn(carry, _):
            k, v, out = carry
            out = out + jax.nn.softmax(jnp.einsum("bsnh,btnh->bnst", q, k)) @ v.transpose(
                0, 2, 1, 3
            )
            pairs = [(i, (i + 1) % n) for i in range(n)]
            k, v = (jax.lax.ppermute(x, "context", pairs) for x in (k, v))
            return (k, v, out), None

        b, s, heads, d = q.shape
        return jax.lax.scan(turn, (k, v, jnp.zeros((b, heads, s, d))), None, length=n - 1)[0][2]

    spec = P("data", "context")
    out = P("data", None, "context")
    function = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    return function, [((2, S, 4, D), spec)] * 3


WEIGHTS = 2 * D * F * FLOAT
HEADS = S * 4 * D * FLOAT  # of one row: q, k, v or the output
CASES = {
    "DDP": Case("data=8", ddp, {"data": {"all-reduce": 2 * 7 / 8 * WEIGHTS}}),
    "DDP over a part": Case(
        "data=2,tensor=1,fsdp=1", ddp, {"data": {"all-reduce": 2 * 1 / 2 * WEIGHTS}}
    ),
    "FSDP": Case(
        "8x1", fsdp, {"fsdp": {"all-gather": 7 / 8 * WEIGHTS, "reduce-scatter": 7 / 8 * WEIGHTS}}
    ),
    # Each device has B / 2 rows; forward once, backward once.
    "TP": Case("2x4", tensor, {"tensor": {"all-reduce": 2 * 2 * 3 / 4 * B / 2 * D * FLOAT}}),
    "Ulysses": Case(
        "data=2,context=4", ulysses, {"context": {"all-to-all": 4 * 3 / 4 * HEADS / 4}}
    ),
    "ring": Case("data=2,context=4", ring, {"context": {"collective-permute": 3 * 2 * HEADS / 4}}),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_formulas(name: str):
    case = CASES[name]
    mesh = make_mesh(case.mesh)
    function, inputs = case.program(mesh)
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in inputs
    ]
    program = parse(jax.jit(function).lower(*shapes).compile().as_text())
    sent = collective_bytes(program, mesh.shape)
    assert set(sent) == set(case.expected)
    for axis, kinds in case.expected.items():
        assert sent[axis] == pytest.approx(kinds, rel=0.01)


# --- how XLA writes them --------------------------------------------------------------------------


def text(operation: str, *, inputs: str = "f32[64]{0}", result: str = "f32[64]{0}") -> str:
    lines = ["ENTRY %main (a: f32[64]) -> f32[64] {", f"  %a = {inputs} parameter(0)"]
    return "\n".join([*lines, f"  ROOT %b = {result} {operation}", "}\n"])


MESH = {"data": 1, "fsdp": 4, "tensor": 2}
ROWS = ((0, 1), (2, 3), (4, 5), (6, 7))
COLUMNS = ((0, 2, 4, 6), (1, 3, 5, 7))


@pytest.mark.parametrize(
    ("written", "groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ROWS, ("tensor",)),
        ("{{0,2,4,6},{1,3,5,7}}", COLUMNS, ("fsdp",)),
        ("[4,2]<=[8]", ROWS, ("tensor",)),
        ("[2,4]<=[4,2]T(1,0)", COLUMNS, ("fsdp",)),
        ("[1,8]<=[8]", (tuple(range(8)),), ("fsdp", "tensor")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ROWS, ("tensor",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", COLUMNS, ("fsdp",)),
        ("mesh['x'=8] {'x':(4)2}", ROWS, ("tensor",)),
        ("mesh['x'=8] {'x':(1)4}", COLUMNS, ("fsdp",)),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", ROWS, ("tensor",)),
        ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'y'}", COLUMNS, ("fsdp",)),
        ("{}", (), ("fsdp", "tensor")),
    ],
)
def test_groups_are_read_and_belong_to_axes(written: str, groups: tuple, axes: tuple[str, ...]):
    program = parse(text(f"all-reduce(%a), channel_id=1, replica_groups={written}, to_apply=%add"))
    (found,) = collectives(program)
    assert found.groups == groups
    assert axes_of(found.groups, MESH) == axes
    n = len(groups[0]) if groups else 8
    sent = collective_bytes(program, MESH)
    assert sent == {"+".join(axes): {"all-reduce": 2 * (n - 1) / n * 256}}


@pytest.mark.parametrize(
    ("operation", "kind", "sent"),
    [
        ("all-gather(%a), replica_groups=[4,2]<=[8], dimensions={0}", "all-gather", 256),
        ("all-gather-start(%a), replica_groups=[4,2]<=[8]", "all-gather", 256),
        ("reduce-scatter(%a), replica_groups=[4,2]<=[8]", "reduce-scatter", 128),
        ("all-to-all(%a), replica_groups=[4,2]<=[8]", "all-to-all", 128),
        ("collective-permute(%a), source_target_pairs={{0,1},{1,0}}", "collective-permute", 64),
        (
            "collective-permute-start(%a), source_target_pairs={{0,1},{2,2}}",
            "collective-permute",
            32,
        ),
    ],
)
def test_every_kind_sends_what_its_ring_sends(operation: str, kind: str, sent: float):
    assert collective_bytes(parse(text(operation)), MESH) == {"tensor": {kind: sent}}


def test_smaller_types_send_less_and_pairs_count_once():
    started = text(
        "all-reduce-start(%a), replica_groups=[1,8]<=[8]",
        inputs="bf16[64]{0}",
        result="bf16[64]{0}",
    ).replace("ROOT %b", "%b")
    pair = started.replace("}\n", "  ROOT %c = bf16[64]{0} all-reduce-done(%b)\n}\n")
    (found,) = collectives(parse(pair))
    assert (found.kind, found.operand_bytes, found.times) == ("all-reduce", 128, 1)


def test_what_stays_on_a_device_is_no_traffic():
    alone = "all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"
    assert collective_bytes(parse(text(alone)), MESH) == {}


def test_what_is_not_known_is_an_error():
    with pytest.raises(HloError, match="ragged-all-to-all"):
        collectives(parse(text("ragged-all-to-all(%a), replica_groups=[1,8]<=[8]")))
    with pytest.raises(HloError, match="which devices"):
        collectives(parse(text("all-reduce(%a), replica_groups=new[3]")))
    with pytest.raises(HloError, match="device 8 is not in a mesh of 8"):
        collective_bytes(parse(text("all-reduce(%a), replica_groups={{7,8}}")), MESH)


# How libtpu writes a gradient's reduce-scatter and an all-gather that overlaps with two other fusions, in a loop.
TPU = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter (input: bf16[64,32]) -> bf16[8,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=15, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = bf16[8,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %id, %zero), dynamic_slice_sizes={8,32}
}

%start (p: bf16[8,32]) -> (bf16[8,32], bf16[64,32]) {
  %p = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=4, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %call = (bf16[8,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,32]{1,0:T(8,128)(2,1)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[8,32]) -> bf16[64,32] {
  %p.1 = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=4, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%body (s: (s32[], bf16[8,32], bf16[64,32])) -> (s32[], bf16[8,32], bf16[64,32]) {
  %s = (s32[], bf16[8,32]{1,0:T(8,128)(2,1)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = bf16[8,32]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %g = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %started = (bf16[8,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,32]{1,0:T(8,128)(2,1)}) fusion(%w), kind=kCustom, calls=%start
  %through = bf16[64,32]{1,0:T(8,128)(2,1)} fusion(%w), kind=kOutput, calls=%beside
  %scattered = bf16[8,32]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  ROOT %out = (s32[], bf16[8,32]{1,0:T(8,128)(2,1)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%i, %scattered, %through)
}

%condition (c: (s32[], bf16[8,32], bf16[64,32])) -> pred[] {
  %c = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %n = s32[] constant(28)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: (s32[], bf16[8,32], bf16[64,32])) -> (s32[], bf16[8,32], bf16[64,32]) {
  %a = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) while(%a), condition=%condition, body=%body
}
"""  # noqa: E501


def test_fused_collectives_of_a_tpu_count_once_a_turn():
    shard, whole = 8 * 32 * 2, 64 * 32 * 2
    sent = collective_bytes(parse(TPU), {"data": 1, "fsdp": 8})
    assert sent == {"fsdp": {"all-gather": 28 * 7 * shard, "reduce-scatter": 28 * 7 / 8 * whole}}


def test_a_permute_that_only_some_devices_take_part_in_counts_its_share():
    program = parse(text("collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,3}}"))
    sent = collective_bytes(program, {"context": 4})
    assert math.isclose(sent["context"]["collective-permute"], 3 / 4 * 256)
