"""Bad sources: each has its own error class, whose message carries the names and both numbers."""

import json
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
from test_conversion_support import ALIGNER, TOWER, TorchSpeechLM, save_state, torch

from llaso_jax.conversion import (
    ExportOptions,
    export_llaso,
    gather_weights,
    load_model,
    load_params,
    save_model,
)
from llaso_jax.conversion import errors as e
from llaso_jax.errors import CheckpointError, ConversionError


@pytest.fixture(scope="module")
def reference():
    return TorchSpeechLM()


@pytest.fixture
def root(reference, tmp_path):
    reference.save(tmp_path)
    return tmp_path


def change(root, reference, **changes):
    """Rewrite the checkpoint with tensors replaced (None: left out)."""
    state = {**reference.state(), **{k.replace("__", "."): v for k, v in changes.items()}}
    save_state(root / "model", {k: v for k, v in state.items() if v is not None})


def set_config(root, **changes):
    path = root / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        TOWER + "conv1.weight",
        TOWER + "layers.1.fc1.bias",
        ALIGNER + "2.weight",
        ALIGNER + "0.bias",
    ],
)
def test_missing(root, reference, name):
    change(root, reference, **{name: None})
    with pytest.raises(e.MissingTensorError, match=name.replace(".", r"\.")):
        gather_weights(root / "model")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.9.mlp.up_proj.weight",
        "model.vision_tower.weight",
        TOWER + "layers.0.self_attn.k_proj.bias",
        ALIGNER + "2.scale",
    ],
)
def test_unexpected(root, reference, name):
    change(root, reference, **{name: torch.zeros(3)})
    with pytest.raises(e.UnexpectedTensorError, match=name.replace(".", r"\.")):
        gather_weights(root / "model")


def test_known_names_that_are_not_needed_are_reported(root, reference):
    change(root, reference, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert gather_weights(root / "model").ignored == (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )


def test_wrong_shape_names_both(root, reference):
    set_config(root, intermediate_size=88)
    with pytest.raises(e.TensorShapeError, match=r"\(80, 48\) given, \(88, 48\) needed"):
        gather_weights(root / "model")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_wrong_dtype(root, reference, dtype):
    change(root, reference, model__norm__weight=torch.ones(48, dtype=dtype))
    with pytest.raises(e.TensorDtypeError, match=r"model\.norm\.weight: int"):
        gather_weights(root / "model")


def test_mixed_dtypes_in_one_stack(root, reference):
    name = "model.layers.1.input_layernorm.weight"
    change(root, reference, **{name: torch.ones(48, dtype=torch.bfloat16)})
    with pytest.raises(e.TensorDtypeError, match="input_layernorm/weight: bfloat16, float32"):
        gather_weights(root / "model")


def test_one_name_in_two_shards(root, reference):
    folder = root / "model"
    (folder / "model.safetensors").unlink()
    save_state(folder, reference.state(), shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    second.unlink()
    shutil.copy(first, second)
    with pytest.raises(e.DuplicateTensorError, match="00001-of-00002"):
        gather_weights(folder)


def test_one_name_twice_in_a_header(root):
    path = root / "model" / "model.safetensors"
    raw = path.read_bytes()
    swapped = raw.replace(b"layers.1.mlp.up_proj", b"layers.0.mlp.up_proj")
    path.write_bytes(swapped)
    with pytest.raises(e.DuplicateTensorError, match=r"layers\.0\.mlp\.up_proj"):
        gather_weights(root / "model")


def test_two_sources_of_one_kind(root):
    with pytest.raises(e.DuplicateTensorError, match="whisper"):
        gather_weights(root / "whisper", root / "whisper")


def test_missing_shard(root, reference):
    folder = root / "model"
    (folder / "model.safetensors").unlink()
    save_state(folder, reference.state(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(e.MissingShardError, match="model-00002-of-00003"):
        gather_weights(folder)


@pytest.mark.parametrize("keep", [3, 8, 200, -1])
def test_truncated_safetensors(root, keep):
    path = root / "model" / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:keep])
    with pytest.raises(e.CorruptFileError, match=r"model\.safetensors"):
        gather_weights(root / "model")


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[1]",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    ],
)
def test_damaged_safetensors_header(root, header):
    path = root / "model" / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(e.CorruptFileError):
        gather_weights(root / "model")


def test_header_length_beyond_the_file(root):
    path = root / "model" / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 10**12) + raw[8:])
    with pytest.raises(e.CorruptFileError, match="1000000000000"):
        gather_weights(root / "model")


