"""Reading compiled programs: FLOPs as XLA counts them, with loop bodies counted as often as they run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from llaso_jax.sharding.hlo import HloError, count_flops, parse


def compiled(function, *shapes, dtype=jnp.float32):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)).compile()


def counted(function, *shapes):
    return count_flops(parse(compiled(function, *shapes).as_text()))


def product(x, w):
    return x @ w


def layers(x, ws):
    return jax.lax.scan(lambda h, w: (jnp.tanh(product(h, w)), None), x, ws)[0]


def test_a_loop_counts_as_often_as_it_runs_and_as_xla_counts_the_unrolled_one():
    unrolled = compiled(lambda x, ws: functools.reduce(product, ws, x), (8, 16), (5, 16, 16))
    expected = 5 * 2 * 8 * 16 * 16
    assert unrolled.cost_analysis()["flops"] == expected
    assert counted(lambda x, ws: functools.reduce(product, ws, x), (8, 16), (5, 16, 16)) == expected
    assert counted(layers, (8, 16), (5, 16, 16)) == expected
    once = compiled(layers, (8, 16), (5, 16, 16)).cost_analysis()["flops"]
    assert once < expected / 2, "XLA itself counts the body once"


def test_loops_inside_loops_multiply():
    def outer(x, ws):
        return jax.lax.scan(lambda h, _: (layers(h, ws), None), x, None, length=3)[0]

    assert counted(outer, (8, 16), (5, 16, 16)) == 3 * 5 * 2 * 8 * 16 * 16


def test_gradients_of_a_scan_cost_two_more_products_and_one_without_weight_gradients():
    forward = 5 * 2 * 8 * 16 * 16
    shapes = (8, 16), (5, 16, 16)
    assert counted(jax.grad(lambda x, ws: layers(x, ws).sum(), (0, 1)), *shapes) == 3 * forward
    assert counted(jax.grad(lambda x, ws: layers(x, ws).sum()), *shapes) == 2 * forward


def test_products_with_batch_axes():
    def einsum(q, k):
        return jnp.einsum("bsnh,btnh->bnst", q, k)

    assert counted(einsum, (2, 7, 3, 8), (2, 5, 3, 8)) == 2 * 2 * 3 * 7 * 5 * 8


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (3, 0)])
@pytest.mark.parametrize("holes", [1, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_cost_what_xla_says(stride, padding, holes, dilation):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride,),
            (padding,),
            lhs_dilation=(holes,),
            rhs_dilation=(dilation,),
            dimension_numbers=("NHC", "OIH", "NHC"),
        )

    program = compiled(convolve, (2, 11, 4), (6, 4, 3))
    analysis = program.cost_analysis()
    # XLA counts the products that meet padding or holes as nothing, and so do we.
    assert count_flops(parse(program.as_text())) == analysis["flops"]


def test_both_branches_of_a_condition_count():
    def choose(x, w, go):
        return jax.lax.cond(go[0] > 0, lambda: product(x, w), lambda: product(x, w + 1) * 2)

    assert counted(choose, (4, 8), (8, 8), (1,)) == 2 * 2 * 4 * 8 * 8


# What libtpu writes: layouts with tiles, loops without a noted trip count, kernels as custom calls.
TPU = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)S(1)}) parameter(0)
  %x = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %w = f32[16,16]{1,0:T(8,128)} constant({...})
  %y = f32[8,16]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(step)/dot"}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %out = (s32[]{:T(128)}, /*index=1*/f32[8,16]{1,0:T(8,128)}) tuple(%i, %y)
}

%condition (p.1: (s32[], f32[8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(28)
  %p.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main.1 (arg: (s32[], f32[8,16])) -> f32[8,16] {
  %arg = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%arg), condition=%condition, body=%body
  %kernel = bf16[8,16]{1,0} custom-call(%loop), custom_call_target="tpu_custom_call", backend_config=COST
  ROOT %got = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
""".replace(
    "COST",
    '{"custom_call_config":{"body":"","cost_estimate":{"flops":"1000","transcendentals":"5"}}}',
)


