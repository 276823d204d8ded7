"""Every field of every configuration of the model does something."""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from reference import TINY_SCALING, initializer, jit, make_batch, random_params, tiny_config
from tolerances import LEAF, assert_close, difference

import llaso_jax.modeling.llama
import llaso_jax.modeling.whisper
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.frames import audio_slots
from llaso_jax.modeling.functional import abstract_params, bind, flatten, unflatten
from llaso_jax.modeling.kernels.attention import attention, decode_attention
from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.lora import LoraRule
from llaso_jax.modeling.projector import ProjectorConfig
from llaso_jax.modeling.rope import RopeScaling
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.whisper import WhisperConfig

BASE = tiny_config()

# Field -> (another value, what must change). A field missing here fails the first test below.
CHANGES: dict[type, dict[str, tuple[Any, str]]] = {
    SpeechLMConfig: {
        "audio": (dataclasses.replace(BASE.audio, num_mel_bins=9), "shapes"),
        "projector": (ProjectorConfig(type="linear"), "shapes"),
        "text": (dataclasses.replace(BASE.text, vocab_size=50), "shapes"),
        "audio_mode": ("true_length", "outputs"),
        "lora": ((LoraRule("projector/.*", rank=2),), "shapes"),
    },
    WhisperConfig: {
        "num_mel_bins": (9, "shapes"),
        "d_model": (20, "shapes"),
        "encoder_layers": (3, "shapes"),
        "encoder_attention_heads": (4, "shapes"),
        "encoder_ffn_dim": (40, "shapes"),
        "max_source_positions": (13, "shapes"),
        "init_std": (0.5, "initial values"),
        "conv_gain": (3.0, "initial values"),
    },
    ProjectorConfig: {
        "type": ("mlp3x_gelu", "shapes"),
        "stack": (2, "shapes"),
        "init_gain": (2.0, "initial values"),
    },
    LlamaConfig: {
        "vocab_size": (49, "shapes"),
        "hidden_size": (40, "shapes"),
        "intermediate_size": (56, "shapes"),
        "num_hidden_layers": (3, "shapes"),
        "num_attention_heads": (2, "shapes"),
        "num_key_value_heads": (1, "shapes"),
        "head_dim": (6, "shapes"),
        "rms_norm_eps": (0.1, "outputs"),
        "rope_theta": (1e4, "outputs"),
        "rope_scaling": (None, "outputs"),
        "tie_word_embeddings": (False, "shapes"),
        "initializer_range": (0.5, "initial values"),
        "vocab_multiple_of": (32, "shapes"),
    },
    RopeScaling: {
        "factor": (2.0, "outputs"),
        "low_freq_factor": (2.0, "outputs"),
        "high_freq_factor": (3.0, "outputs"),
        "original_max_position_embeddings": (256, "outputs"),
    },
}


def with_change(kind: type, field: str, value: Any) -> SpeechLMConfig:
    """BASE with one field of one of its parts replaced."""
    change = {field: value}
    if kind is SpeechLMConfig:
        return dataclasses.replace(BASE, **change)
    if kind is RopeScaling:
        change = {"rope_scaling": dataclasses.replace(TINY_SCALING, **change)}
        kind = LlamaConfig
    name = {WhisperConfig: "audio", ProjectorConfig: "projector", LlamaConfig: "text"}[kind]
    return dataclasses.replace(BASE, **{name: dataclasses.replace(getattr(BASE, name), **change)})


def shapes(cfg: SpeechLMConfig) -> dict[str, tuple[int, ...]]:
    return {path: info.shape for path, info in abstract_params(cfg).items()}


@functools.cache
def initial_values(cfg: SpeechLMConfig) -> dict[str, np.ndarray]:
    params = initializer(cfg)(jax.random.key(0))
    return {path: np.asarray(leaf) for path, leaf in flatten(params).items()}


@functools.cache
def _batch() -> dict[str, np.ndarray]:
    """40 positions and one chunk with 15 of 24 valid mel frames; the same for every config."""
    rows = [[[list(range(1, 25)), 15, [4, 5, 6, 7]]]]
    return make_batch(rows, BASE, mel_length=24)


@functools.cache
def outputs(cfg: SpeechLMConfig) -> np.ndarray:
    params = random_params(unflatten(abstract_params(BASE)))
    return np.asarray(jit(lambda p, b: bind(cfg, p).answer_logits(b))(params, _batch()))


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
def test_every_field_is_listed_with_what_it_changes(kind: type):
    assert set(CHANGES[kind]) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        pytest.param(kind, field, id=f"{kind.__name__}.{field}")
        for kind, fields in CHANGES.items()
        for field in fields
    ],
)
def test_changing_a_field_changes_the_model(kind: type, field: str):
    value, what = CHANGES[kind][field]
    changed = with_change(kind, field, value)
    assert changed != BASE
    if what == "shapes":
        assert shapes(changed) != shapes(BASE)
        return
    assert shapes(changed) == shapes(BASE), f"{field} changes shapes: list it so"
    if what == "outputs":
        assert difference(outputs(changed), outputs(BASE)) > 10 * LEAF
    else:
        before, after = initial_values(BASE), initial_values(changed)
        tower = "audio_tower/" if kind is WhisperConfig else "language_model/"
        moved = {path for path in before if (before[path] != after[path]).any()}
        matrices = {
            path
            for path in before
            if path.startswith(tower)
            and path.endswith("weight")
            and "norm" not in path
            and "embed_positions" not in path
        }
        if field == "conv_gain":
            matrices = {f"audio_tower/{conv}/weight" for conv in ("conv1", "conv2")}
        if field == "init_gain":  # torch.nn.Linear draws biases like weights
            matrices = {path for path in before if path.startswith("projector/")}
        assert moved == matrices


