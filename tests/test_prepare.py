"""`llaso prepare mini` from the command to the files, with espeak-ng."""

import csv
import importlib.util
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from llaso_jax.data.audio import load_audio
from llaso_jax.data.records import RecordSource
from llaso_jax.errors import ConfigError
from llaso_jax.evaluation.answering.questions import load_questions
from llaso_jax.preparation import mini
from llaso_jax.preparation.grams import RUN, words_of
from llaso_jax.preparation.mini import FILES, Made, MiniSettings, build, records_of
from llaso_jax.preparation.records import asr_record, write_records
from llaso_jax.preparation.texts import read_texts
from llaso_jax.prepare import main
from llaso_jax.speech.render import RenderedClip
from llaso_jax.speech.synthesis import synthesizer

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng-loader is not installed: pip install -e '.[tts]'",
)
SMALL = MiniSettings(clips=20, seed=5, engines=("espeak",), recognizer=None)

COLORS = ["red", "green", "blue", "white", "black", "brown", "grey", "pink", "golden", "silver"]
ANIMALS = [
    "cat",
    "dog",
    "horse",
    "cow",
    "mouse",
    "bear",
    "fox",
    "wolf",
    "owl",
    "hen",
    "duck",
    "goose",
]


def command(output: Path, *more: str) -> int:
    told = ["mini", "--output", str(output), "--clips", "20", "--seed", "5", "--workers", "0"]
    return main([*told, "--engines", "espeak", "--no-filter", *more])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "corpus"
    assert command(folder) == 0
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".idx"
    }


@needs_espeak
def test_a_corpus_is_what_training_and_evaluation_read(corpus):
    heard = set()
    for name in itertools.chain(*FILES.values()):
        source = RecordSource([corpus / name])
        assert len(source) > 0, name
        for record in (source[i] for i in range(len(source))):
            heard.update(record.voices)
    assert len(heard) == 20
    for path in heard:
        assert load_audio(path).seconds_total > 0.2
    tasks = {file.spec.task for file in load_questions(corpus / "test_instruct.json")}
    assert {"ASR", "IP", "EE"} <= tasks


@needs_espeak
def test_the_manifest_the_card_and_the_audit_tell_of_every_clip(corpus):
    with (corpus / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert Counter(row["split"] for row in rows) == {"train": 12, "dev": 4, "test": 4}
    assert all(
        all(row[key] for key in ("voice", "accent", "sha256", "seconds", "text")) for row in rows
    )
    card = (corpus / "README.md").read_text(encoding="utf-8")
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    assert f"20 clips of synthetic English speech, {hours:.2f} hours" in card
    assert "llaso prepare mini --clips 20 --seed 5 --engines espeak` with `--no-filter`." in card
    for told in ("## Voices", "## Licences", "GPL-3", "no leak: 0"):
        assert told in card
    audit = json.loads((corpus / "audit.json").read_text(encoding="utf-8"))
    assert audit["dev and test"]["leaks"] == 0
    assert audit["dev and test"]["texts"]["train"] > 8


@needs_espeak
def test_the_same_command_makes_the_same_corpus_also_after_a_stop(corpus, tmp_path, monkeypatch):
    made = []

    def stop(done: int, of: int) -> None:
        made.append(done)
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "again", SMALL, workers=0, advance=stop)
    assert made[-1] == 10
    early = [path for path in content(tmp_path / "again") if path.endswith(".flac")]
    assert 10 <= len(early) < 20
    times = {path: (tmp_path / "again" / path).stat().st_mtime_ns for path in early}
    assert command(tmp_path / "again") == 0
    assert {path: (tmp_path / "again" / path).stat().st_mtime_ns for path in early} == times
    first, second = content(corpus), content(tmp_path / "again")
    assert first == second


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert command(tmp_path) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@needs_espeak
def test_a_corpus_of_another_seed_is_refused(corpus, capsys):
    assert command(corpus, "--seed", "6") == 1
    assert "seed 5 (now 6)" in capsys.readouterr().err


