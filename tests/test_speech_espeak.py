"""espeak-ng: the samples of a text depend on text and voice alone, and every setting is heard."""

import importlib.util
import re
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from llaso_jax.errors import ConfigError
from llaso_jax.speech.errors import MissingEngineError, SynthesisError
from llaso_jax.speech.espeak import EspeakLibrary
from llaso_jax.speech.synthesis import known_voices, synthesizer
from llaso_jax.speech.voice import Voice

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng-loader is not installed (extra tts)",
)
TEXT = "the quick brown fox jumps over the lazy dog"
ANNA = Voice("espeak", "en-us+f2", "american", "female")  # a breathy voice: it has noise
PAUL = Voice("espeak", "en-us", "american", "male")


def speak(text: str, voice: Voice) -> np.ndarray:
    return synthesizer("espeak").speak(text, voice)


def fundamental(samples: np.ndarray) -> float:
    """Median over the loud half of the 64 ms frames of the strongest periodicity of 50 to 500 Hz."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, 1024)[::512] * np.hanning(1024)
    frames = frames[(energy := np.sum(frames**2, axis=1)) > np.median(energy)]
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2048)) ** 2)
    return float(np.median(16_000 / (32 + np.argmax(correlation[:, 32:320], axis=1))))


@needs_espeak
def test_samples_are_speech_at_16_khz_without_silence_at_the_ends():
    samples = speak(TEXT, PAUL)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert 1.5 < len(samples) / 16_000 < 4
    edges = np.abs(np.concatenate([samples[:640], samples[-640:]]))  # 40 ms: margin and speech
    assert edges.max() > 0.01 * np.abs(samples).max()


@needs_espeak
@pytest.mark.parametrize("voice", [PAUL, ANNA], ids=lambda voice: voice.name)
def test_what_was_said_before_changes_nothing(voice):
    """Workers speak in any order: without this no interrupted corpus could be gone on with."""
    alone = speak(TEXT, voice)
    speak("something else before it", replace(voice, name="en-029+f5", rate=1.7, pitch=5))
    np.testing.assert_array_equal(speak(TEXT, voice), alone)


@needs_espeak
def test_a_library_that_stays_open_remembers_what_it_said():
    """What the fresh library of every text is for."""
    with EspeakLibrary() as library:
        first, second = (library.say(TEXT, "en-us", rate=175, pitch=50) for _ in range(2))
    assert not np.array_equal(first, second)
    with EspeakLibrary() as library:
        np.testing.assert_array_equal(library.say(TEXT, "en-us", rate=175, pitch=50), first)


@needs_espeak
def test_the_seed_is_that_of_the_noise_of_breathy_voices():
    assert not np.array_equal(speak(TEXT, ANNA), speak(TEXT, replace(ANNA, seed=1)))
    np.testing.assert_array_equal(speak(TEXT, PAUL), speak(TEXT, replace(PAUL, seed=1)))


@needs_espeak
@pytest.mark.parametrize("rate", [0.7, 1.4])
def test_rate_is_relative_speed(rate):
    seconds = len(speak(TEXT, PAUL)) / len(speak(TEXT, replace(PAUL, rate=rate)))
    assert seconds == pytest.approx(rate, rel=0.1)


@needs_espeak
@pytest.mark.parametrize("semitones", [-5, 7])
def test_pitch_is_in_semitones(semitones):
    voiced = "are we all alone in a warm room"
    normal = fundamental(speak(voiced, PAUL))
    moved = fundamental(speak(voiced, replace(PAUL, pitch=semitones)))
    assert 12 * np.log2(moved / normal) == pytest.approx(semitones, abs=1)


@needs_espeak
def test_every_field_that_decides_the_samples_does():
    others = {"name": "en-us+f3", "rate": 1.2, "pitch": 2.0, "seed": 9}
    labels = {"engine", "accent", "gender"}
    assert set(others) | labels == {field.name for field in fields(Voice)}
    before = speak(TEXT, ANNA)
    for field, value in others.items():
        assert not np.array_equal(before, speak(TEXT, replace(ANNA, **{field: value}))), field


@needs_espeak
def test_known_voices_speak_and_differ():
    voices = known_voices("espeak")
    assert len({voice.accent for voice in voices}) >= 6
    assert {voice.gender for voice in voices} == {"male", "female"}
    spoken = {speak("hot water", voice).tobytes() for voice in voices}
    assert len(spoken) == len(voices)


@needs_espeak
@pytest.mark.parametrize("text", ["", " ", "..."])
def test_a_text_without_sound_is_an_error_that_names_it(text):
    with pytest.raises(SynthesisError, match="gives no sound for " + repr(text)) as error:
        speak(text, PAUL)
    assert "en-us" in str(error.value)


@needs_espeak
@pytest.mark.parametrize("name", ["en-klingon", "en-us+zoe", "en-us+F2"])
def test_a_voice_that_is_not_there_is_named(name):
    with pytest.raises(SynthesisError, match=f"no voice '{re.escape(name)}'"):
        speak(TEXT, replace(PAUL, name=name))


def test_a_missing_engine_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    synthesizer.cache_clear()
    with pytest.raises(MissingEngineError, match=r"pip install 'llaso-jax\[tts\]'"):
        synthesizer("espeak")


def test_an_unknown_engine_is_an_error():
    for function in (synthesizer, known_voices):
        with pytest.raises(ConfigError, match="'festival'; espeak and piper"):
            function("festival")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("engine", "festival", "'festival'; one of espeak, piper"),
        ("gender", "", "''; one of male, female"),
        ("name", "", "voice.name is empty"),
        ("accent", "", "voice.accent is empty"),
        ("rate", 3.0, "voice.rate is 3.0; 0.5 to 2.5"),
        ("pitch", float("nan"), "voice.pitch is nan; -8 to 8"),
        ("seed", -1, "voice.seed is -1"),
    ],
)
def test_what_no_voice_can_be_is_told_in_words(field, value, told):
    with pytest.raises(ConfigError, match=told):
        replace(PAUL, **{field: value})
