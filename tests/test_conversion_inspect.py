"""`llaso convert inspect`: what is at a path and what is wrong with it, from headers alone."""

import json
import shlex

import pytest
from test_conversion_cli import save_tokenizer
from test_conversion_formats import ct2_bytes, ct2_variables, write_gguf
from test_conversion_support import (
    ALIGNER,
    ORACLE_NAMES,
    ORACLES,
    TOWER,
    VOCAB,
    TorchSpeechLM,
    llama_config,
    save_state,
    torch,
)

from llaso_jax.conversion import errors as e
from llaso_jax.conversion import gather_weights, load_params, read_info, save_model
from llaso_jax.conversion.inspection import inspect_source
from llaso_jax.conversion.tensors import ByteFile, ComputedTensor, FileTensor
from llaso_jax.convert import main
from llaso_jax.modeling.functional import flatten
from llaso_jax.modeling.rope import RopeScaling

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def reference():
    return TorchSpeechLM()


@pytest.fixture
def root(reference, tmp_path):
    reference.save(tmp_path)
    return tmp_path


def run(*arguments):
    return main(["inspect", *map(str, arguments)])


def change(root, reference, changes, **saved):
    """Rewrite the checkpoint with tensors replaced (None: left out)."""
    state = {**reference.state(), **changes}
    save_state(root / "model", {k: v for k, v in state.items() if v is not None}, **saved)


def set_config(root, folder="model", **changes):
    path = root / folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def part(found, name):
    (only,) = (part for part in found.parts if part.name == name)
    return only


def test_a_llaso_checkpoint(root, reference, capsys):
    found = inspect_source(root / "model")
    assert (found.kind, found.format, found.files, found.whole) == ("llaso", "safetensors", 1, True)
    assert [part.name for part in found.parts] == ["audio_tower", "projector", "language_model"]
    state = reference.state()
    assert found.parameters == sum(tensor.numel() for tensor in state.values())
    assert part(found, "projector").tensors == 4
    assert part(found, "audio_tower").sizes["num_mel_bins"] == 80
    assert part(found, "audio_tower").dtypes == {"float32": 37}
    text = part(found, "language_model").sizes
    assert (text["num_key_value_heads"], text["tie_word_embeddings"]) == (2, True)
    assert RopeScaling(**text["rope_scaling"]).factor == 32
    assert part(found, "projector").sizes == {
        "type": "mlp2x_gelu",
        "stack": 1,
        "reads": 32,
        "writes": 48,
    }

    assert run(root / "model") == 0
    out = capsys.readouterr().out
    for line in (
        "2 layers, width 32, 4 heads of 8, feed-forward 48, 80 mel bins, 60 positions",
        "mlp2x_gelu, 32 -> 48, frame by frame",
        "6 heads of 8, 2 key/value heads, feed-forward 80, vocabulary 61, tied head",
        "RoPE 500000 llama3 scaling x32",
        f"{found.parameters:,}",
        f"llaso convert from-hf {root / 'model'} --output MODEL",
    ):
        assert line in out, line


@pytest.mark.parametrize("name", ORACLE_NAMES)
def test_checkpoints_of_upstream_and_the_command_that_converts_them(name, tmp_path):
    model = ORACLES / name / "model"
    if not model.is_dir():
        pytest.skip(f"{model} is not on this machine")
    found = inspect_source(model)
    assert found.whole
    (command,) = found.commands.values()
    words = ["llaso", "convert", *shlex.split(command)[2:]]
    assert main([str(tmp_path / "m") if w == "MODEL" else w for w in words[2:]]) == 0
    assert read_info(tmp_path / "m").cfg.text.vocab_size == 120
    converted = inspect_source(tmp_path / "m")
    assert (converted.kind, converted.whole) == ("model folder", True)
    assert converted.parameters == found.parameters
    assert "to-hf" in converted.commands["a LLaSO folder"]


