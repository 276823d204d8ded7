"""`llaso generate`: what it prints, and what a newcomer's mistakes are told."""

import json

import jax
import pytest
import soundfile as sf
from reference import random_params
from test_inference_api import CFG, clip, make

from llaso_jax.generate import main
from llaso_jax.modeling.functional import init_params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    model, processor = make()
    model.params = random_params(jax.eval_shape(lambda: init_params(CFG, jax.random.key(0))))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def recordings(tmp_path):
    paths = [tmp_path / "a.wav", tmp_path / "b.flac"]
    for seed, path in enumerate(paths):
        sf.write(path, clip(0.5 + seed, seed=seed), 16_000)
    return [str(path) for path in paths]


def test_answers_are_printed_per_file_with_the_audio_heard(checkpoint, recordings, capsys):
    arguments = ["--checkpoint", str(checkpoint), "--audio", *recordings, "--text", "say it"]
    arguments += ["--max-new-tokens", "8"]
    assert main([*arguments, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["audio"] for answer in answers] == recordings
    assert [answer["audio_seconds"] for answer in answers] == [0.5, 1.5]
    assert [answer["audio_seconds_dropped"] for answer in answers] == [0.0, 0.0]
    assert main([*arguments, "--max-audio-seconds", "1.4", "--audio-policy", "truncate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{recordings[0]} (0.5 s of audio")
    assert answers[0]["text"] in "\n".join(lines[1:])
    assert any("0.1 s past --max-audio-seconds not used" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--checkpoint", "nowhere", "--text", "a"], "nowhere does not exist: a model folder"),
        (["--checkpoint", "CHECKPOINT"], "neither --audio nor --text"),
        (["--checkpoint", "CHECKPOINT", "--audio", "no.wav"], "no.wav does not exist"),
        (["--checkpoint", "CHECKPOINT", "--text", "a", "--top-k", "5"], "set temperature above 0"),
        (["--checkpoint", "CHECKPOINT", "--text", "a", "--mesh", "3y"], "'3y' is not understood"),
        (["--checkpoint", "CHECKPOINT", "--text", "a", "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_mistakes_are_one_clear_line(checkpoint, capsys, arguments, told):
    assert main([a.replace("CHECKPOINT", str(checkpoint)) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("llaso generate: error: ")
    assert told in captured.err
    assert captured.out == ""


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "llaso generate --checkpoint runs/mini/model --audio" in capsys.readouterr().out


def test_checkpoint_is_required(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--text", "a"])
    assert stopped.value.code == 2
    assert "--checkpoint" in capsys.readouterr().err
