"""LoRA adapters that peft saved merge as peft merges them; whatever else peft can save is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from reference import random_params
from safetensors.numpy import load_file, save_file
from test_conversion_support import TorchSpeechLM, assert_bit_equal, llama_config, read_state
from transformers import LlamaForCausalLM, WhisperModel

from llaso_jax.conversion import (
    ExportOptions,
    export_adapter,
    export_llama,
    export_llaso,
    export_whisper,
    gather_weights,
    load_params,
    open_model,
    save_model,
    stream_model,
)
from llaso_jax.conversion.errors import (
    ConfigMismatchError,
    MissingTensorError,
    TensorShapeError,
    UnknownSourceError,
    UnsupportedConfigError,
)
from llaso_jax.conversion.tables import WHISPER
from llaso_jax.convert import main
from llaso_jax.modeling.functional import abstract_params, flatten, unflatten
from llaso_jax.modeling.lora import LoraRule

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


def llama_of(folder):
    return LlamaForCausalLM.from_pretrained(folder)


def llama(root, name="llama"):
    return llama_of(root / name)


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


# --- kept apart -----------------------------------------------------------------------------------

KEPT = {
    "some": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "rank-stabilised, dropout": {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": "all-linear",
        "use_rslora": True,
        "lora_dropout": 0.25,
    },
    "patterns": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"k_proj": 7},
    },
    "whole modules": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_adapter_goes_through_a_model_folder_and_back_to_peft(root, tmp_path, name):
    merged = adapted(llama(root), tmp_path / "lora", **KEPT[name])
    weights = gather_weights(root / "llama", tmp_path / "lora", keep_adapter=True)
    assert {rule.dropout for rule in weights.cfg.lora} == {KEPT[name].get("lora_dropout", 0.0)}
    stream_model(tmp_path / "model", weights)
    stored = open_model(tmp_path / "model")
    assert stored.cfg == weights.cfg

    # Merged on the way out: what peft merges.
    export_llama(tmp_path / "merged", stored.cfg, stored.pieces)
    assert_close(
        {k: v.numpy() for k, v in read_state(tmp_path / "merged").items()},
        {k: v.detach().numpy() for k, v in merged.state_dict().items() if k != "lm_head.weight"},
    )

    # Apart: the base as it was (but for whole modules), and an adapter that peft loads.
    apart = ExportOptions(merge_adapters=False)
    export_llama(tmp_path / "base", stored.cfg, stored.pieces, options=apart)
    before, after = read_state(root / "llama"), read_state(tmp_path / "base")
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed == {key for key in before if name == "whole modules" and "norm" in key}
    export_adapter(tmp_path / "again", stored.cfg, stored.pieces, parts=("language_model",))
    theirs = read_state(tmp_path / "lora")
    assert_bit_equal(
        read_state(tmp_path / "again"), {k: v for k, v in theirs.items() if "lora_" in k}
    )
    loaded = peft.PeftModel.from_pretrained(llama_of(tmp_path / "base"), tmp_path / "again")
    config = loaded.peft_config["default"]
    assert config.lora_dropout == KEPT[name].get("lora_dropout", 0.0)
    again = loaded.merge_and_unload().state_dict()
    for key, value in merged.state_dict().items():
        np.testing.assert_allclose(again[key], value.detach(), rtol=0, atol=1e-6, err_msg=key)


def test_an_adapter_of_the_encoder_is_kept_and_written_under_the_names_of_whisper(root, tmp_path):
    base = WhisperModel.from_pretrained(root / "whisper")
    merged = adapted(base, tmp_path / "lora", r=2, target_modules=r".*encoder.*(fc1|out_proj)")
    weights = gather_weights(root / "llama", root / "whisper", tmp_path / "lora", keep_adapter=True)
    apart = ExportOptions(merge_adapters=False)
    export_whisper(tmp_path / "base", weights.cfg, weights.pieces, options=apart)
    export_adapter(
        tmp_path / "again",
        weights.cfg,
        weights.pieces,
        parts=("audio_tower",),
        prefixes=WHISPER,
        base_model="some/whisper",
    )
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/whisper"
    stock = WhisperModel.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(stock, tmp_path / "again").merge_and_unload()
    for key, value in merged.encoder.state_dict().items():
        np.testing.assert_allclose(loaded.encoder.state_dict()[key], value.detach(), atol=1e-6)


def test_the_command_line_keeps_adapters_and_writes_them(root, tmp_path, capsys):
    merged = adapted(llama(root), tmp_path / "lora", r=2, target_modules=["q_proj", "fc2"])
    source = [str(root / "model"), str(tmp_path / "lora")]
    assert main(["from-hf", *source, "--keep-adapter", "-o", str(tmp_path / "model")]) == 0
    target = ["--adapter", str(tmp_path / "again"), "--llama", str(tmp_path / "base")]
    assert main(["to-hf", str(tmp_path / "model"), *target]) == 0
    loaded = peft.PeftModel.from_pretrained(llama_of(tmp_path / "base"), tmp_path / "again")
    q_proj = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(
        loaded.merge_and_unload().state_dict()[q_proj], merged.state_dict()[q_proj], atol=1e-6
    )
    # Alone: all adapters of the model, the same file here.
    assert main(["to-hf", str(tmp_path / "model"), "--adapter", str(tmp_path / "alone")]) == 0
    assert_bit_equal(read_state(tmp_path / "alone"), read_state(tmp_path / "again"))
    # With the adapter merged, the same model; without it, another.
    assert main(["from-hf", *source, "-o", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    model, other = str(tmp_path / "model"), str(tmp_path / "merged")
    assert main(["verify", model, other, "--weights-only", "--tolerance", "1e-6"]) == 0
    assert main(["verify", model, str(root / "model"), "--weights-only"]) == 1
    assert main(["inspect", model]) == 0
    shown = capsys.readouterr().out
    assert "lora language_model/layers/self_attn/q_proj: rank 2, alpha 8" in shown
    assert f"to-hf {model} --adapter" in shown


def test_adapters_of_all_parts_stay_apart_and_none_is_left_out(root, tmp_path, capsys):
    """What is beside a kept adapter is the base, the projector file too; a part that would lose its own is refused."""
    weights = gather_weights(root / "model")
    rules = (LoraRule("projector/.*", rank=2), LoraRule(".*/layers/self_attn/q_proj", rank=2))
    cfg = dataclasses.replace(weights.cfg, lora=rules)
    params = load_params(weights)
    added = random_params(unflatten(abstract_params(cfg)))
    nested = unflatten({**flatten(added), **flatten(params)})
    save_model(tmp_path / "model", cfg, nested)
    model, adapter = str(tmp_path / "model"), ["--adapter", str(tmp_path / "lora")]
    out = ["--output", str(tmp_path / "out"), "--projector", str(tmp_path / "projector.bin")]
    assert main(["to-hf", model, *adapter, *out]) == 0
    before = torch.load(root / "mm_audio_aligner.bin")
    assert_bit_equal(torch.load(tmp_path / "projector.bin"), before)
    assert_bit_equal(read_state(tmp_path / "out"), read_state(root / "model"))
    again = gather_weights(tmp_path / "out", tmp_path / "lora", keep_adapter=True)
    for path, leaf in flatten(load_params(again)).items():
        np.testing.assert_array_equal(leaf, flatten(nested)[path], err_msg=path)

    capsys.readouterr()
    parts = ["--llama", str(tmp_path / "llama"), "--whisper", str(tmp_path / "whisper")]
    assert main(["to-hf", model, "--adapter", str(tmp_path / "lora2"), *parts]) == 1
    assert "adapters in audio_tower/layers/self_attn/q_proj too" in capsys.readouterr().err
    assert not (tmp_path / "llama").exists()


def test_pairs_on_nothing_that_is_run_are_said(root, tmp_path):
    base = WhisperModel.from_pretrained(root / "whisper")
    adapted(base, tmp_path / "lora", r=2, target_modules=r".*decoder.*fc1")
    with pytest.raises(UnsupportedConfigError, match="changes nothing that a speech-language"):
        gather_weights(root / "whisper", tmp_path / "lora", keep_adapter=True)


def test_a_model_without_adapters_has_none_to_write(root, tmp_path):
    weights = gather_weights(root / "llama")
    with pytest.raises(UnsupportedConfigError, match="no LoRA adapter"):
        export_adapter(tmp_path / "out", weights.cfg, weights.pieces)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "in 1 of 3 layers"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
            "r=2 scale=4, r=5",
        ),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.weight, which is no linear layer"),
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head.weight, which is no linear layer"),
    ],
    ids=["some layers", "ranks by layer", "embeddings", "head"],
)
def test_what_can_only_be_merged_says_so(root, tmp_path, settings, told):
    untied = {"embed_tokens", "lm_head"} & set(settings["target_modules"])
    base = "untied" if untied else "llama"
    adapted(llama(root, base), tmp_path, r=2, lora_alpha=8, **settings)
    with pytest.raises(UnsupportedConfigError, match=f"{told}(.|\n)*leave out --keep-adapter"):
        gather_weights(root / base, tmp_path, keep_adapter=True)
    gather_weights(root / base, tmp_path)


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