class Bomb:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("wrapped", [False, True])
def test_pickle_with_code_is_refused(root, wrapped, capsys):
    path = root / "mm_audio_aligner.bin"
    payload = {"w": Bomb()} if wrapped else Bomb()
    torch.save(payload, path)
    with pytest.raises(e.UnsafePickleError, match=r"builtin.*\.print"):
        gather_weights(root / "model", path)
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["os.system", "collections.OrderedDict.fromkeys", "torch.load"])
def test_pickle_global_outside_the_list(root, name):
    module, _, attribute = name.partition(".")
    data = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute)
    )
    with zipfile.ZipFile(root / "evil.bin", "w") as archive:
        archive.writestr("evil/data.pkl", data + b"\x93.")
    with pytest.raises(e.UnsafePickleError):
        gather_weights(root / "model", root / "evil.bin")


def torch_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_damaged_torch_files(root):
    path = root / "bad.bin"
    good = (root / "mm_audio_aligner.bin").read_bytes()
    cases = [
        lambda: path.write_bytes(good[: len(good) // 2]),
        lambda: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
        lambda: torch_zip(path, {"a/other": b""}),
        lambda: torch_zip(path, {"a/data.pkl": b"\x80\x02}q"}),
        lambda: torch_zip(path, {"a/data.pkl": b"\x80\x02]."}),
        lambda: torch_zip(path, {"a/data.pkl": b"\x80\x02}X\x01\x00\x00\x00aK\x01s."}),
        lambda: torch_zip(path, {"a/byteorder": b"big", "a/data.pkl": b"\x80\x02}."}),
    ]
    for damage in cases:
        damage()
        with pytest.raises(e.CorruptFileError):
            gather_weights(root / "model", path)


@pytest.mark.parametrize("change", ["storage missing", "storage short", "compressed"])
def test_torch_storage_that_does_not_fit(root, change):
    path, bad = root / "mm_audio_aligner.bin", root / "bad.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    key = next(name for name in entries if name.endswith("data/0"))
    if change == "storage missing":
        entries.pop(key)
    if change == "storage short":
        entries[key] = entries[key][:-4]
    with zipfile.ZipFile(
        bad, "w", zipfile.ZIP_DEFLATED if change == "compressed" else 0
    ) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(e.CorruptFileError):
        gather_weights(root / "model", bad)


def test_nothing_there(root, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.bin").write_text("hello, this is no model at all")
    for path in ("nowhere", "empty", "text.bin"):
        with pytest.raises(e.UnknownSourceError, match=path):
            gather_weights(tmp_path / path)
    with pytest.raises(e.UnknownSourceError):
        gather_weights()
    with pytest.raises(e.UnknownSourceError, match="projector"):
        gather_weights(root / "mm_audio_aligner.bin")


def test_no_config(root):
    (root / "model" / "config.json").unlink()
    with pytest.raises(e.ConfigMismatchError, match=r"config\.json"):
        gather_weights(root / "model")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, e.UnsupportedConfigError, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, e.UnsupportedConfigError, "linear"),
        ({"rope_scaling": {"rope_type": "llama3"}}, e.ConfigMismatchError, "factor"),
        ({"partial_rotary_factor": 0.5}, e.UnsupportedConfigError, "partial"),
        ({"hidden_act": "gelu"}, e.UnsupportedConfigError, "hidden_act='gelu'"),
        ({"attention_bias": True}, e.UnsupportedConfigError, "attention_bias"),
        ({"mlp_bias": True}, e.UnsupportedConfigError, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, e.UnsupportedConfigError, "quantized"),
        ({"mm_audio_select_layer": -2}, e.UnsupportedConfigError, "mm_audio_select_layer=-2"),
        ({"mm_audio_hidden_size": 1280}, e.ConfigMismatchError, "1280.*d_model=32"),
        ({"audio_projector_type": "linear"}, e.ConfigMismatchError, "linear.*mlp2x_gelu"),
        ({"audio_projector_type": "identity"}, e.ConfigMismatchError, "identity"),
        ({"num_attention_heads": 5}, e.ConfigMismatchError, "num_attention_heads=5"),
        ({"num_hidden_layers": 4}, e.MissingTensorError, r"layers\.3"),
        ({"num_hidden_layers": 2}, e.UnexpectedTensorError, r"layers\.2"),
        ({"tie_word_embeddings": False}, e.MissingTensorError, "lm_head"),
        ({"vocab_size": 64}, e.TensorShapeError, r"\(61, 48\) given, \(64, 48\)"),
        ({"hidden_size": None}, e.ConfigMismatchError, "hidden_size"),
    ],
)
def test_config(root, changes, error, words):
    set_config(root, **changes)
    with pytest.raises(error, match=words):
        gather_weights(root / "model")


