"""`llaso convert` from end to end, in this process."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_conversion_support import (
    VOCAB,
    TorchSpeechLM,
    assert_bit_equal,
    read_state,
    save_state,
    torch,
)

from llaso_jax.conversion import load_model, read_info
from llaso_jax.convert import EXAMPLES, _parser, main

TAGS = ("<unk>", "<Audio>", "</Audio>", "<audio_start>", "<audio_end>")


def save_tokenizer(folder, size=VOCAB):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)


@pytest.fixture
def root(tmp_path):
    reference = TorchSpeechLM()
    reference.save(tmp_path)
    reference.llama.save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    return tmp_path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_there_and_back(root, capsys):
    two = ("--vocab-multiple-of", "2")
    assert run("from-hf", root / "model", "-o", root / "m", "--mesh", "4x2", *two) == 0
    assert "parameters, float32" in capsys.readouterr().err
    out = ("-o", root / "hf", "--llama", root / "l", "--whisper", root / "w")
    assert run("to-hf", root / "m", *out, "--max-shard-size", "0.1MB") == 0
    assert_bit_equal(read_state(root / "hf"), TorchSpeechLM().state())
    assert json.loads((root / "hf" / "config.json").read_text())["mm_audio_tower"] == "../w"
    assert (root / "l" / "model.safetensors.index.json").is_file()
    assert read_info(root / "m").hf_config["language"] == "English"

    assert run("from-hf", root / "model", "-o", root / "m") == 1
    assert "TargetExistsError" in capsys.readouterr().err
    assert (
        run("from-hf", root / "model", "-o", root / "m", "--overwrite", "--dtype", "bfloat16") == 0
    )
    assert run("from-hf", root / "m", "-o", root / "m8", "--mesh", "8x1", "--dtype", "float32") == 0
    _, params = load_model(root / "m8")
    assert params["projector"]["linear_0"]["weight"].dtype == np.float32


def test_any_source_goes_straight_to_stock_folders_and_a_projector_file(root, capsys):
    out = ("--llama", root / "l", "--whisper", root / "w", "--projector", root / "p.bin")
    assert run("to-hf", root / "model", *out) == 0
    pair = (root / "w", root / "l", root / "p.bin")
    assert run("verify", root / "model", *pair, "--weights-only") == 0
    assert run("to-hf", root / "model", "--projector", root / "p.bin") == 1
    assert "p.bin is there already" in capsys.readouterr().err
    assert run("to-hf", root / "model", "--projector", root / "p.bin", "--overwrite") == 0
    assert not list(root.glob(".*"))


def test_whisper_and_llama_with_a_tokenizer(root):
    from transformers import AutoTokenizer

    pair = (root / "whisper", root / "llama")
    assert run("from-hf", *pair, "-o", root / "m", "--vocab-multiple-of", 16, "--stack", 2) == 0
    info = read_info(root / "m")
    assert info.cfg.text.vocab_size == VOCAB + len(TAGS)
    assert info.cfg.projector.stack == 2
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    assert tokenizer.convert_tokens_to_ids(list(TAGS)) == list(range(VOCAB, VOCAB + 5))
    assert info.hf_config["pad_token_id"] == tokenizer.pad_token_id == VOCAB
    assert (info.hf_config["bos_token_id"], info.hf_config["eos_token_id"]) == (1, 2)

    assert run("to-hf", root / "m", "-o", root / "hf") == 0
    state = read_state(root / "hf")
    assert state["model.embed_tokens.weight"].shape[0] == VOCAB + 5
    assert (root / "hf" / "tokenizer.json").read_text() == (
        root / "m" / "tokenizer.json"
    ).read_text()
    assert torch.load(root / "hf" / "mm_audio_aligner.bin", weights_only=True).keys() < state.keys()
    # What came out goes in again, its tokenizer copied as it is.
    assert run("from-hf", root / "hf", "-o", root / "again") == 0
    assert read_info(root / "again").cfg.text.vocab_size == VOCAB + 5


def test_tokenizer_larger_than_the_checkpoint_is_refused(root, capsys):
    save_tokenizer(root / "model")
    assert run("from-hf", root / "model", "-o", root / "m") == 1
    message = capsys.readouterr().err
    assert "ConfigMismatchError" in message
    assert f"{VOCAB + 5} tokens" in message
    assert not (root / "m").exists()


def test_parts_alone(root):
    assert run("from-hf", root / "whisper", "-o", root / "w") == 0
    assert run("from-hf", root / "llama", "-o", root / "l") == 0
    assert read_info(root / "w").parts == ("audio_tower",)
    assert read_info(root / "l").parts == ("language_model",)
    assert run("to-hf", root / "w", "--whisper", root / "out") == 0
    assert run("to-hf", root / "w", "-o", root / "hf") == 1
    assert run("to-hf", root / "w") == 2


def test_projector_override(root):
    reference = TorchSpeechLM()
    save_state(root / "model", reference.state(tower=False))
    other = {
        f"model.mm_audio_aligner.projector.{k}": v * 2
        for k, v in reference.projector.state_dict().items()
    }
    torch.save(other, root / "p.bin")
    options = ("--whisper", root / "whisper", "--projector", root / "p.bin")
    assert run("from-hf", root / "model", *options, "-o", root / "m") == 0
    _, params = load_model(root / "m")
    np.testing.assert_array_equal(
        params["projector"]["linear_0"]["weight"],
        2 * reference.projector[0].weight.detach().numpy(),
    )


def test_help_has_examples_and_torch_is_never_imported(root):
    code = (
        "import sys; from llaso_jax.convert import main\n"
        f"assert main(['from-hf', {str(root / 'model')!r}, '-o', {str(root / 'm')!r}]) == 0\n"
        f"assert main(['to-hf', {str(root / 'm')!r}, '-o', {str(root / 'h')!r}]) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "main(['from-hf', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert "CTranslate2" in done.stdout


def test_projector_file_between_a_whisper_and_a_llama(root):
    sources = (root / "mm_audio_aligner.bin", root / "llama", root / "whisper")
    assert run("from-hf", *sources, "-o", root / "m") == 0
    _, params = load_model(root / "m")
    want = TorchSpeechLM().projector[2].weight.detach().numpy()
    np.testing.assert_array_equal(params["projector"]["linear_1"]["weight"], want)


def test_documented_commands_are_understood():
    page = (Path(__file__).parents[1] / "docs" / "weights.md").read_text()
    commands = re.findall(r"llaso convert ((?:from|to)-hf [^`\n#]+)", page + EXAMPLES)
    assert len(commands) > 12
    for command in commands:
        args = _parser().parse_args(shlex.split(command))
        assert args.command == command.split()[0]
