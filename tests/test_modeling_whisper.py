"""The Whisper encoder against transformers, module by module, and its three audio modes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from reference import (
    apply,
    arrays,
    attention_params,
    gradients,
    jit,
    layer_params,
    pure,
    random_params,
    torch_whisper,
    whisper_heads,
    whisper_params,
)
from tolerances import COMPOSED, LEAF, assert_close
from transformers import WhisperConfig as HFWhisperConfig
from transformers.models.whisper.modeling_whisper import sinusoids as torch_sinusoids

from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.layers import LayerNorm, gelu
from llaso_jax.modeling.whisper import (
    WhisperAttention,
    WhisperConfig,
    WhisperEncoder,
    WhisperEncoderLayer,
    sinusoids,
)

F32 = ComputeConfig()


def config(mels=80, width=32, layers=2, heads=4, ffn=64, positions=12) -> WhisperConfig:
    return WhisperConfig(mels, width, layers, heads, ffn, positions)


CONFIGS = {
    "80 mels": config(),
    "128 mels, 1 layer, 1 head": config(mels=128, width=16, layers=1, heads=1),
    "3 layers, ffn below width": config(width=48, layers=3, heads=6, ffn=40, positions=9),
}
each_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@each_config
def test_conv_stem_equals_transformers(cfg: WhisperConfig):
    reference = torch_whisper(cfg)
    mel = random(2, cfg.num_mel_bins, 2 * cfg.max_source_positions)
    graph, _ = pure(lambda rngs: WhisperEncoder(cfg, F32, rngs=rngs))
    params = whisper_params(arrays(reference), cfg)
    for name in ("conv1", "conv2"):
        conv = getattr(reference, name)
        x = random(2, conv.in_channels, 17)  # odd on purpose

        def run(p, x, name=name):
            return getattr(nnx.merge(graph, nnx.State(p)), name)(x)

        actual = jit(run)(params, x.transpose(0, 2, 1))
        expected = conv(torch.tensor(x)).detach().numpy().transpose(0, 2, 1)
        assert_close(actual, expected, LEAF, name)
    # The whole stem is what enters the first layer.
    with torch.no_grad():
        stem = torch.nn.functional.gelu(reference.conv1(torch.tensor(mel)))
        stem = torch.nn.functional.gelu(reference.conv2(stem)).transpose(1, 2)
        stem = stem + reference.embed_positions.weight
    _, states = apply(
        lambda rngs: WhisperEncoder(cfg, F32, rngs=rngs),
        params,
        mel,
        hidden_states=True,
    )
    assert_close(states[0], stem, LEAF, "conv stem")


def test_gelu_is_exact_not_the_tanh_approximation():
    x = np.linspace(-5, 5, 1001, dtype=np.float32)
    assert_close(gelu(x), torch.nn.functional.gelu(torch.tensor(x)), LEAF)
    assert np.abs(gelu(x) - jax.nn.gelu(x, approximate=True)).max() > 10 * LEAF


@pytest.mark.parametrize(("length", "channels"), [(1500, 384), (1500, 1280), (12, 16)])
def test_initial_position_table_equals_transformers(length: int, channels: int):
    ours, expected = sinusoids(length, channels), torch_sinusoids(length, channels)
    assert_close(ours[:64], expected[:64], LEAF, "position table")
    # torch's f32 exp is an ulp off for some time scales, which a position of 1500 multiplies.
    assert_close(ours, expected, length * 2**-23 + LEAF, "position table to its end")


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_layer_norm_equals_torch_on_offset_inputs(dim: int):
    reference = torch.nn.LayerNorm(dim, eps=1e-5)
    torch.nn.init.normal_(reference.weight)
    torch.nn.init.normal_(reference.bias)
    x = random(2, 5, dim) * 3 + 2
    actual = apply(lambda rngs: LayerNorm(dim, eps=1e-5, rngs=rngs), arrays(reference), x)
    assert_close(actual, reference(torch.tensor(x)).detach(), LEAF, "LayerNorm")


@each_config
def test_attention_equals_transformers(cfg: WhisperConfig):
    reference = torch_whisper(cfg).layers[0].self_attn
    x = random(2, 11, cfg.d_model)
    actual = apply(
        lambda rngs: WhisperAttention(cfg, F32, rngs=rngs),
        attention_params(arrays(reference), whisper_heads(cfg)),
        x,
        None,
    )
    assert_close(actual, reference(torch.tensor(x))[0].detach(), LEAF, "Whisper attention")


@each_config
def test_encoder_layer_equals_transformers(cfg: WhisperConfig):
    reference = torch_whisper(cfg).layers[-1]
    x = random(2, 11, cfg.d_model)
    actual = apply(
        lambda rngs: WhisperEncoderLayer(cfg, F32, rngs=rngs),
        layer_params(arrays(reference), whisper_heads(cfg)),
        x,
        None,
    )
    assert_close(actual, reference(torch.tensor(x), None).detach(), LEAF, "Whisper layer")


@each_config
def test_encoder_and_its_gradients_equal_transformers(cfg: WhisperConfig):
    reference = torch_whisper(cfg)
    mel = random(2, cfg.num_mel_bins, 2 * cfg.max_source_positions)
    weight = random(2, cfg.max_source_positions, cfg.d_model, seed=1)
    torch_mel = torch.tensor(mel, requires_grad=True)
    expected = reference(torch_mel)
    (expected.last_hidden_state * torch.tensor(weight)).sum().backward()

    graph, _ = pure(lambda rngs: WhisperEncoder(cfg, F32, rngs=rngs))

    def objective(params, mel):
        features, _ = nnx.merge(graph, nnx.State(params))(mel)
        return (features * weight).sum(), features

    (_, features), (by_params, by_mel) = jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    )(whisper_params(arrays(reference), cfg), mel)
    assert_close(features, expected.last_hidden_state.detach(), COMPOSED, "WhisperEncoder")
    assert_close(by_mel, torch_mel.grad, COMPOSED, "gradient by mel")
    assert_close(
        by_params, whisper_params(gradients(reference), cfg), COMPOSED, "gradient of WhisperEncoder"
    )


def test_hidden_states_equal_transformers_layer_by_layer():
    cfg = CONFIGS["3 layers, ffn below width"]
    reference = torch_whisper(cfg)
    mel = random(1, cfg.num_mel_bins, 2 * cfg.max_source_positions)
    layer_inputs = []
    for layer in reference.layers:
        layer.register_forward_pre_hook(lambda _, args: layer_inputs.append(args[0].detach()))
    last = []
    reference.layer_norm.register_forward_pre_hook(lambda _, args: last.append(args[0].detach()))
    reference(torch.tensor(mel))
    _, states = apply(
        lambda rngs: WhisperEncoder(cfg, F32, rngs=rngs),
        whisper_params(arrays(reference), cfg),
        mel,
        hidden_states=True,
    )
    assert_close(states, np.stack(layer_inputs + last), COMPOSED, "hidden states")


# --- length ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    """(encode(mel, mel_frames=None), its config)."""
    cfg = config(mels=8, width=16, heads=2, ffn=32, positions=20)
    graph, params = pure(lambda rngs: WhisperEncoder(cfg, F32, rngs=rngs))
    params = random_params(params)

    def encode(mel, mel_frames=None):
        return nnx.merge(graph, nnx.State(params))(mel, mel_frames)[0]

    return encode, cfg


@pytest.mark.parametrize("valid", [1, 22, 23])
def test_valid_frames_are_independent_of_the_bucket_and_of_garbage_in_it(encoder, valid: int):
    encode, cfg = jit(encoder[0]), encoder[1]
    mel = random(1, cfg.num_mel_bins, valid)
    # A clip that ends where the array ends needs no mask: the definition of "true length".
    expected = encode(mel)
    frames = -(-valid // 2)
    for bucket in (24, 31, 40):
        padded = np.full((3, cfg.num_mel_bins, bucket), 1e4, np.float32)
        padded[1], padded[2] = np.nan, 0
        padded[:, :, :valid] = mel
        features = encode(padded, np.full(3, valid, np.int32))
        assert_close(
            features[:, :frames],
            np.repeat(expected, 3, 0),
            LEAF,
            f"{valid} in a bucket of {bucket}",
        )
        assert not np.asarray(features[:, frames:]).any()


def test_every_frame_counts_without_lengths(encoder):
    """In padded and trimmed mode the encoder hears the silence too, as Whisper was trained."""
    encode, cfg = jit(encoder[0]), encoder[1]
    mel = random(1, cfg.num_mel_bins, 40)
    masked = encode(mel, np.array([22], np.int32))[:, :11]
    assert np.abs(encode(mel)[:, :11] - masked).max() > 1e-2
    assert_close(encode(mel, np.array([40], np.int32)), encode(mel), LEAF)


def test_a_chunk_without_audio_gives_zeros_and_finite_gradients(encoder):
    encode, cfg = encoder
    mel = random(2, cfg.num_mel_bins, 24)
    lengths = np.array([0, 24], np.int32)
    assert not np.asarray(jit(encode)(mel, lengths)[0]).any()
    gradient = jit(jax.grad(lambda m: jnp.square(encode(m, lengths)).sum()))(mel)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient[0]).any()
    assert np.asarray(gradient[1]).any()


def test_too_many_mel_frames_is_an_error_with_both_numbers(encoder):
    encode, cfg = encoder
    with pytest.raises(ValueError, match=r"41 mel frames give 21 positions.*=20"):
        encode(random(1, cfg.num_mel_bins, 41))


def test_sizes_that_do_not_fit_are_errors_with_both_numbers():
    with pytest.raises(ValueError, match=r"d_model=30.*encoder_attention_heads=4"):
        config(width=30)
    with pytest.raises(ValueError, match=r"d_model=15 must be even"):
        config(width=15, heads=3)


def test_defaults_are_whisper_large_v3():
    """Spec: 32 layers, d=1280, 20 heads, ffn 5120, 128 mel bins, 1500 positions."""
    assert dataclasses.astuple(WhisperConfig())[:6] == (128, 1280, 32, 20, 5120, 1500)
    assert HFWhisperConfig().init_std == WhisperConfig().init_std
