"""Every format loads as 16 kHz mono; every kind of bad file is a typed error that says why."""

import numpy as np
import pytest
import soundfile as sf

from llaso_jax.data import audio
from llaso_jax.data.audio import load_audio
from llaso_jax.errors import AudioError

SECOND = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000).astype(np.float32) * 0.5


def tone(rate, seconds=1.0, hz=440):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.wav", {"subtype": "PCM_16"}, 1e-4),
        ("a.flac", {}, 1e-4),
        ("a.mp3", {}, 0.05),
        ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}, 0.05),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}, 0.05),
    ],
)
def test_every_format_loads(tmp_path, name, options, tolerance):
    sf.write(tmp_path / name, SECOND, 16_000, **options)
    loaded = load_audio(tmp_path / name)
    assert loaded.samples.dtype == np.float32
    assert abs(loaded.seconds_used - 1) < 0.1
    n = 8000
    level = np.sqrt(np.mean(loaded.samples[4000 : 4000 + n] ** 2))
    assert level == pytest.approx(0.5 / np.sqrt(2), abs=tolerance)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 192_000])
def test_any_rate_becomes_16_khz(tmp_path, rate):
    sf.write(tmp_path / "a.wav", tone(rate), rate, subtype="FLOAT")
    loaded = load_audio(tmp_path / "a.wav")
    assert abs(len(loaded.samples) - 16_000) <= 1
    np.testing.assert_allclose(loaded.samples[2000:14_000], SECOND[2000:14_000], atol=2e-3)


def test_block_wise_resampling_equals_resampling_at_once(tmp_path, monkeypatch):
    import soxr

    wave = np.random.default_rng(0).standard_normal(50_000).astype(np.float32) * 0.1
    sf.write(tmp_path / "a.wav", wave, 44_100, subtype="FLOAT")
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 777)
    blocks = load_audio(tmp_path / "a.wav").samples
    np.testing.assert_allclose(blocks, soxr.resample(wave, 44_100, 16_000), atol=1e-6)


def test_eight_channels_are_averaged(tmp_path):
    channels = np.stack([SECOND * (i + 1) / 8 for i in range(8)], axis=1)
    sf.write(tmp_path / "a.wav", channels, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav").samples, SECOND * 4.5 / 8, atol=1e-6)


def test_arrays_load_like_files(tmp_path):
    stereo = np.stack([SECOND, SECOND])
    for array in (SECOND, stereo, stereo.T, SECOND.astype(np.float64)):
        np.testing.assert_allclose(
            load_audio(array, sampling_rate=16_000).samples, SECOND, atol=1e-6
        )
    int16 = (SECOND * 32768).astype(np.int16)
    np.testing.assert_allclose(load_audio(int16, sampling_rate=16_000).samples, SECOND, atol=1e-4)
    assert abs(len(load_audio(tone(48_000), sampling_rate=48_000).samples) - 16_000) <= 1


def write_missing(path):
    pass


def write_zero_bytes(path):
    path.touch()


def write_truncated(path):
    sf.write(path, SECOND, 16_000)
    path.write_bytes(path.read_bytes()[:-1000])


def write_text(path):
    path.write_text("This is not audio.\n" * 20)


def write_nan(path):
    sf.write(path, np.r_[SECOND, np.nan].astype(np.float32), 16_000, subtype="FLOAT")


def write_inf(path):
    sf.write(path, np.r_[SECOND, np.inf, -np.inf].astype(np.float32), 16_000, subtype="FLOAT")


def write_no_samples(path):
    sf.write(path, np.zeros(0, np.float32), 16_000)


def write_folder(path):
    path.mkdir()


BAD_FILES = {
    write_missing: "does not exist",
    write_zero_bytes: "0 bytes",
    write_truncated: "truncated: its header promises 32000 bytes of samples, 31000 are there",
    write_text: "not readable as audio",
    write_nan: "NaN or infinite",
    write_inf: "NaN or infinite",
    write_no_samples: "0 samples",
    write_folder: "not a file",
}


@pytest.mark.parametrize("write", BAD_FILES)
def test_bad_files_are_typed_errors_that_say_why(tmp_path, write):
    write(tmp_path / "bad.wav")
    with pytest.raises(AudioError, match=BAD_FILES[write]) as error:
        load_audio(tmp_path / "bad.wav")
    assert "bad.wav" in str(error.value)


def test_truncated_flac_is_an_error(tmp_path):
    sf.write(tmp_path / "a.flac", np.random.default_rng(0).standard_normal(100_000) * 0.1, 16_000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError):
        load_audio(tmp_path / "a.flac")


@pytest.mark.parametrize(
    ("array", "rate", "problem"),
    [
        (np.zeros(0, np.float32), 16_000, "0 samples"),
        (np.array([0, np.nan], np.float32), 16_000, "NaN"),
        (np.zeros((2, 2, 2), np.float32), 16_000, "shape"),
        (np.zeros(3, bool), 16_000, "dtype bool"),
        (np.zeros(3, np.float32), 0, "0 Hz"),
        (np.zeros(3, np.float32), None, "without its sampling rate"),
    ],
)
def test_bad_arrays_are_typed_errors(array, rate, problem):
    with pytest.raises(AudioError, match=problem):
        load_audio(array, sampling_rate=rate)


def test_a_file_takes_no_sampling_rate(tmp_path):
    with pytest.raises(AudioError, match="states its own"):
        load_audio(tmp_path / "a.wav", sampling_rate=16_000)


def test_too_long_audio_is_an_error_naming_the_setting(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(80_000, np.float32), 8_000)
    with pytest.raises(AudioError, match=r"10\.0 s long; `max_audio_seconds` is 4"):
        load_audio(tmp_path / "a.wav", max_seconds=4)


def test_truncation_is_recorded(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(80_000, np.float32), 8_000)
    loaded = load_audio(tmp_path / "a.wav", max_seconds=4, policy="truncate")
    assert len(loaded.samples) == 64_000
    assert (loaded.seconds_total, loaded.seconds_used, loaded.seconds_dropped) == (10, 4, 6)


def test_three_hours_are_not_decoded_to_use_ten_seconds(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    with sf.SoundFile(path, "w", 8_000, 1, "PCM_U8") as file:
        for _ in range(180):
            file.write(np.zeros(8_000 * 60, np.float32))
    decoded = []
    read = sf.SoundFile.read

    def counting_read(self, *args, **kwargs):
        block = read(self, *args, **kwargs)
        decoded.append(len(block))
        return block

    monkeypatch.setattr(sf.SoundFile, "read", counting_read)
    with pytest.raises(AudioError, match=r"10800\.0 s long"):
        load_audio(path, max_seconds=10)
    assert not decoded
    loaded = load_audio(path, max_seconds=10, policy="truncate")
    assert sum(decoded) == 80_000
    assert (loaded.seconds_used, loaded.seconds_dropped) == (10, 10_790)
