"""Analytic FLOPs against the published sizes worked out by hand, and against XLA's own count."""

import dataclasses

import jax
import numpy as np
import pytest
from reference import jit, make_batch, tiny_config
from training_setup import EVERYTHING, PROJECTOR, PROJECTOR_AND_DECODER, Trainer, trainer

from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.flops import (
    decoder_flops,
    encoder_flops,
    head_flops,
    projector_flops,
    train_flops,
)
from llaso_jax.modeling.functional import abstract_params, bind, init_params
from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.lora import LoraRule
from llaso_jax.modeling.projector import ProjectorConfig
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.whisper import WhisperConfig
from llaso_jax.sharding.hlo import count_flops, parse
from llaso_jax.training.step import place_batch

TERA = 1e12
LAYERS = ("language_model/layers/self_attn/", "language_model/layers/mlp/")
BASE = SpeechLMConfig()


def test_llaso_base_costs_what_it_does_by_hand():
    """Sums of 2 x parameters x positions and attention, for 30 s and 1560 positions."""
    assert encoder_flops(BASE.audio, 3000) / TERA == pytest.approx(2.27, rel=0.01)
    assert encoder_flops(BASE.audio, 900) / TERA == pytest.approx(0.60, rel=0.01)
    body, attention = 2 * 28 * 100_663_296 * 1560, 2 * 28 * 3072 * 1560**2
    assert decoder_flops(BASE.text, 1560) == pytest.approx(body + attention, rel=1e-12)
    assert decoder_flops(BASE.text, 1560) / TERA == pytest.approx(9.2, rel=0.01)
    assert attention / (body + attention) == pytest.approx(0.045, abs=0.001)
    assert head_flops(BASE.text, 1560) / body == pytest.approx(0.14, abs=0.001)
    assert projector_flops(BASE, 3000) == 2 * 1500 * (1280 * 3072 + 3072 * 3072)


def test_stacked_frames_cost_the_projector_one_position_each():
    stacked = SpeechLMConfig(projector=ProjectorConfig(type="mlp3x_gelu", stack=5))
    assert projector_flops(stacked, 3000) == 2 * 300 * (5 * 1280 * 3072 + 2 * 3072 * 3072)


def _train(
    positions: int, *, encoder: bool = False, decoder: bool, runs_encoder: bool = True
) -> float:
    return train_flops(
        BASE,
        chunks=1,
        mel_frames=3000,
        rows=1,
        positions=positions,
        answers=30,
        trains_encoder=encoder,
        trains_decoder=decoder,
        runs_encoder=runs_encoder,
    )


def test_the_two_stages_cost_what_the_published_sizes_say():
    align, instruct = _train(1560, decoder=False), _train(1610, decoder=True)
    assert align / TERA == pytest.approx(21.3, rel=0.005)
    assert instruct / TERA == pytest.approx(31.0, rel=0.005)
    assert align / _train(1560, decoder=True) == pytest.approx(0.707, abs=0.003)
    unfrozen = _train(1560, encoder=True, decoder=True) - _train(1560, decoder=True)
    assert unfrozen == pytest.approx(2 * encoder_flops(BASE.audio, 3000), rel=1e-9)


def test_features_that_are_there_spare_the_encoder_and_nothing_else():
    spared = _train(1560, decoder=False) - _train(1560, decoder=False, runs_encoder=False)
    assert spared == pytest.approx(encoder_flops(BASE.audio, 3000), rel=1e-9)


def test_cost_is_proportional_to_rows_and_chunks():
    sizes = {"mel_frames": 600, "positions": 400, "trains_encoder": True, "trains_decoder": True}
    one = train_flops(BASE, chunks=1, rows=1, answers=10, **sizes)
    assert train_flops(BASE, chunks=8, rows=8, answers=80, **sizes) == pytest.approx(8 * one)


# --- against compiled programs --------------------------------------------------------------------

# Attention is `reference` here: it computes the whole square of scores, of which the formulas count the causal half.
WIDE = tiny_config(
    audio={
        "d_model": 128,
        "encoder_layers": 2,
        "encoder_ffn_dim": 512,
        "encoder_attention_heads": 2,
        "num_mel_bins": 80,
        "max_source_positions": 200,
    },
    text={
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_scaling": None,
    },
)
REFERENCE = ComputeConfig(attention="reference")
ROWS, CHUNKS, MEL, ANSWERS = 2, 2, 400, 64


def _batch() -> dict[str, np.ndarray]:
    row = [[[1] * 40, MEL, MEL, list(range(ANSWERS + 8))]]
    return make_batch([row] * ROWS, WIDE, mel_length=MEL, answers=ANSWERS)


def _square(s: int) -> float:
    """The half of the scores' products that no query needs, of one row and one forward pass."""
    text = WIDE.text
    return 2 * text.num_hidden_layers * text.num_attention_heads * text.head_width * s**2


