"""What is live at the peak of a compiled program, against the compiler's own figure and against sums by hand."""

import jax
import jax.numpy as jnp
import pytest

from llaso_jax.sharding.hlo import parse
from llaso_jax.sharding.liveness import buffers_at_peak

N, D = 64, 256
ARRAY = 4 * N * D


def compiled(function, *shapes, donate=()):
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, donate_argnums=donate).lower(*specs).compile()


def live(program) -> int:
    return sum(buffer.size for buffer in buffers_at_peak(parse(program.as_text())))


def layers(x, ws):
    return jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, ws)[0]


def test_what_a_gradient_keeps_of_each_layer_is_live_at_the_peak():
    program = compiled(jax.grad(lambda x, ws: layers(x, ws).sum(), (0, 1)), (N, D), (12, D, D))
    buffers = buffers_at_peak(parse(program.as_text()))
    stacked = [buffer for buffer in buffers if buffer.shape == ("f32", (12, N, D))]
    assert len(stacked) >= 2, "the input of every product, and what sin needs"
    assert buffers == sorted(buffers, key=lambda buffer: -buffer.size)


@pytest.mark.parametrize("depth", [2, 12])
def test_the_walk_finds_the_compilers_temporaries(depth: int):
    gradient = jax.grad(lambda x, ws: layers(x, ws).sum(), (0, 1))
    program = compiled(gradient, (N, D), (depth, D, D))
    memory = program.memory_analysis()
    # Results are live at the end and count; the compiler lists them apart from its temporaries.
    whole = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert live(program) == pytest.approx(whole, rel=0.1)


def test_a_loop_holds_its_state_once_however_often_it_runs():
    one, many = (compiled(layers, (N, D), (depth, D, D)) for depth in (3, 30))
    assert live(one) == live(many)


def test_what_is_given_back_in_place_takes_no_room():
    def step(x, y):
        return x + jnp.sin(y), y.sum()

    apart, donated = (compiled(step, (N, D), (N, D), donate=d) for d in ((), (0,)))
    assert live(apart) - live(donated) == ARRAY


def test_arrays_in_other_memories_are_not_the_devices():
    text = """\
ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0:T(1024)} parameter(0)
  %fast = f32[64]{0:T(1024)S(1)} copy(%a)
  %host = f32[64]{0:T(1024)S(5)} copy(%fast)
  ROOT %b = f32[64]{0:T(1024)} negate(%fast)
}
"""
    assert [buffer.operation for buffer in buffers_at_peak(parse(text))] == ["b"]
