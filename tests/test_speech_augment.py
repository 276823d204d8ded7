"""Conditions put on clean speech, each with the physical property that its name promises."""

import dataclasses

import numpy as np
import pytest

from llaso_jax.data.sound import at_speed, coloured_noise, level_db, telephone_band
from llaso_jax.errors import ConfigError
from llaso_jax.speech.augment import HIGHEST_PEAK, Augmentation, augment

RATE = 16_000


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """Two seconds of something with energy up to 8 kHz, loud and soft in turn as syllables are."""
    rng = np.random.default_rng(3)
    syllables = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * np.arange(2 * RATE) / RATE)
    return (0.05 * syllables * rng.standard_normal(2 * RATE)).astype(np.float32)


def power(samples: np.ndarray, low: float, high: float) -> float:
    spectrum = np.abs(np.fft.rfft(samples.astype(np.float64))) ** 2
    hertz = np.fft.rfftfreq(len(samples), 1 / RATE)
    return float(spectrum[(hertz >= low) & (hertz < high)].sum())


def decibels(ratio: float) -> float:
    return 10 * np.log10(ratio)


def test_nothing_asked_for_changes_nothing(speech):
    np.testing.assert_array_equal(augment(speech, Augmentation(), seed=1), speech)


def test_telephone_band_ends_at_four_kilohertz(speech):
    narrow = augment(speech, Augmentation(narrow_band=True), seed=0)
    assert len(narrow) == len(speech)
    assert decibels(power(narrow, 4000, 8001) / power(speech, 4000, 8001)) < -40
    assert abs(decibels(power(narrow, 300, 3400) / power(speech, 300, 3400))) < 0.1


@pytest.mark.parametrize("length", [1, 2, 15_999, 16_000, 16_001])
def test_telephone_band_keeps_the_length(length):
    assert len(telephone_band(np.ones(length, np.float32))) == length


@pytest.mark.parametrize("color", ["white", "pink", "brown"])
@pytest.mark.parametrize("snr", [-3, 10, 25])
@pytest.mark.parametrize("narrow_band", [False, True])
def test_noise_has_the_power_asked_for(speech, color, snr, narrow_band):
    change = Augmentation(narrow_band=narrow_band)
    clean = augment(speech, change, seed=5)
    noisy = augment(speech, dataclasses.replace(change, snr_db=snr, noise_color=color), seed=5)
    noise = noisy - clean
    assert level_db(clean) - level_db(noise) == pytest.approx(snr, abs=0.5)
    if narrow_band:
        assert decibels(power(noise, 4000, 8001) / power(noise, 0, 4000)) < -40


@pytest.mark.parametrize(("color", "per_octave"), [("white", 0), ("pink", -3.01), ("brown", -6.02)])
def test_noise_falls_with_frequency_as_its_color_says(color, per_octave):
    noise = coloured_noise(8 * RATE, color, np.random.default_rng(0))
    density = [power(noise, f, 1.1 * f) / (0.1 * f) for f in (400, 3200)]
    assert decibels(density[1] / density[0]) / 3 == pytest.approx(per_octave, abs=0.5)


def test_noise_depends_on_the_seed_alone(speech):
    change = Augmentation(snr_db=5)
    first, again, other = (augment(speech, change, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


@pytest.mark.parametrize("gain", [-20, -3, 6])
def test_gain_is_in_decibels(speech, gain):
    changed = augment(speech, Augmentation(gain_db=gain), seed=0)
    assert level_db(changed) - level_db(speech) == pytest.approx(gain, abs=0.01)


def test_gain_never_clips(speech):
    loud = augment(speech, Augmentation(gain_db=40), seed=0)
    assert np.abs(loud).max() == pytest.approx(HIGHEST_PEAK)
    # Softer as a whole, not cut: still the same wave.
    assert np.corrcoef(loud, speech)[0, 1] > 1 - 1e-6


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_speed_changes_duration_and_pitch(factor):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE).astype(np.float32)
    changed = augment(tone, Augmentation(speed=factor), seed=0)
    assert len(changed) == pytest.approx(len(tone) / factor, abs=2)
    np.testing.assert_array_equal(changed, at_speed(tone, factor))
    assert power(changed, 430 * factor, 450 * factor) > 0.99 * power(changed, 0, 8001)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("speed", 0.1, "augmentation.speed is 0.1; 0.5 to 2"),
        ("snr_db", float("nan"), "augmentation.snr_db is nan; -20 to 100"),
        ("gain_db", 100, "augmentation.gain_db is 100; -60 to 60"),
        ("noise_color", "green", "'green'; one of white, pink, brown"),
    ],
)
def test_what_cannot_be_is_told_in_words(field, value, told):
    with pytest.raises(ConfigError, match=told):
        Augmentation(**{field: value})


def test_every_field_changes_the_samples(speech):
    base = Augmentation(snr_db=10)
    changes = {
        "speed": 1.1,
        "narrow_band": True,
        "snr_db": 11.0,
        "noise_color": "brown",
        "gain_db": -1.0,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(Augmentation)}
    before = augment(speech, base, seed=0)
    for field, value in changes.items():
        after = augment(speech, dataclasses.replace(base, **{field: value}), seed=0)
        assert not np.array_equal(before, after), field
