"""What the compiled steps of LLaSO-Base cost, at their real size: the formulas, and no hidden weight gradients."""

import dataclasses
import functools
from unittest.mock import patch

import jax
import pytest
from reference import _PLAIN

from llaso_jax.config import StageConfig, load_config
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.hlo import count_flops, parse
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.training.abstract import abstract_step, stage_flops
from llaso_jax.training.state import Layout

BASE = SpeechLMConfig()
CHUNKED = ComputeConfig()
LAYERS = 2
SHALLOW = dataclasses.replace(
    BASE,
    audio=dataclasses.replace(BASE.audio, encoder_layers=LAYERS),
    text=dataclasses.replace(BASE.text, num_hidden_layers=LAYERS),
)


def one_sample(recipe: str) -> StageConfig:
    """A stage with one 30 s clip, 60 positions of text and 30 answers at a time."""
    (stage,) = load_config(recipe).stages
    data = dataclasses.replace(
        stage.data, rows=1, sequence_length=1560, chunks_per_row=1, answers_per_row=30
    )
    return dataclasses.replace(stage, data=data, accumulation=1)


@functools.cache
def compiled(
    model: SpeechLMConfig,
    recipe: str,
    *,
    compute: ComputeConfig = CHUNKED,
    unroll: bool = False,
):
    """The step on one CPU device, and what its formula says."""
    layout = Layout.of(model, make_mesh("1x1", devices=jax.devices()[:1]))
    stage = one_sample(recipe)
    scan = functools.partial(jax.lax.scan, unroll=True) if unroll else jax.lax.scan
    jit = functools.partial(jax.jit, compiler_options=_PLAIN)
    with patch.object(jax.lax, "scan", scan), patch.object(jax, "jit", jit):
        # Steps are kept by their settings: one of another scan must not be found.
        frozen = "float32" if unroll else "bfloat16"
        step = abstract_step(model, stage, layout, compute, frozen_dtype=frozen)
        return step.compile(), stage_flops(model, stage)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llaso_base_align", "llaso_base_instruct"])
def test_a_step_costs_what_its_formula_says(recipe: str):
    program, expected = compiled(BASE, recipe)
    # Attention adds: scores are computed again for gradients, and blocks on the diagonal are whole (56 % of all).
    assert 0.97 < count_flops(parse(program.as_text())) / expected < 1.03


@pytest.mark.slow
def test_the_align_step_costs_seven_tenths_of_the_instruct_step():
    align, instruct = (
        count_flops(parse(compiled(BASE, f"llaso_base_{name}")[0].as_text()))
        for name in ("align", "instruct")
    )
    assert align / instruct < 0.72


@pytest.mark.slow
def test_counting_loops_gives_what_xla_counts_without_them():
    whole = ComputeConfig(attention="reference")  # `chunked` has loops of its own
    rolled, _ = compiled(SHALLOW, "llaso_base_align", compute=whole)
    unrolled, _ = compiled(SHALLOW, "llaso_base_align", compute=whole, unroll=True)
    assert all(times == 1 for _, times in parse(unrolled.as_text()).operations("dot"))
    assert any(times > 1 for _, times in parse(rolled.as_text()).operations("dot"))
    products = count_flops(parse(unrolled.as_text()))
    assert count_flops(parse(rolled.as_text())) == pytest.approx(products, rel=1e-3)
    # XLA's own count has norms, softmax and the optimizer too.
    assert products == pytest.approx(unrolled.cost_analysis()["flops"], rel=0.01)