def test_no_tensor_is_read(root, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor was read")

    for reader in (FileTensor, ComputedTensor):
        monkeypatch.setattr(reader, "read", refuse)
    reading, count = ByteFile.read, []
    monkeypatch.setattr(
        ByteFile, "read", lambda self, at, n: count.append(n) or reading(self, at, n)
    )
    assert inspect_source(root / "model").whole
    size = (root / "model" / "model.safetensors").stat().st_size
    assert sum(count) < size / 10, (sum(count), size)


def test_shards_in_bfloat16(root, reference):
    (root / "model" / "model.safetensors").unlink()
    save_state(root / "model", reference.state(dtype=torch.bfloat16), weights="torch", shards=3)
    found = inspect_source(root / "model")
    assert (found.format, found.files, found.whole) == ("torch", 3, True)
    assert all(list(part.dtypes) == ["bfloat16"] for part in found.parts)
    assert sum(part.nbytes for part in found.parts) == 2 * found.parameters


@pytest.mark.parametrize(
    ("name", "where"),
    [
        (UP, "language_model"),
        (TOWER + "conv1.weight", "audio_tower"),
        (TOWER + "layers.1.fc1.bias", "audio_tower"),
        (ALIGNER + "0.bias", "projector"),
    ],
)
def test_missing(root, reference, capsys, name, where):
    change(root, reference, {name: None})
    found = inspect_source(root / "model")
    assert part(found, where).missing == (name,)
    assert [p.name for p in found.parts if not p.whole] == [where]
    assert found.commands == {}
    assert run(root / "model") == 1
    out = capsys.readouterr().out
    assert f"{where}: 1 tensor is missing:\n  {name}" in out
    assert "from-hf" not in out


def test_missing_layer_shows_both_numbers(root):
    set_config(root, num_hidden_layers=4)
    found = part(inspect_source(root / "model"), "language_model")
    assert len(found.missing) == 9
    assert found.problems == ("the configuration says 4 layers, the tensors are those of 3",)


def test_unused_and_ignored_are_told_apart(root, reference, capsys):
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(root, reference, {"model.gate.weight": torch.ones(3), buffer: torch.ones(4)})
    found = inspect_source(root / "model")
    assert part(found, "language_model").unused == ("model.gate.weight",)
    assert found.ignored == (buffer,)
    assert run(root / "model") == 1
    assert "model.gate.weight" in capsys.readouterr().out


def test_wrong_shape_shows_both(root, reference, capsys):
    change(root, reference, {UP: torch.ones(88, 48)})
    (wrong,) = part(inspect_source(root / "model"), "language_model").wrong_shape
    assert (wrong.name, wrong.given, wrong.needed) == (UP, (88, 48), (80, 48))
    assert run(root / "model") == 1
    assert f"{UP}: (88, 48) given, (80, 48) needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 64}, "(61, 48) given, (64, 48) needed"),
        ({"mm_audio_hidden_size": 1280}, "mm_audio_hidden_size=1280, but the audio tower has d_model=32"),
        ({"audio_projector_type": "linear"}, "'linear', but the tensors are those of 'mlp2x_gelu'"),
        ({"mm_audio_select_layer": -2}, "mm_audio_select_layer=-2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)  # fmt: skip
def test_config_that_disagrees_with_tensors(root, capsys, changes, words):
    set_config(root, **changes)
    assert run(root / "model") == 1
    assert words in capsys.readouterr().out


def test_dtypes_that_cannot_be_converted(root, reference, capsys):
    change(root, reference, {UP: torch.ones(80, 48, dtype=torch.int8)})
    assert part(inspect_source(root / "model"), "language_model").dtypes["int8"] == 1
    assert run(root / "model") == 1
    assert f"{UP}: int8" in capsys.readouterr().out


def test_what_inspect_calls_whole_converts_and_nothing_else(root, reference):
    """The two are one decision, for every way of breaking a checkpoint above."""
    for name, value in {
        UP: None,
        TOWER + "conv1.bias": torch.ones(3),
        ALIGNER + "2.scale": torch.ones(3),
        "model.norm.weight": torch.ones(48, dtype=torch.int32),
        "lm_head.weight": reference.state()["model.embed_tokens.weight"].clone(),
    }.items():
        change(root, reference, {name: value})
        try:
            gather_weights(root / "model")
            converts = True
        except e.ConversionError:
            converts = False
        assert inspect_source(root / "model").whole == converts, name


def test_without_its_tower(root, reference):
    save_state(root / "model", reference.state(tower=False))
    found = inspect_source(root / "model")  # mm_audio_tower names a folder that is there
    assert (found.whole, len(found.parts)) == (True, 2)
    assert "--whisper" not in next(iter(found.commands.values()))
    set_config(root, mm_audio_tower="openai/whisper-large-v3")
    ((made, command),) = inspect_source(root / "model").commands.items()
    assert "openai/whisper-large-v3" in made
    words = shlex.split(command.replace("WHISPER", str(root / "whisper")).replace("MODEL", "M"))
    assert main([str(root / "m") if w == "M" else w for w in words[2:]]) == 0


def test_projector_files_and_checkpoints_without_one(root, reference):
    side = root / "mm_audio_aligner.bin"
    found = inspect_source(side)
    assert (found.kind, found.whole, found.parameters) == (
        "projector",
        True,
        32 * 48 + 49 * 48 + 48,
    )
    assert found.parts[0].sizes["stack"] is None
    assert "--projector" in next(iter(found.commands.values()))

    change(root, reference, {name: None for name in reference.state() if name.startswith(ALIGNER)})
    ((made, command),) = inspect_source(root / "model").commands.items()
    assert "PROJECTOR" in made
    words = shlex.split(command.replace("PROJECTOR", str(side)))
    assert main([str(root / "m") if w == "MODEL" else w for w in words[2:]]) == 0

    torch.save({ALIGNER + "0.weight": torch.ones(48, 32), ALIGNER + "2.bias": torch.ones(7)}, side)
    broken = inspect_source(side).parts[0]
    assert set(broken.missing) == {ALIGNER + "0.bias", ALIGNER + "2.weight"}
    assert broken.wrong_shape[0].given == (7,)


def test_a_lora_adapter(tmp_path, capsys):
    folder = tmp_path / "lora"
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    state = {f"{module}A.weight": torch.ones(4, 48), f"{module}B.weight": torch.ones(48, 4)}
    said = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "some/llama"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    torch.save(state, folder / "adapter_model.bin")
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert "LoRA, 1 pairs of rank 4, alpha 8, trained on some/llama" in out
    assert f"llaso convert from-hf BASE {folder} --output MODEL" in out

    torch.save({f"{module}A.weight": torch.ones(4, 48)}, folder / "adapter_model.bin")
    assert inspect_source(folder).parts[0].missing == (f"{module}B.weight",)
    torch.save({**state, f"{module}B.weight": torch.ones(48, 5)}, folder / "adapter_model.bin")
    assert run(folder) == 1
    assert "(4, 48)" in capsys.readouterr().out


def test_whisper_folder_and_ctranslate2(root, reference, tmp_path):
    found = inspect_source(root / "whisper")
    assert (found.kind, found.whole) == ("whisper", True)
    assert len(found.ignored) > 20
    assert all(name.startswith("decoder.") for name in found.ignored)
    set_config(root, "whisper", encoder_ffn_dim=64)
    assert len(inspect_source(root / "whisper").parts[0].wrong_shape) == 6

    packed = tmp_path / "model.bin"
    packed.write_bytes(ct2_bytes(ct2_variables(reference.whisper.encoder, 4)))
    same = inspect_source(packed)
    assert (same.format, same.whole) == ("ctranslate2", True)
    assert same.parts[0].sizes == found.parts[0].sizes


def test_gguf_tells_how_it_is_stored(tmp_path):
    gguf = pytest.importorskip("gguf")
    from transformers import LlamaForCausalLM

    sizes = {"hidden_size": 96, "intermediate_size": 64}
    llama = LlamaForCausalLM(llama_config(True, scaled=False, **sizes)).eval()
    write_gguf(tmp_path / "m.gguf", llama, kind=gguf.GGMLQuantizationType.Q8_0)
    found = inspect_source(tmp_path / "m.gguf")
    assert (found.kind, found.format, found.whole) == ("llama", "gguf", True)
    assert found.parts[0].dtypes == {"Q8_0": 22, "F32": 7}
    assert found.nbytes < found.parts[0].nbytes / 2


def test_tokens_inside_a_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    from llaso_jax.conversion.tokenizer_check import check_tokenizer_files

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("general.tags", ["a", "b"])
    writer.add_array("llama.numbers", [1, 2, 3])
    writer.add_token_list(["w0", "<|eot_id|>", "w2"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = {"eos_token_id": 1}
    check = check_tokenizer_files(tmp_path / "m.gguf", rows=3, config=config, is_llaso=False)
    assert (check.length, check.eos) == (3, {1: "<|eot_id|>"})
    assert check.template_tokens["<|eot_id|>"] == 1


def test_tokenizer_against_embeddings(root, capsys):
    folder = root / "model"
    assert inspect_source(folder).tokenizer.file is None
    save_tokenizer(folder, VOCAB - 5)
    check = inspect_source(folder).tokenizer
    assert (check.length, check.rows, check.problems) == (VOCAB - 5, VOCAB, ())
    assert set(check.added_tokens.values()) == {None}
    assert check.eos == {2: "w2"}

    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 99]}))
    save_tokenizer(folder, VOCAB - 4)
    assert run(folder) == 1
    out = capsys.readouterr().out
    assert "eos_token_id 99 has no row among the 61 embeddings" in out
    assert "57 tokens and lacks <Audio>" in out
    assert "lacks <|begin_of_text|>, <|start_header_id|>, <|end_header_id|>, <|eot_id|>" in out