def test_whisper_config_of_another_size(root):
    config = json.loads((root / "whisper" / "config.json").read_text())
    (root / "whisper" / "config.json").write_text(json.dumps({**config, "encoder_ffn_dim": 64}))
    with pytest.raises(e.TensorShapeError, match="fc1"):
        gather_weights(root / "whisper")


def test_config_in_the_form_of_transformers_5(root):
    want = gather_weights(root / "model").cfg
    config = json.loads((root / "model" / "config.json").read_text())
    scaling = config.pop("rope_scaling")
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    (root / "model" / "config.json").write_text(json.dumps(config))
    assert gather_weights(root / "model").cfg == want


def test_head_beside_tied_embeddings(root, reference):
    table = reference.state()["model.embed_tokens.weight"]
    change(root, reference, **{"lm_head.weight": table.clone()})
    assert gather_weights(root / "model").ignored == ("lm_head.weight",)
    change(root, reference, **{"lm_head.weight": table + 1})
    with pytest.raises(e.ConfigMismatchError, match="tie_word_embeddings"):
        gather_weights(root / "model")


def test_tower_that_cannot_be_found(root, reference):
    save_state(root / "model", reference.state(tower=False))
    set_config(root, mm_audio_tower="openai/whisper-large-v3")
    with pytest.raises(e.MissingTensorError, match="openai/whisper-large-v3"):
        gather_weights(root / "model")


def test_heads_that_cannot_be_inferred(root):
    set_config(root, mm_audio_tower="somewhere")
    with pytest.raises(e.ConfigMismatchError, match="d_model=32"):
        gather_weights(root / "model")


def test_projector_of_another_kind_than_asked(root):
    with pytest.raises(e.ConfigMismatchError, match="projector_type=linear"):
        gather_weights(root / "model", projector_type="linear")
    with pytest.raises(e.ConfigMismatchError, match="stack=2"):
        gather_weights(root / "model", stack=2)


def test_target_is_never_half_written(root, tmp_path):
    weights = gather_weights(root / "model")
    params = load_params(weights)
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("kept")
    with pytest.raises(e.TargetExistsError, match="overwrite"):
        save_model(target, weights.cfg, params)
    with pytest.raises(e.TargetExistsError):
        export_llaso(target, weights.cfg, params)
    assert [f.name for f in target.iterdir()] == ["precious"]

    def full_disk(name, nbytes):
        raise OSError(28, "No space left on device")

    with pytest.raises(ConversionError, match="No space left"):
        export_llaso(
            target,
            weights.cfg,
            params,
            options=ExportOptions(overwrite=True, progress=full_disk),
        )
    assert [f.name for f in target.iterdir()] == ["precious"]
    assert not list(tmp_path.glob(".out*"))
    save_model(target, weights.cfg, params, overwrite=True)
    assert not (target / "precious").exists()
    assert load_model(target)[0] == weights.cfg


def test_params_that_are_not_the_models(root, tmp_path):
    weights = gather_weights(root / "model")
    params = load_params(weights)
    extra = {**params, "projector": {**params["projector"], "gate": np.zeros(3)}}
    with pytest.raises(e.UnmappedParameterError, match="projector/gate"):
        save_model(tmp_path / "a", weights.cfg, extra)
    less = {**params, "projector": {}}
    with pytest.raises(e.MissingTensorError, match="projector/linear_0/bias"):
        export_llaso(tmp_path / "b", weights.cfg, less)
    assert not (tmp_path / "a").exists()
    with pytest.raises(e.TensorDtypeError, match="int8"):
        export_llaso(tmp_path / "b", weights.cfg, params, options=ExportOptions(dtype="int8"))


def test_model_folders_that_cannot_be_read(root, tmp_path):
    with pytest.raises(CheckpointError, match="from-hf"):
        load_model(root / "model")
    alone = gather_weights(root / "whisper")
    folder = save_model(tmp_path / "m", alone.cfg, load_params(alone))
    with pytest.raises(CheckpointError, match="language_model"):
        load_model(folder)
    assert list(load_model(folder, parts=("audio_tower",))[1]) == ["audio_tower"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(CheckpointError, match="99"):
        load_model(folder, parts=("audio_tower",))
    config["model"]["audio"]["surprise"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(e.CorruptFileError, match="surprise"):
        load_model(folder, parts=("audio_tower",))
