"""Sampling: transformers' semantics, and randomness that belongs to the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llaso_jax.errors import ConfigError
from llaso_jax.inference.sampling import (
    GenerationConfig,
    Knobs,
    Method,
    keep_top_k,
    keep_top_p,
    next_tokens,
    row_identities,
)

KEPT = -1e29  # what is removed lies below


def random_logits(rows: int = 4, vocab: int = 50, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((rows, vocab))).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 200])
def test_top_k_keeps_what_transformers_keeps(k):
    logits = random_logits()
    logits[0, :4] = 9.0  # a tie across the k-th place
    theirs = TopKLogitsWarper(k)(None, torch.from_numpy(logits)).numpy()
    ours = np.asarray(keep_top_k(jnp.asarray(logits), k))
    np.testing.assert_array_equal(ours > KEPT, np.isfinite(theirs))
    np.testing.assert_array_equal(ours[ours > KEPT], logits[ours > KEPT])


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(p):
    logits = random_logits()
    theirs = TopPLogitsWarper(p)(None, torch.from_numpy(logits)).numpy()
    ours = np.asarray(keep_top_p(jnp.asarray(logits), p))
    np.testing.assert_array_equal(ours > KEPT, np.isfinite(theirs))


def test_temperature_then_top_k_then_top_p():
    logits = random_logits(rows=1)
    scores = torch.from_numpy(logits)
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(8), TopPLogitsWarper(0.8)):
        scores = warper(None, scores)
    expected = torch.softmax(scores, -1).numpy()[0]
    draws = 4096
    config = GenerationConfig(temperature=0.7, top_k=8, top_p=0.8)
    tokens = _draw(np.repeat(logits, draws, 0), config, np.arange(draws, dtype=np.uint32))
    frequencies = np.bincount(tokens, minlength=50) / draws
    assert not frequencies[expected == 0].any()
    np.testing.assert_allclose(frequencies, expected, atol=4 * (0.25 / draws) ** 0.5)


def _draw(logits: np.ndarray, config: GenerationConfig, rows: np.ndarray, step: int = 0):
    knobs = Knobs(
        np.float32(config.temperature), np.float32(config.top_p), np.uint32(config.seed), rows
    )
    take = jax.jit(next_tokens, static_argnames="method")
    return np.asarray(take(jnp.asarray(logits), jnp.int32(step), knobs, method=Method.of(config)))


def test_draws_follow_seed_identity_and_step_not_the_batch():
    logits = np.zeros((4, 50), np.float32)
    config = GenerationConfig(temperature=1.0, seed=7)
    rows = np.array([11, 22, 33, 44], np.uint32)
    together = _draw(logits, config, rows)
    np.testing.assert_array_equal(together, _draw(logits, config, rows))
    np.testing.assert_array_equal(together[::-1], _draw(logits, config, rows[::-1]))
    np.testing.assert_array_equal(together[2:3], _draw(logits, config, rows[[2, 2, 1, 0]])[:1])
    assert (together != _draw(logits, config, rows, step=1)).any()
    assert (together != _draw(logits, GenerationConfig(temperature=1.0, seed=8), rows)).any()
    assert len(set(together)) > 1


def test_padded_vocabulary_changes_no_draw():
    logits = random_logits()
    padded = np.pad(logits, ((0, 0), (0, 14)), constant_values=-1e30)
    config = GenerationConfig(temperature=1.0, top_k=20, top_p=0.95)
    rows = np.arange(4, dtype=np.uint32)
    np.testing.assert_array_equal(_draw(logits, config, rows), _draw(padded, config, rows))


def test_identity_is_content_not_padding():
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((2, 1, 4, 10)).astype(np.float32)
    short = {
        "tokens": np.array([[5, 0, 0, 6], [5, 0, 0, 6]], np.int32),
        "segment_ids": np.ones((2, 4), np.int32),
        "audio_slot": np.array([[-1, 0, 1, -1]] * 2, np.int32),
        "mel": mel,
        "mel_frames": np.array([[4], [4]], np.int32),
    }
    first, second = row_identities(short)
    assert first != second  # other audio
    longer = {key: np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, 2)]) if key != "mel_frames"
              else value for key, value in short.items()}  # fmt: skip
    longer["tokens"][:, 1:3] = 9  # any id may stand at audio positions
    longer["mel"] = np.pad(longer["mel"], [(0, 0), (0, 1), (0, 0), (0, 0)])
    longer["mel_frames"] = np.pad(short["mel_frames"], [(0, 0), (0, 1)])
    np.testing.assert_array_equal(row_identities(longer), [first, second])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"top_k": 5}, "no effect on greedy decoding"),
    ],
)
def test_wrong_settings_are_refused(wrong, named):
    with pytest.raises(ConfigError, match=named):
        GenerationConfig(**wrong)


def test_eos_is_one_id_or_several():
    assert GenerationConfig(eos_token_id=3).eos_token_id == (3,)
    assert GenerationConfig(eos_token_id=[3, 4]).eos_token_id == (3, 4)