def test_plain_llama_may_have_fewer_rows_than_its_tokenizer_needs(root, reference):
    reference.llama.save_pretrained(root / "llama")
    save_tokenizer(root / "llama")
    found = inspect_source(root / "llama")
    assert (found.kind, found.whole, found.tokenizer.length) == ("llama", True, VOCAB)
    alone, whole = (found.commands[key] for key in sorted(found.commands, reverse=True))
    assert "WHISPER" in whole
    assert "WHISPER" not in alone


def test_a_model_folder_whose_config_was_changed(root):
    weights = gather_weights(root / "whisper")
    folder = save_model(root / "m", weights.cfg, load_params(weights))
    found = inspect_source(folder)
    assert [p.name for p in found.parts] == ["audio_tower"]
    assert list(found.commands) == ["a stock Whisper encoder"]
    config = json.loads((folder / "config.json").read_text())
    config["model"]["audio"]["encoder_ffn_dim"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    wrong = {w.name: (w.given, w.needed) for w in inspect_source(folder).parts[0].wrong_shape}
    assert wrong["audio_tower/layers/fc1/bias"] == ((2, 48), (2, 64))
    (folder / "params" / "_METADATA").unlink()
    with pytest.raises(e.CorruptFileError, match="params"):
        inspect_source(folder)


def test_a_model_folder_with_another_number_of_layers(root):
    weights = gather_weights(root / "whisper")
    params = load_params(weights)
    folder = save_model(root / "m", weights.cfg, params)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["audio"]["encoder_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    stacked = [path for path in flatten(params) if "/layers/" in path]
    wrong = inspect_source(folder).parts[0].wrong_shape
    assert sorted(w.name for w in wrong) == stacked
    assert {(w.given[0], w.needed[0]) for w in wrong} == {(2, 3)}


def test_damaged_files_give_the_error_of_their_class(root, capsys):
    path = root / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert run(root / "model") == 1
    assert "error (CorruptFileError)" in capsys.readouterr().err
    assert run(root / "model", "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["whole"] is False
    assert answer["error"]["type"] == "CorruptFileError"
    assert "model.safetensors" in answer["error"]["message"]
    assert run(root / "nowhere") == 1
    assert "UnknownSourceError" in capsys.readouterr().err


def test_json_says_the_same(root, reference, capsys):
    assert run(root / "model", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    found = inspect_source(root / "model")
    assert answer["parameters"] == found.parameters
    assert answer["parts"][2]["sizes"] == part(found, "language_model").sizes
    assert answer["commands"] == dict(found.commands)
    change(root, reference, {UP: torch.ones(88, 48)})
    assert run(root / "model", "--json") == 1
    (wrong,) = json.loads(capsys.readouterr().out)["parts"][2]["wrong_shape"]
    assert wrong == {"name": UP, "given": [88, 48], "needed": [80, 48]}
