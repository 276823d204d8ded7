"""Perturbed items: what is done to audio and instruction, and the curves of a tiny model."""

import dataclasses
import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from test_generate_cli import checkpoint  # noqa: F401 - a fixture

from llaso_jax.data.audio import load_audio
from llaso_jax.data.sound import at_speed, with_noise
from llaso_jax.errors import ConfigError
from llaso_jax.evaluate import main
from llaso_jax.evaluation.answering.perturbation import (
    Perturbation,
    Perturber,
    parse_perturbations,
    through_mp3,
)
from llaso_jax.evaluation.answering.questions import QuestionFile, load_questions
from llaso_jax.evaluation.comparison import Comparison, Difference, FileComparison
from llaso_jax.evaluation.report.robustness_section import robustness_section
from llaso_jax.evaluation.robustness import robustness_tree, spread
from llaso_jax.evaluation.tasks import load_tasks

MINI = Path(str(files("llaso_jax"))) / "data" / "mini"
RATE = 16_000


def tone(seconds: float, hertz: float = 440) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE).astype(
        np.float32
    )


def loudest(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples))
    return float(np.argmax(spectrum)) * RATE / len(samples)


def test_every_level_is_a_perturbation():
    found = parse_perturbations(
        ["noise:snr=-10,5", "speed:0.8", "codec:mp3-16k", "gain:-20", "reword:2", "swap:1"]
    )
    assert [one.name for one in found] == [
        *("noise=-10", "noise=5", "speed=0.8", "codec=16", "gain=-20", "reword=1", "reword=2"),
        "swap=1",
    ]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("echo:1", "'echo:1' is not understood; forms are noise:snr="),
        ("noise", "not understood"),
        ("gain:loud", "'loud' is no number"),
        ("speed:0", "levels of speed are 0.25 to 4"),
        ("codec:mp3-500k", "levels of codec are 8 to 160"),
        ("reword:0", "levels of reword"),
        ("reword:nan", "levels of reword are 1 to 100"),
        ("reword:inf", "levels of reword"),
        ("reword:1e9", "levels of reword"),
        ("reword:2.7", "reword takes one whole number"),
        ("swap:1,2", "swap takes one whole number"),
    ],
)
def test_a_mistaken_perturbation_is_told_in_words(word, told):
    with pytest.raises(ConfigError, match=told):
        parse_perturbations([word])


@pytest.mark.parametrize("snr", [-10, 0, 20])
def test_noise_has_the_power_asked_for(snr):
    clean = tone(1)
    noise = (
        with_noise(clean, np.random.default_rng(0).standard_normal(RATE, np.float32), snr) - clean
    )
    ratio = 10 * np.log10(np.mean(clean**2) / np.mean(noise**2))
    assert ratio == pytest.approx(snr, abs=0.01)
    silence = np.zeros(10, np.float32)
    assert (with_noise(silence, np.ones(10, np.float32), snr) == 0).all()


def test_twice_the_speed_is_half_as_long_and_an_octave_up():
    fast = at_speed(tone(1), 2.0)
    assert len(fast) == RATE // 2
    assert loudest(fast) == pytest.approx(880, abs=4)


@pytest.mark.parametrize("kbits", [16, 64])
def test_mp3_keeps_the_tone_at_the_rate_asked_for(kbits, monkeypatch):
    written = []
    original = sf.read
    monkeypatch.setattr(
        sf, "read", lambda file, **k: written.append(len(file.getvalue())) or original(file, **k)
    )
    coded = through_mp3(tone(4), kbits)
    assert written[0] * 8 / 4 / 1000 == pytest.approx(kbits, rel=0.1)
    assert loudest(coded) == pytest.approx(440, abs=4)
    assert len(coded) >= 4 * RATE


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    index = tmp_path_factory.mktemp("index")
    (file,) = load_questions(MINI / "eval.json", only=["SCR"], index_dir=index)
    return file


def test_an_item_is_changed_the_same_way_every_time_and_no_two_alike(commands):
    audios = [load_audio(commands[0].voices[0])]

    def noisy(number: int, seed: int = 0):
        perturber = Perturber(Perturbation("noise", 0.0), seed=seed)
        return perturber(commands, number, commands[0].turns[:1], audios)[1][0].samples

    np.testing.assert_array_equal(noisy(0), noisy(0))
    assert np.abs(noisy(0) - noisy(1)).max() > 0
    assert np.abs(noisy(0) - noisy(0, seed=1)).max() > 0


def test_noise_is_taken_from_files(commands, tmp_path):
    sf.write(tmp_path / "hum.wav", tone(0.3, 1000), RATE)
    clean = load_audio(commands[0].voices[0])
    perturber = Perturber(Perturbation("noise", -40.0), noise_files=[tmp_path / "hum.wav"])
    _, (noisy,) = perturber(commands, 0, commands[0].turns[:1], [clean])
    assert loudest(noisy.samples) == pytest.approx(1000, abs=15)
    assert len(noisy.samples) == len(clean.samples)


