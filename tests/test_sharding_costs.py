"""Bytes and FLOPs of operations: what fusions and loops really move."""

import jax
import jax.numpy as jnp
import pytest

from llaso_jax.sharding.costs import operation_costs
from llaso_jax.sharding.hlo import count_flops, parse

N, D = 64, 128
FLOAT = 4


def costs(function, *shapes):
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = parse(jax.jit(function).lower(*specs).compile().as_text())
    return program, list(operation_costs(program))


def moved(found) -> int:
    return sum(cost.times * cost.hbm_bytes for cost in found)


def layers(x, ws):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0]


def test_a_product_reads_its_operands_and_writes_its_result():
    _, found = costs(lambda x, w: x @ w, (N, D), (D, D))
    assert moved(found) == FLOAT * (N * D + D * D + N * D)
    assert sum(cost.flops for cost in found) == 2 * N * D * D


def test_a_loop_reads_the_layer_of_its_turn_and_not_all_layers():
    """Twice the weights is what slicing a layer out and multiplying by it takes; all layers each turn is 10 times."""
    depth = 20
    program, found = costs(layers, (N, D), (depth, D, D))
    weights, activations = FLOAT * depth * D * D, FLOAT * depth * N * D
    assert weights < moved(found) < 3 * weights + 6 * activations
    assert sum(cost.times * cost.flops for cost in found) == count_flops(program)


def test_results_that_are_stacked_in_place_are_written_once():
    def stack(x, ws):
        return jax.lax.scan(lambda h, w: (h, jnp.tanh(h * w)), x, ws)[1]

    depth = 20
    _, found = costs(stack, (N, D), (depth, 1, D))
    assert moved(found) < 8 * FLOAT * depth * N * D, "each turn touches its own layer only"


# A fusion of a TPU that reads a slice from HBM, works in VMEM and updates one layer of a stack.
TPU = """\
HloModule jit_step, is_scheduled=true

%fused (p.0: bf16[28,8,128], p.1: bf16[8,128]) -> bf16[28,8,128] {
  %p.0 = bf16[28,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %i = s32[] constant(3)
  %z = s32[] constant(0)
  %s = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %i, %z, %z), dynamic_slice_sizes={1,8,128}
  %t = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} add(%s, %s)
  ROOT %u = bf16[28,8,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p.0, %t, %i, %z, %z)
}

ENTRY %main (a: bf16[28,8,128], b: bf16[8,128]) -> bf16[28,8,128] {
  %a = bf16[28,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %go = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%b)
  %there = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%go)
  ROOT %f = bf16[28,8,128]{2,1,0:T(8,128)(2,1)} fusion(%a, %there), kind=kLoop, calls=%fused
}
"""


def test_slices_updates_and_fast_memory_count_what_crosses_to_the_device():
    layer = 2 * 8 * 128
    by_name = {cost.name: cost.hbm_bytes for cost in operation_costs(parse(TPU))}
    assert by_name == {"go": layer, "f": 2 * layer}


def test_a_fusion_inside_a_fusion_reads_its_slice_too():
    """As libtpu writes a product whose operand is cut out of a stack of layers."""
    outer = """\
%outer (q.0: bf16[28,8,128], q.1: bf16[8,128]) -> bf16[8,128] {
  %q.0 = bf16[28,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %cut = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%q.0), kind=kLoop, calls=%inner
  ROOT %sum = bf16[8,128]{1,0:T(8,128)(2,1)} add(%cut, %q.1)
}

%inner (r.0: bf16[28,8,128]) -> bf16[8,128] {
  %r.0 = bf16[28,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %j = s32[] constant(3)
  %part = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%r.0, %j, %j, %j), dynamic_slice_sizes={1,8,128}
  ROOT %flat = bf16[8,128]{1,0:T(8,128)(2,1)} bitcast(%part)
}

ENTRY"""
    text = TPU.replace("ENTRY", outer).replace(
        "ROOT %f = bf16[28,8,128]{2,1,0:T(8,128)(2,1)} fusion(%a, %there), kind=kLoop, calls=%fused",
        "ROOT %f = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%a, %there), kind=kOutput, calls=%outer",
    )
    by_name = {cost.name: cost.hbm_bytes for cost in operation_costs(parse(text))}
    assert by_name == {"go": 2 * 8 * 128, "f": 2 * 2 * 8 * 128}


def test_kernels_count_what_they_say_and_what_they_are_given():
    text = """\
ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  ROOT %k = bf16[8,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config=COST
}
""".replace("COST", '{"cost_estimate":{"flops":"1000"}}')
    (kernel,) = operation_costs(parse(text))
    assert (kernel.flops, kernel.hbm_bytes) == (1000, pytest.approx(2 * 2 * 8 * 128))