def test_clips_that_are_not_understood_leave_questions_about_their_words_out():
    plan = mini.plan_of(SMALL)

    def files(wer: float):
        made = [
            Made(clip, RenderedClip(clip.spec.path, 1.0, "0", wer), wer <= SMALL.max_wer)
            for clip in plan.clips
        ]
        return records_of(made, seed=0)

    clear, unclear = files(0.3), files(0.31)
    tasks = {name: {r["metadata"]["task"] for r in records} for name, records in unclear.items()}
    assert {name for name, found in tasks.items() if found} == {
        "instruct_train_voice.json",
        "dev_instruct.json",
        "test_instruct.json",
    }
    assert tasks["instruct_train_voice.json"] == {"SGC", "AC"}  # the first two tasks, of 20 clips
    tasks = {name: {r["metadata"]["task"] for r in records} for name, records in clear.items()}
    assert {name: tasks[name] for name in FILES["train"]} == {
        "align_train.json": {"ASR"},
        "instruct_train_speech.json": {"ASR"},
        "instruct_train_voice.json": {"SGC", "AC"},
        "instruct_train_question.json": {"AQA_a", "AQA_at"},
        "instruct_train_command.json": {"IP", "EE"},
    }


def test_instruct_has_recognition_of_the_clips_that_nothing_else_is_asked_about():
    plan = mini.plan_of(SMALL)
    made = [Made(clip, RenderedClip(clip.spec.path, 1.0, "0"), True) for clip in plan.clips]
    files = records_of(made, seed=0)
    recognised = {
        record["voice"][0]
        for name, records in files.items()
        for record in records
        if name.startswith("instruct_train") and record["metadata"]["task"] == "ASR"
    }
    assert recognised == {
        c.spec.path for c in plan.clips if c.split == "train" and c.family == "speech"
    }
    assert len(files["align_train.json"]) > len(recognised)


@pytest.mark.parametrize(
    ("wer", "heard", "clear"),
    [
        (None, None, True),
        (0.3, "Nothing of the sort", True),
        (0.31, "Nothing of the sort", False),
        (1.0, "3 5-8, seven.", True),  # digits may be grouped in any way
        (1.0, "3 5 9 7", False),
    ],
)
def test_a_clip_is_understood_by_its_words_or_by_its_digits(wer, heard, clear):
    clip = RenderedClip("a.opus", 1.0, "0", wer, heard)
    assert mini.understood(clip, "three five eight seven", 0.3) == clear


def test_texts_of_held_out_files_are_not_spoken(tmp_path):
    said = [u.text for clip in mini.plan_of(SMALL).clips for u in clip.spec.utterances]
    long = [text for text in said if len(words_of(text)) >= RUN]
    held_out = write_records(
        [asr_record(f"e{i}", "x.wav", "?", text) for i, text in enumerate(long)],
        tmp_path / "held.json",
    )
    settings = MiniSettings(
        clips=20, seed=5, engines=("espeak",), recognizer=None, held_out=(held_out,)
    )
    again = {u.text for clip in mini.plan_of(settings).clips for u in clip.spec.utterances}
    assert long
    assert not again & set(long)
    assert set(long) & set(read_texts())


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"max_wer": 2}, "max_wer is 2"),
        ({"rule_share": -0.1}, "rule_share is -0.1"),
        ({"sentences": Path("nowhere.txt")}, "nowhere.txt is no file; --sentences needs one"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, told):
    with pytest.raises(ConfigError, match=told):
        MiniSettings(**setting)


@needs_espeak
def test_a_corpus_of_other_texts_speaks_them_alone(tmp_path):
    mine = [f"the {color} {animal} sleeps here" for color in COLORS for animal in ANIMALS]
    (tmp_path / "mine.txt").write_text("# By hand.\n" + "\n".join(mine), encoding="utf-8")
    settings = MiniSettings(
        clips=20, engines=("espeak",), sentences=tmp_path / "mine.txt", rule_share=0
    )
    clips = [clip for clip in mini.plan_of(settings).clips if clip.family == "speech"]
    said = {utterance.text for clip in clips for utterance in clip.spec.utterances}
    assert said
    assert said <= set(mine)


def test_a_missing_engine_is_told_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    synthesizer.cache_clear()
    assert command(tmp_path / "corpus") == 1
    synthesizer.cache_clear()
    assert "espeakng_loader" in capsys.readouterr().err