def test_levels_of_rewording_are_other_instructions_of_the_file_and_differ(commands):
    own = {commands[n].turns[0].text for n in range(len(commands))}
    assert 2 < len(own) < len(commands) / 2
    for number in range(3):
        turns = commands[number].turns[:1]
        texts = [turns[0].text]
        for level in range(1, len(own)):
            perturber = Perturber(Perturbation("reword", float(level)))
            assert perturber.applies(commands)
            texts.append(perturber(commands, number, turns, [])[0][0].text)
        assert Counter(texts) == Counter(own)
    assert not Perturber(Perturbation("reword", float(len(own)))).applies(commands)


def test_questions_that_are_their_own_instruction_are_not_reworded(tmp_path):
    (file,) = load_questions(MINI / "eval.json", only=["AQA"], index_dir=tmp_path)
    assert not Perturber(Perturbation("reword", 1.0)).applies(file)


def test_every_item_gets_the_audio_of_another_and_levels_are_different_others(commands):
    heard = []
    for level in (1.0, 2.0):
        read = []
        perturber = Perturber(Perturbation("swap", level), read=lambda path: read.append(path))  # noqa: B023
        assert perturber.applies(commands)
        for number in range(len(commands)):
            turns, _ = perturber(commands, number, commands[number].turns[:1], [])
            assert turns == commands[number].turns[:1]
        heard.append(read)
    own = [commands[number].voices[0] for number in range(len(commands))]
    assert sorted(heard[0]) == sorted(heard[1]) == sorted(own)
    for voices in zip(own, *heard, strict=True):
        assert len(set(voices)) == 3


def test_items_that_no_other_has_as_many_recordings_as_are_not_swapped(commands, monkeypatch):
    assert not Perturber(Perturbation("swap", float(len(commands)))).applies(commands)
    pair = dataclasses.replace(commands[0], voices=commands[0].voices * 2)
    monkeypatch.setattr(
        QuestionFile, "__getitem__", lambda file, n: pair if n == 0 else file.source[file.rows[n]]
    )
    assert not Perturber(Perturbation("swap", 1.0)).applies(commands)


def test_spread_is_over_all_instructions():
    assert spread([{"change": -0.2}, {"change": 0.2}]) == pytest.approx(0.4)
    assert spread([{"change": 0.1}]) == pytest.approx(0.1)  # the item's own instruction is one


def difference(a: float, b: float) -> Difference:
    return Difference("SGC", "", a, b, None, None, None, "")


def test_every_level_has_the_clean_score_of_its_own_files():
    tasks = load_tasks(only=["SGC"])
    names = list(tasks)

    def compared(files, task):
        scored = {
            file: FileComparison(difference(0, 0), 0, 0, 1, examples=(), reworded=0)
            for file in files
        }
        return Comparison("clean", "other", "corrected", scored, [task], [], {}, [])

    tree = robustness_tree(
        {
            "reword=2": compared(names[:1], difference(0.9, 0.6)),
            "reword=1": compared(names, difference(0.5, 0.4)),
        },
        tasks,
        asked=["reword=1", "reword=2", "reword=3"],
    )
    points = tree["curves"]["SGC"]["reword"]
    assert [(p["level"], p["files"], p["clean"]) for p in points] == [(1, 4, 0.5), (2, 1, 0.9)]
    assert {name: list(files) for name, files in tree["left_out"].items()} == {
        "reword=2": names[1:],
        "reword=3": names,
    }
    page = robustness_section(tree, "nobody")
    assert "0.500 / 0.900" in page
    cleans = re.findall(r'class="clean" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)"', page)
    assert len(set(cleans)) == 2
    assert "not asked: too few items that share" in page


def test_a_run_reports_curves_of_the_same_items(checkpoint, tmp_path):  # noqa: F811
    where = ["--checkpoint", str(checkpoint), "--data", str(MINI / "eval.json"), "--name", "tiny"]
    arguments = ["run", *where, "-o", str(tmp_path), "--tasks", "SCR", "AQA", "--limit", "12"]
    arguments += ["--max-new-tokens", "3", "--bootstrap", "20", "--batch-size", "12"]
    assert main([*arguments, "--perturb", "gain:-20", "noise:snr=0,-10", "reword:1", "swap:1"]) == 0
    scores = json.loads((tmp_path / "report" / "scores.json").read_text(encoding="utf-8"))
    curves = scores["robustness"]["curves"]
    assert set(curves) == {"SCR", "AQA"}
    assert set(curves["SCR"]) == {"gain", "noise", "reword", "swap"}
    assert set(curves["AQA"]) == {"gain", "noise", "swap"}
    assert list(scores["robustness"]["left_out"]["reword=1"]) == ["eval_AQA"]
    assert [point["level"] for point in curves["SCR"]["noise"]] == [-10, 0]
    for point in curves["SCR"]["noise"]:
        assert point["low"] <= point["change"] <= point["high"]
    reworded = tmp_path / "perturbed" / "reword=1" / "tiny" / "eval_SCR_test.json"
    for record in json.loads(reworded.read_text(encoding="utf-8")):
        assert record["asked"] != record["conversations"][0]["value"]
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert 'id="robustness"' in page
    assert "highest minus lowest over instructions" in page