def test_trimmed_and_padded_modes_take_up_different_slots():
    assert audio_slots(15, mode="trimmed") == 8
    assert audio_slots(15, mode="padded") == 1500


def test_initial_values_have_the_configured_spread():
    values = initial_values(BASE)
    for path, leaf in values.items():
        if path.endswith("bias") and "projector" not in path:
            assert not leaf.any(), path
        elif "norm" in path:
            assert (leaf == 1).all(), path
        elif path.startswith("projector"):
            bound = (16 if "linear_0" in path else 32) ** -0.5
            assert 0.6 * bound < np.abs(leaf).max() <= bound, path
        elif "embed_positions" not in path:
            assert np.std(leaf) == pytest.approx(0.02, rel=0.2), path
            assert np.abs(np.mean(leaf)) < 0.005, path


def test_initial_values_without_a_spread_keep_the_variance_of_a_signal():
    """1/sqrt(fan_in); matrices that write into the residual stream 1/sqrt(2 layers) of it."""
    cfg = dataclasses.replace(
        BASE,
        audio=dataclasses.replace(BASE.audio, init_std=None, conv_gain=3.0),
        text=dataclasses.replace(BASE.text, initializer_range=None),
    )
    values = initial_values(cfg)
    fan_in = {"fc2": 32, "down_proj": 48, "out_proj": 16, "o_proj": 32}
    for path, leaf in values.items():
        tower, *_, module, name = path.split("/")
        if (
            name != "weight"
            or "norm" in path
            or tower == "projector"
            or module == "embed_positions"
        ):
            continue
        if module.startswith("conv"):
            expected = 3 * (3 * leaf.shape[1]) ** -0.5
        elif module in fan_in:
            expected = (fan_in[module] * 2 * 2) ** -0.5  # two layers
        else:
            expected = leaf.shape[-1] ** -0.5
        assert np.std(leaf) == pytest.approx(expected, rel=0.2), path


def test_layers_start_with_different_random_values():
    for path, leaf in initial_values(BASE).items():
        if "/layers/" in path and "norm" not in path and path.endswith("weight"):
            assert (leaf[0] != leaf[1]).all(), path


# --- compute --------------------------------------------------------------------------------------


def gradient_program(compute: ComputeConfig) -> str:
    """The jaxpr of the loss's gradient, without addresses of Python objects."""
    params = unflatten(abstract_params(BASE))
    structs = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), params)
    program = jax.make_jaxpr(jax.grad(lambda p: bind(BASE, p, compute).loss_sum(_batch())))(structs)
    return re.sub(r"0x[0-9a-f]+", "", str(program))


COMPUTE_CHANGES: dict[str, list[ComputeConfig]] = {
    "dtype": [ComputeConfig(dtype="bfloat16")],
    "remat": [ComputeConfig(remat=remat) for remat in ("dots", "layer", "offload")],
    "attention": [ComputeConfig(attention="chunked")],  # BASE is small: auto is reference
}


def test_every_compute_field_is_listed():
    assert set(COMPUTE_CHANGES) == {field.name for field in dataclasses.fields(ComputeConfig)}


@pytest.mark.parametrize("field", COMPUTE_CHANGES)
def test_a_compute_field_changes_the_program(field: str):
    programs = [gradient_program(ComputeConfig())]
    programs += [gradient_program(compute) for compute in COMPUTE_CHANGES[field]]
    assert len(set(programs)) == len(programs)


def test_the_named_attention_reaches_both_towers_and_the_decode_step(monkeypatch):
    calls: list[tuple[str, str]] = []

    def recording(site: str, compute):
        def call(*args, implementation, **kwargs):
            calls.append((site, implementation))
            return compute(*args, implementation=implementation, **kwargs)

        return call

    llama, whisper = llaso_jax.modeling.llama, llaso_jax.modeling.whisper
    monkeypatch.setattr(llama, "attention", recording("decoder", attention))
    monkeypatch.setattr(llama, "decode_attention", recording("step", decode_attention))
    monkeypatch.setattr(whisper, "attention", recording("encoder", attention))
    params = random_params(unflatten(abstract_params(BASE)))
    for name in ("auto", "reference", "chunked"):
        calls.clear()

        def program(params, name=name):
            model = bind(BASE, params, ComputeConfig(attention=name))
            logits, cache = model.prefill(_batch(), max_length=50)
            return model.decode(logits.argmax(-1), cache)

        jax.eval_shape(program, params)
        assert set(calls) == {(site, name) for site in ("decoder", "step", "encoder")}


def test_bf16_computation_keeps_f32_logits_and_stays_near_the_f32_result():
    params = random_params(unflatten(abstract_params(BASE)))
    compute = ComputeConfig(dtype="bfloat16")
    logits = jit(lambda p, b: bind(BASE, p, compute).answer_logits(b))(params, _batch())
    assert logits.dtype == np.float32
    # bf16 keeps 8 bits: 2^-8 an operation, about ten of them in a row.
    assert_close(logits, outputs(BASE), 10 * 2**-8, "bf16 logits")
    assert difference(logits, outputs(BASE)) > 10 * LEAF
