"""`llaso convert verify`: two sets of weights against each other, by tensors and by what they answer."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from test_conversion_cli import save_tokenizer
from test_conversion_support import ORACLES, TorchSpeechLM, save_state, torch

from llaso_jax.conversion import errors as e
from llaso_jax.conversion import gather_weights, load_params, save_model
from llaso_jax.conversion.output_comparison import default_clip
from llaso_jax.conversion.tensors import BFLOAT16, ByteFile
from llaso_jax.conversion.verification import open_weights, verify
from llaso_jax.convert import EXAMPLES, VERIFY_EXAMPLES, _parser, main

CHANGED = {
    "encoder layer 1": "model.audio_tower.audio_tower.layers.1.fc2.weight",
    "projector": "model.mm_audio_aligner.projector.2.weight",
    "decoder layer 0": "model.layers.0.mlp.down_proj.weight",
    "decoder layer 2": "model.layers.2.self_attn.o_proj.weight",
    "decoder norm": "model.norm.weight",
}


@pytest.fixture(scope="module")
def reference():
    return TorchSpeechLM()


@pytest.fixture(scope="module")
def root(reference, tmp_path_factory):
    """model/ (a LLaSO checkpoint), m/ (a model folder of it), hf/ (exported again), b16/ (in bfloat16)."""
    root = tmp_path_factory.mktemp("verify")
    reference.save(root)
    convert("from-hf", root / "model", "-o", root / "m")
    convert("to-hf", root / "m", "-o", root / "hf", "--llama", root / "l", "--whisper", root / "w")
    convert("from-hf", root / "model", "-o", root / "b16", "--dtype", "bfloat16")
    return root


def convert(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def run(*arguments):
    return main(["verify", *map(str, arguments)])


def changed(root, reference, tmp_path, change, **config):
    """A copy of the checkpoint with tensors changed in place by `change(state)`."""
    folder = tmp_path / "changed"
    folder.mkdir()
    state = reference.state()
    change(state)
    save_state(folder, state)
    said = json.loads((root / "model" / "config.json").read_text())
    said = {**said, "mm_audio_tower": str(root / "whisper"), **config}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_there_and_back_is_equal_bit_for_bit(root, capsys):
    for a, b in (("model", "m"), ("m", "hf"), ("model", "hf")):
        assert run(root / a, root / b) == 0
        out = capsys.readouterr().out
        assert "equal bit for bit: audio_tower, projector, language_model" in out
        assert "every hidden state is bit-equal" in out
        assert "rule of 37 parameters: bit-equal, both float32" in out
        assert str(default_clip()) in out


def test_padding_of_the_vocabulary_is_shown_and_changes_nothing(root, tmp_path):
    convert("from-hf", root / "model", "-o", tmp_path / "m", "--vocab-multiple-of", 8)
    found = verify([root / "model"], [tmp_path / "m"])
    assert found.bit_equal
    assert found.outputs.logits.max_abs == 0
    assert [(f.name, f.a, f.b, f.matters) for f in found.config] == [
        ("language_model.vocab_multiple_of", 1, 8, False)
    ]


def test_oracles_against_their_own_export(tmp_path):
    model = ORACLES / "tiny-untied-128" / "model"
    if not model.is_dir():
        pytest.skip(f"{model} is not on this machine")
    convert("from-hf", model, "-o", tmp_path / "m")
    found = verify([model], [tmp_path / "m"], outputs=False)
    assert found.bit_equal
    assert not found.config


@pytest.mark.parametrize(("step", "name"), CHANGED.items())
def test_one_changed_weight_is_found_where_it_is(root, reference, tmp_path, capsys, step, name):
    def change(state):
        state[name].view(-1)[7] += 0.25

    folder = changed(root, reference, tmp_path, change)
    found = verify([root / "m"], [folder])
    assert not found.equal
    (tensor,) = [tensor for tensor in found.tensors if not tensor.bit_equal]
    assert tensor.max_abs == pytest.approx(0.25, rel=1e-5)
    assert tensor.path.endswith(name.split(".", 3)[-1].split(".", 1)[-1].replace(".", "/")[-6:])
    if "layers" in name:
        assert tensor.layers == (int(name.split("layers.")[1].split(".")[0]),)
    assert found.outputs.first.name == step
    names = [state.name for state in found.outputs.states]
    before = found.outputs.states[: names.index(step)]
    assert before
    assert all(state.max_abs == 0 for state in before)
    assert found.outputs.logits.max_abs > 0

    assert run(root / "m", folder) == 1
    out = capsys.readouterr().out
    assert f"first difference: {step}" in out
    assert "breaks the rule" in out
    assert "not equal" in out


def test_a_bfloat16_copy_is_within_its_rounding(root, capsys):
    found = verify([root / "m"], [root / "b16"])
    assert found.equal
    assert not found.bit_equal
    assert {t.rule for t in found.tensors} == {"within the rounding of bfloat16, the coarser dtype"}
    assert 0 < max(t.max_rel for t in found.tensors) <= 2**-8
    assert found.outputs.logits.max_rel > 0
    assert run(root / "m", root / "b16", "--dtype", "bfloat16") == 0
    assert "bit-equal, both bfloat16" in capsys.readouterr().out


def test_a_bfloat16_copy_that_is_cut_off_instead_of_rounded_is_not(root, tmp_path):
    weights = open_weights([root / "m"])
    params = load_params(weights)
    layer = params["language_model"]["layers"]["mlp"]["up_proj"]
    bits = np.array(layer["weight"]).view(np.uint32) >> 16
    layer["weight"] = bits.astype(np.uint16).view(BFLOAT16)
    folder = save_model(tmp_path / "cut", weights.cfg, params)
    found = verify([root / "m"], [folder], outputs=False)
    assert [t.path for t in found.tensors if not t.within] == [
        "language_model/layers/mlp/up_proj/weight"
    ]
    assert verify([root / "m"], [folder], outputs=False, tolerance=2**-7).equal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_and_large_values_round_too(reference, tmp_path, dtype):
    state = reference.state()
    name = "model.layers.0.mlp.gate_proj.weight"
    state[name].view(-1)[:6] = torch.tensor([3e-8, -5e-6, 6e-5, 60000.0, 0.0, -0.0])
    config = json.dumps(reference.config())
    for folder, values in (("a", state), ("b", {k: v.to(dtype) for k, v in state.items()})):
        (tmp_path / folder).mkdir()
        save_state(tmp_path / folder, values)
        (tmp_path / folder / "config.json").write_text(config)
    reference.whisper.save_pretrained(tmp_path / "whisper")
    assert verify([tmp_path / "a"], [tmp_path / "b"], outputs=False).equal


def test_tolerance_judges_weights_and_logits(root, reference, tmp_path):
    def change(state):
        state["model.norm.weight"][3] += 1e-3

    folder = changed(root, reference, tmp_path, change)
    assert not verify([root / "m"], [folder], outputs=False).equal
    loose = verify([root / "m"], [folder], tolerance=0.1)
    assert loose.equal
    assert loose.outputs_limit == 0.1
    relative = max(t.max_rel for t in loose.tensors)
    assert not dataclasses.replace(loose, tolerance=loose.outputs.logits.max_rel / 2).equal
    assert not verify([root / "m"], [folder], tolerance=relative / 2, outputs=False).equal


def test_values_that_are_no_numbers(root, reference, tmp_path):
    def change(state):
        state["model.norm.weight"][3] = float("nan")

    folder = changed(root, reference, tmp_path, change)
    found = verify([root / "m"], [folder])
    assert not found.equal
    assert max(t.max_abs for t in found.tensors) == float("inf")
    assert found.outputs.logits.max_abs == float("inf")
    assert verify([folder], [folder], outputs=False).bit_equal


def test_a_setting_that_changes_answers_is_a_difference(root, reference, tmp_path, capsys):
    folder = changed(root, reference, tmp_path, lambda state: None, rms_norm_eps=1e-3)
    found = verify([root / "m"], [folder])
    assert all(tensor.bit_equal for tensor in found.tensors)
    assert not found.equal
    assert found.outputs.first.name == "decoder layer 0"
    assert run(root / "m", folder, "--weights-only") == 1
    assert "language_model.rms_norm_eps is 1e-05 in A, 0.001 in B" in capsys.readouterr().out


def test_stock_folders_against_the_model_they_come_from(root, capsys):
    assert run(root / "m", root / "l", root / "w") == 0
    out, log = capsys.readouterr()
    assert "not compared: projector" in out
    assert "random" not in log
    assert "equal bit for bit: audio_tower, language_model" in out
    assert run(root / "l", root / "m") == 0
    capsys.readouterr()
    assert run(root / "m", root / "l", root / "w", root / "mm_audio_aligner.bin") == 0
    assert "equal bit for bit: audio_tower, projector, language_model" in capsys.readouterr().out
    assert run(root / "l", root / "w") == 1
    assert "ConfigMismatchError" in capsys.readouterr().err
    with pytest.raises(e.DuplicateTensorError):
        verify([root / "m"], [root / "w", root / "w"])


def test_grown_vocabulary_is_compared_over_the_rows_both_have(root, reference, tmp_path):
    reference.llama.save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    convert("from-hf", root / "whisper", tmp_path / "llama", "-o", tmp_path / "grown")
    found = verify([tmp_path / "llama"], [tmp_path / "grown"])
    (table,) = [t for t in found.tensors if not t.within]
    assert table.shapes == ((61, 48), (66, 48))
    assert table.max_abs == 0
    assert [f.name for f in found.config if f.matters] == ["language_model.vocab_size"]


def test_models_of_other_sizes(root, tmp_path, capsys):
    other = TorchSpeechLM(mels=128, projector="linear", tied=False)
    other.save(tmp_path)
    assert run(root / "m", tmp_path / "model") == 1
    out = capsys.readouterr().out
    assert "parameters are in B only:\n  language_model/lm_head/weight" in out
    assert "parameters are in A only:\n  projector/linear_1/" in out
    assert "(32, 80, 3) in A, (32, 128, 3) in B; breaks the rule" in out
    assert "outputs: not compared: the models are of different sizes" in out


@pytest.mark.parametrize("mode", ["trimmed", "true_length"])
def test_other_audio_modes(root, tmp_path, mode):
    weights = gather_weights(root / "model", audio_mode=mode)
    folder = save_model(tmp_path / "m", weights.cfg, load_params(weights))
    assert verify([folder], [folder]).equal
    found = verify([root / "m"], [folder], outputs=False)
    assert [f.name for f in found.config if f.matters] == ["audio_mode"]
    assert not found.equal


def test_the_question_is_asked_where_there_is_a_tokenizer(root, reference, tmp_path):
    weights = gather_weights(root / "model")
    folder = save_model(tmp_path / "m", weights.cfg, load_params(weights))
    save_tokenizer(folder, 50)
    clip = tmp_path / "clip.wav"
    import soundfile

    soundfile.write(clip, np.sin(np.arange(16000) / 20).astype(np.float32), 16000)
    found = verify([folder], [root / "m"], clip=clip)
    assert found.equal
    assert "Please listen" in found.outputs.prompt
    assert found.outputs.clip == str(clip)


def test_one_block_of_one_tensor_is_read_at_a_time(root, monkeypatch):
    from llaso_jax.conversion import tensor_comparison

    monkeypatch.setattr(tensor_comparison, "BLOCK_BYTES", 2048)
    reading, count = ByteFile.read, []
    monkeypatch.setattr(
        ByteFile, "read", lambda self, at, n: count.append(n) or reading(self, at, n)
    )
    weights = open_weights([root / "model"])
    count.clear()
    found = list(tensor_comparison.compare_tensors(weights, open_weights([root / "m"])))
    assert all(tensor.bit_equal for tensor in found)
    assert 1024 < max(count) <= 2048


def test_bad_arguments(root, capsys):
    with pytest.raises(SystemExit):
        run(root / "m", root / "hf", "--tolerance", "-1")
    assert "at least 0" in capsys.readouterr().err
    assert run(root / "m", root / "nowhere") == 1
    assert "UnknownSourceError" in capsys.readouterr().err
    assert run(root / "m", root / "hf", "--audio", root / "nowhere.wav") == 1
    assert "AudioError" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "llaso convert verify llaso/ hf/" in capsys.readouterr().out


def test_documented_commands_are_understood():
    page = (Path(__file__).parents[1] / "docs" / "weights.md").read_text()
    commands = re.findall(
        r"llaso convert ((?:inspect|verify) [^`\n#]+)", page + EXAMPLES + VERIFY_EXAMPLES
    )
    assert len(commands) > 10
    for command in commands:
        args = _parser().parse_args(shlex.split(command))
        assert args.command == command.split()[0]