def _counted(function, *args) -> float:
    """FLOPs of the matrix products in the compiled program, loop bodies as often as they run."""
    return count_flops(parse(jit(function).lower(*args).compile().as_text()))


def _params():
    return jax.eval_shape(lambda key: init_params(WIDE, key), jax.random.key(0))


def test_encoder_and_projector_cost_what_is_compiled():
    batch = _batch()
    counted = _counted(
        lambda p, b: bind(WIDE, p, REFERENCE).encode_audio(b["mel"], b["mel_frames"]),
        _params(),
        batch,
    )
    ours = ROWS * CHUNKS * (encoder_flops(WIDE.audio, MEL) + projector_flops(WIDE, MEL))
    # Convolutions do not multiply their padding: two of 1,200 and of 600 products.
    assert counted / ours == pytest.approx(1, abs=0.002)


def test_decoder_and_head_cost_what_is_compiled():
    batch = {k: v for k, v in _batch().items() if not k.startswith("mel")}
    s = batch["tokens"].shape[1]
    counted = _counted(lambda p, b: bind(WIDE, p, REFERENCE).answer_logits(b), _params(), batch)
    ours = decoder_flops(WIDE.text, s) + _square(s) + head_flops(WIDE.text, ANSWERS)
    assert counted == pytest.approx(ROWS * ours)


def _step(rules, *, encoder: bool, decoder: bool) -> tuple[float, float]:
    """(compiled, formula) of one training step."""
    train = trainer(WIDE, rules=rules, compute=REFERENCE)
    return _counted_and_ours(train, WIDE, encoder=encoder, decoder=decoder)


def _counted_and_ours(
    train: Trainer, cfg: SpeechLMConfig, *, encoder: bool, decoder: bool
) -> tuple[float, float]:
    batch = _batch()
    placed = place_batch(batch, 1, train.layout)
    compiled = train.step.lower(train.state, train.frozen, placed, np.float32(1e-3)).compile()
    s = batch["tokens"].shape[1]
    ours = train_flops(
        cfg,
        chunks=ROWS * CHUNKS,
        mel_frames=MEL,
        rows=ROWS,
        positions=s,
        answers=ROWS * ANSWERS,
        trains_encoder=encoder,
        trains_decoder=decoder,
    )
    return count_flops(parse(compiled.as_text())), ours + 3 * ROWS * _square(s)


@pytest.mark.slow
def test_the_align_step_never_computes_weight_gradients_of_frozen_parts():
    counted = {}
    for name, rules, encoder, decoder in (
        ("align", PROJECTOR, False, False),
        ("instruct", PROJECTOR_AND_DECODER, False, True),
        ("unfrozen", EVERYTHING, True, True),
    ):
        counted[name], ours = _step(rules, encoder=encoder, decoder=decoder)
        # The formulas count an input gradient of the first projector layer and of the first convolution.
        assert 0.97 < counted[name] / ours < 1.01, (name, counted[name] / ours)
    s = _batch()["tokens"].shape[1]
    attention = decoder_flops(WIDE.text, s) - 2 * s * sum(
        info.size for path, info in abstract_params(WIDE).items() if path.startswith(LAYERS)
    )
    matrices = decoder_flops(WIDE.text, s) - attention + head_flops(WIDE.text, ANSWERS)
    saved = counted["instruct"] - counted["align"]
    assert saved == pytest.approx(ROWS * matrices, rel=0.01)
    saved = counted["unfrozen"] - counted["instruct"]
    assert saved == pytest.approx(2 * ROWS * CHUNKS * encoder_flops(WIDE.audio, MEL), rel=0.05)


def test_adapters_cost_their_products_and_the_way_back_through_the_encoder():
    rules = (LoraRule("(audio_tower|language_model)/layers/.*", rank=8),)
    cfg = dataclasses.replace(WIDE, lora=rules)
    train = trainer(
        cfg,
        compute=REFERENCE,
        rules=(
            {"pattern": "projector/.*|.*/lora_[AB]/weight"},
            {"pattern": ".*", "learning_rate_scale": None},
        ),
    )
    counted, ours = _counted_and_ours(train, cfg, encoder=False, decoder=False)
    assert 0.97 < counted / ours < 1.01, counted / ours
    _, without = _step(PROJECTOR, encoder=False, decoder=False)
    assert ours - without > encoder_flops(WIDE.audio, MEL) * ROWS * CHUNKS


def test_sizes_that_change_the_model_change_the_count():
    assert encoder_flops(WhisperConfig(encoder_layers=4), 3000) < encoder_flops(BASE.audio, 3000)
    wide_kv = LlamaConfig(num_key_value_heads=24)
    extra = decoder_flops(wide_kv, 100) - decoder_flops(BASE.text, 100)
    assert extra == 28 * 2 * 100 * 3072 * 2 * 16 * 128
