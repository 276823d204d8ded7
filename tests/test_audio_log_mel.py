"""Log-mel features equal WhisperFeatureExtractor's everywhere on the padded 30 s."""

import numpy as np
import pytest

from llaso_jax.data.audio import chunk_audio
from llaso_jax.data.log_mel import log_mel, mel_filters, mel_frames, pad_mel, touched_frames

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def extractors():
    from transformers import WhisperFeatureExtractor

    return {bins: WhisperFeatureExtractor(feature_size=bins) for bins in (80, 128)}


def noise(n):
    return (0.1 * RNG.standard_normal(n)).astype(np.float32)


CLIPS = {
    "one sample": noise(1),
    "less than a hop": noise(100),
    "one hop": noise(160),
    "half a window": noise(201),
    "1 s": noise(16_000),
    "odd length": noise(55_555),
    "loud end": np.r_[noise(30_000), np.ones(1000, np.float32)],
    "just below 30 s": noise(479_950),
    "30 s": noise(480_000),
    "silence": np.zeros(20_000, np.float32),
    "silence of 30 s": np.zeros(480_000, np.float32),
    "speech then silence": np.r_[noise(10_000), np.zeros(20_000, np.float32)],
    "faint": noise(16_000) * 1e-6,
    "tone": np.sin(np.arange(40_000) * 0.3).astype(np.float32),
}


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("name", CLIPS)
def test_padded_features_equal_whisper_extractor(extractors, bins, name):
    clip = CLIPS[name]
    expected = extractors[bins](clip, sampling_rate=16_000, return_tensors="np").input_features[0]
    ours = pad_mel(log_mel(clip, mel_bins=bins), 3000)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_frames_computed_are_those_that_audio_touches():
    for n in (1, 38, 39, 120, 121, 160, 199, 200, 279, 280, 479_999, 480_000):
        assert mel_frames(n) <= touched_frames(n) <= min(mel_frames(n) + 2, 3000)
        assert log_mel(noise(n), mel_bins=80).shape == (80, touched_frames(n))


def test_pad_mel_cuts_and_fills_with_the_floor():
    mel = log_mel(noise(16_000), mel_bins=80)
    assert np.array_equal(pad_mel(mel, 100), mel[:, :100])
    assert np.unique(pad_mel(mel, 300)[:, 150:]) == max(np.float32(-1.5), mel.max() - 2)


def test_mel_filters_equal_librosa():
    import librosa

    for bins in (80, 128):
        expected = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=bins)
        np.testing.assert_allclose(mel_filters(bins).toarray(), expected, atol=1e-7)


def test_chunks_are_exactly_30_seconds_and_lose_no_sample():
    samples = noise(1_000_001)
    chunks = chunk_audio(samples)
    assert [len(c) for c in chunks] == [480_000, 480_000, 40_001]
    assert np.array_equal(np.concatenate(chunks), samples)
    assert len(chunk_audio(samples[:960_000])) == 2


@pytest.mark.parametrize("n", [0, 480_001])
def test_chunks_of_impossible_length_are_refused(n):
    with pytest.raises(ValueError, match=f"{n} samples"):
        log_mel(np.zeros(n, np.float32), mel_bins=80)