def test_programs_for_a_tpu_are_understood():
    program = parse(TPU)
    assert program.entry == "main.1"
    assert program.runs == {"body": 28, "condition": 0, "main.1": 1}
    assert count_flops(program) == 28 * 2 * 8 * 16 * 16 + 1000
    assert ("bf16", (8, 16)) in program.shapes()
    ((convolution, times),) = program.operations("convolution")
    assert (convolution.name, convolution.operands, times) == ("y", ("x", "w"), 28)


def test_a_loop_that_counts_by_two_runs_half_as_often():
    """As products do that overlap with their collective on a TPU; an odd count has a last turn of its own."""
    stepping = TPU.replace(
        "  ROOT %out = (s32[]{:T(128)}, /*index=1*/f32[8,16]{1,0:T(8,128)}) tuple(%i, %y)",
        "  %two = s32[]{:T(128)} constant(2)\n"
        "  %next = s32[]{:T(128)} add(%i, %two)\n"
        "  ROOT %out = (s32[]{:T(128)}, /*index=1*/f32[8,16]{1,0:T(8,128)}) tuple(%next, %y)",
    )
    assert parse(stepping).runs["body"] == 14
    assert parse(stepping.replace("constant(28)", "constant(29)")).runs["body"] == 15
    assert parse(stepping.replace("constant(2)", "constant(1)")).runs["body"] == 28


def test_what_is_no_program_is_an_error():
    with pytest.raises(HloError, match="ENTRY"):
        parse("nothing")
    endless = TPU.replace("direction=LT", "direction=NE")
    with pytest.raises(HloError, match=r"how often does loop run"):
        count_flops(parse(endless))


def test_a_product_hidden_in_a_library_is_an_error_and_not_nothing():
    text = TPU.replace('"tpu_custom_call"', '"__cublas$gemm"').replace("cost_estimate", "no")
    with pytest.raises(HloError, match=r"kernel calls __cublas\$gemm"):
        count_flops(parse(text))


def test_a_triton_kernel_counts_what_its_scope_says():
    text = """\
ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  ROOT %k = bf16[8,16]{1,0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="PATH"}
}
""".replace("PATH", "jit(step)/shard_map/flops=2048/attention_forward/pallas_call")
    assert count_flops(parse(text)) == 2048


def test_a_convolution_of_cudnn_counts_as_any_other():
    plain = """\
ENTRY %main (a: bf16[2,30,8]) -> bf16[2,30,4] {
  %a = bf16[2,30,8]{2,1,0} parameter(0)
  %w = bf16[4,3,8]{2,1,0} parameter(1)
  ROOT %c = bf16[2,30,4]{2,1,0} convolution(%a, %w), window={size=3 pad=1_1}, dim_labels=b0f_o0i->b0f
}
"""
    library = plain.replace("= bf16[2,30,4]{2,1,0} conv", "= (bf16[2,30,4]{2,1,0}, u8[64]{0}) conv")
    library = library.replace("convolution(", "custom-call(").replace(
        "->b0f\n", '->b0f, custom_call_target="__cudnn$convBiasActivationForward"\n'
    )
    assert count_flops(parse(library)) == count_flops(parse(plain)) == 2 * 2 * (3 * 30 - 2) * 8 * 4


def test_batched_products_written_as_padded_windows_count_once_each():
    """How libtpu writes [20, 5, 8] x [20, 8, 7]: a window over the batch, mostly padding."""
    text = """\
ENTRY %main (a: f32[20,5,8]) -> f32[20,5,7] {
  %a = f32[20,5,8]{2,1,0} parameter(0)
  %b = f32[20,8,7]{2,1,0} parameter(1)
  ROOT %c = f32[20,5,7]{2,1,0} convolution(%a, %b), window={size=20 stride=19 lhs_dilate=20}, dim_labels=0bf_0io->0bf
}
"""
    assert count_flops(parse(text)) == 20 * 2 * 5 * 8 * 7
