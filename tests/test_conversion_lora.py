"""LoRA adapters that peft saved merge as peft merges them; whatever else peft can save is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_conversion_support import TorchSpeechLM, assert_bit_equal, llama_config, read_state
from transformers import LlamaForCausalLM, WhisperModel

from llaso_jax.conversion import export_llama, export_llaso, gather_weights
from llaso_jax.conversion.errors import (
    ConfigMismatchError,
    MissingTensorError,
    TensorShapeError,
    UnknownSourceError,
    UnsupportedConfigError,
)

peft = pytest.importorskip("peft")
pytestmark = [
    # peft 0.21 asks transformers 5 for an attribute under its old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True."),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A LLaSO checkpoint in model/, its two bases in llama/ and whisper/."""
    folder = tmp_path_factory.mktemp("bases")
    reference = TorchSpeechLM()
    reference.save(folder)
    reference.llama.save_pretrained(folder / "llama")
    LlamaForCausalLM(llama_config(tied=False)).save_pretrained(folder / "untied")
    return folder


def adapted(base, folder, *, bin_file=False, **settings):
    """An adapter with random A and B, saved by peft; returns the base with it merged by peft."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, safe_serialization=not bin_file)
    return model.merge_and_unload()


def llama(root, name="llama"):
    return LlamaForCausalLM.from_pretrained(root / name)


def assert_close(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
        {"r": 2, "target_modules": ["embed_tokens", "o_proj", "lm_head"]},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {
            "r": 2,
            "lora_alpha": 2,
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"k_proj": 7},
        },
        {"r": 2, "target_modules": ["q_proj"], "bin_file": True},
    ],
    ids=["some", "all, rank-stabilised", "embeddings", "whole modules", "patterns", "bin"],
)
def test_a_llama_adapter_merges_as_peft_merges_it(root, tmp_path, settings):
    # peft merges no adapter of a tied embedding.
    base = "untied" if "embed_tokens" in settings["target_modules"] else "llama"
    merged = adapted(llama(root, base), tmp_path / "lora", **settings)
    weights = gather_weights(root / base, tmp_path / "lora")
    export_llama(tmp_path / "out", weights.cfg, weights.pieces)
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_close(
        {name: value.numpy() for name, value in ours.items()},
        {name: value.detach().numpy() for name, value in merged.state_dict().items()},
    )
    assert any("merged" in note for note in weights.notes)


def test_a_whole_checkpoint_takes_the_adapter_of_its_language_model(root, tmp_path):
    adapted(llama(root), tmp_path / "lora", r=2, target_modules=["q_proj"])
    weights = gather_weights(tmp_path / "lora", root / "model")
    export_llaso(tmp_path / "out", weights.cfg, weights.pieces, hf_config=weights.hf_config)
    before, after = read_state(root / "model"), read_state(tmp_path / "out")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "model.layers" in name and "q_proj" in name}


def test_an_adapter_of_the_encoder_finds_the_encoder(root, tmp_path):
    base = WhisperModel.from_pretrained(root / "whisper")
    merged = adapted(base, tmp_path / "lora", r=2, target_modules=r".*encoder.*(fc1|k_proj)")
    weights = gather_weights(root / "llama", root / "whisper", tmp_path / "lora")
    state = {name: value.detach().numpy() for name, value in merged.encoder.state_dict().items()}
    fc1 = [layer.read() for layer in weights.pieces["audio_tower/layers/fc1/weight"]]
    assert fc1
    for index, ours in enumerate(fc1):
        np.testing.assert_allclose(ours, state[f"layers.{index}.fc1.weight"], rtol=0, atol=1e-6)


def test_half_precision_merges_in_float32_and_keeps_its_dtype(root, tmp_path):
    merged = adapted(llama(root), tmp_path / "lora", r=2, target_modules=["up_proj"])
    half = TorchSpeechLM().llama.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    weights = gather_weights(tmp_path / "half", tmp_path / "lora")
    (ours, *_) = weights.pieces["language_model/layers/mlp/up_proj/weight"]
    expected = merged.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert str(ours.dtype) == "bfloat16"
    np.testing.assert_allclose(
        ours.read().astype(np.float32), expected.detach().numpy(), rtol=2**-7, atol=2**-9
    )


def test_without_the_adapter_nothing_changes(root, tmp_path):
    weights = gather_weights(root / "model")
    export_llaso(tmp_path / "out", weights.cfg, weights.pieces, hf_config=weights.hf_config)
    assert_bit_equal(read_state(tmp_path / "out"), read_state(root / "model"))


@dataclasses.dataclass(frozen=True)
class Bad:
    """What is done to a good adapter, and what is said about it."""

    error: type[Exception]
    told: str
    config: dict = dataclasses.field(default_factory=dict)
    drop: str | None = None
    cut: str | None = None
    rename: tuple[str, str] | None = None


BAD = {
    "DoRA": Bad(UnsupportedConfigError, "use_dora=True", {"use_dora": True}),
    "another method": Bad(UnsupportedConfigError, "peft_type='IA3'", {"peft_type": "IA3"}),
    "biases": Bad(UnsupportedConfigError, "lora_bias=True", {"lora_bias": True}),
    "altered base": Bad(UnsupportedConfigError, "pissa", {"init_lora_weights": "pissa_niter_4"}),
    "no alpha": Bad(ConfigMismatchError, "lora_alpha", {"lora_alpha": None}),
    "half a pair": Bad(MissingTensorError, "lora_A only", drop="layers.0.self_attn.q_proj.lora_B"),
    "wrong width": Bad(TensorShapeError, "lora_A", cut="layers.0.self_attn.q_proj.lora_A"),
    "other model": Bad(
        MissingTensorError, "does not have", rename=("self_attn.q_proj", "attention.query")
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_merged_is_refused_with_its_reason(root, tmp_path, name):
    bad = BAD[name]
    adapted(llama(root), tmp_path, r=2, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | bad.config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    if bad.drop:
        tensors = {key: value for key, value in tensors.items() if bad.drop not in key}
    if bad.cut:
        tensors = {
            key: value[:, :-1].copy() if bad.cut in key else value for key, value in tensors.items()
        }
    if bad.rename:
        tensors = {key.replace(*bad.rename): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(bad.error, match=bad.told):
        gather_weights(root / "llama", tmp_path)


def test_an_adapter_alone_is_not_a_model(root, tmp_path):
    adapted(llama(root), tmp_path, r=2, target_modules=["q_proj"])
    with pytest.raises(UnknownSourceError, match="besides adapter"):
        gather_weights(tmp_path)
