"""Features read from the cache are those of the file, and no more of them are kept than allowed."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile as sf

from llaso_jax.data import features as module
from llaso_jax.data.audio import load_audio
from llaso_jax.data.features import FeatureReader, audio_features
from llaso_jax.errors import AudioError

BINS = 8
ONE = 4 * BINS * 100  # bytes of 1 s of features, within a few frames


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{name}.wav" for name in "abc"]
    for seed, path in enumerate(paths):
        noise = np.random.default_rng(seed).normal(0, 0.1, 16_000)
        sf.write(path, noise, 16_000, subtype="FLOAT")
    return paths


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded."""
    names = []

    def counting(path, **settings):
        names.append(path.stem)
        return load_audio(path, **settings)

    monkeypatch.setattr(module, "load_audio", counting)
    return names


def same(a, b) -> bool:
    return (
        a.mel_frames == b.mel_frames
        and (a.seconds_used, a.seconds_dropped) == (b.seconds_used, b.seconds_dropped)
        and all(np.array_equal(x, y) for x, y in zip(a.mels, b.mels, strict=True))
    )


@pytest.mark.parametrize("cache_bytes", [0, 10 * ONE])
def test_features_are_those_of_the_file(files, cache_bytes):
    reader = FeatureReader(mel_bins=BINS, cache_bytes=cache_bytes)
    expected = [audio_features(load_audio(path), mel_bins=BINS) for path in files]
    for _ in range(2):
        assert all(map(same, reader.read(files), expected))


def test_without_a_cache_every_use_is_a_read(files, decoded):
    reader = FeatureReader(mel_bins=BINS)
    reader.read([files[0], files[0]])
    assert decoded == ["a", "a"]


def test_the_ones_used_last_are_kept(files, decoded):
    a, b, c = files
    reader = FeatureReader(mel_bins=BINS, cache_bytes=int(2.5 * ONE))
    reader.read([a, b, a])  # b is now the one not used for longest
    reader.read([c])
    assert decoded == ["a", "b", "c"]
    reader.read([a, c])
    assert decoded == ["a", "b", "c"]
    reader.read([b])
    assert decoded == ["a", "b", "c", "b"]


def test_a_recording_larger_than_the_cache_drives_nothing_out(files, decoded, tmp_path):
    sf.write(tmp_path / "long.wav", np.zeros(64_000), 16_000)
    reader = FeatureReader(mel_bins=BINS, cache_bytes=int(1.5 * ONE))
    reader.read([files[0], tmp_path / "long.wav", files[0]])
    assert decoded == ["a", "long"]


def test_a_bad_file_is_told_every_time(tmp_path):
    reader = FeatureReader(mel_bins=BINS, cache_bytes=ONE)
    for _ in range(2):
        with pytest.raises(AudioError, match="does not exist"):
            reader.read([tmp_path / "none.wav"])


def test_a_copy_for_another_process_starts_empty(files, decoded):
    reader = FeatureReader(mel_bins=BINS, cache_bytes=10 * ONE)
    reader.read(files)
    copy = pickle.loads(pickle.dumps(reader))
    assert len(pickle.dumps(reader)) < ONE
    assert same(copy.read(files[:1])[0], reader.read(files[:1])[0])
    assert decoded == ["a", "b", "c", "a"]


def test_threads_may_share_a_reader(files):
    reader = FeatureReader(mel_bins=BINS, cache_bytes=2 * ONE)
    expected = [audio_features(load_audio(path), mel_bins=BINS) for path in files]
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(reader.read, [files] * 40):
            assert all(map(same, got, expected))
