"""The boundary of plain nested dicts, and the exact size of the full model without allocating it."""

import dataclasses
import time

import jax
import numpy as np
import pytest
from reference import initializer, jit, make_batch, random_params, tiny_config
from tolerances import LEAF, assert_close

from llaso_jax.modeling.functional import (
    abstract_params,
    bind,
    cast,
    count_params,
    flatten,
    init_params,
    merge,
    split,
    unflatten,
)
from llaso_jax.modeling.speech_lm import SpeechLMConfig

# The sizes of spec/llaso.md, counted by hand.
LAYER_NORM = 2 * 1280
WHISPER_LAYER = (
    2 * LAYER_NORM
    + 4 * 1280 * 1280  # q, k, v, out
    + 3 * 1280  # k has no bias
    + (1280 * 5120 + 5120)
    + (5120 * 1280 + 1280)
)
WHISPER = (
    (128 * 1280 * 3 + 1280)
    + (1280 * 1280 * 3 + 1280)
    + 1500 * 1280
    + 32 * WHISPER_LAYER
    + LAYER_NORM
)
PROJECTOR = (1280 * 3072 + 3072) + (3072 * 3072 + 3072)
LLAMA_LAYER = (
    2 * 3072
    + 2 * 3072 * (24 * 128)  # q, o
    + 2 * 3072 * (8 * 128)  # k, v
    + 3 * 3072 * 8192
)


def llama(vocab: int) -> int:
    return vocab * 3072 + 28 * LLAMA_LAYER + 3072


def with_vocab(vocab: int, **text) -> SpeechLMConfig:
    base = SpeechLMConfig()
    return dataclasses.replace(base, text=dataclasses.replace(base.text, vocab_size=vocab, **text))


@pytest.mark.parametrize(("vocab", "total"), [(128_256, 3_863_094_272), (128_261, 3_863_109_632)])
def test_llaso_base_has_exactly_its_published_parameters(vocab: int, total: int):
    assert llama(128_256) == 3_212_749_824  # the size Meta states for Llama-3.2-3B
    assert WHISPER + PROJECTOR + llama(vocab) == total
    cfg = with_vocab(vocab)
    assert count_params(cfg) == total
    by_part = dict.fromkeys(("audio_tower", "projector", "language_model"), 0)
    for path, info in abstract_params(cfg).items():
        by_part[path.split("/")[0]] += info.size
    assert by_part == {
        "audio_tower": WHISPER,
        "projector": PROJECTOR,
        "language_model": llama(vocab),
    }


def test_untied_head_and_padded_vocabulary_count_as_stored():
    assert count_params(with_vocab(128_256, tie_word_embeddings=False)) == (
        WHISPER + PROJECTOR + llama(128_256) + 128_256 * 3072
    )
    assert count_params(with_vocab(128_261, vocab_multiple_of=128)) == (
        WHISPER + PROJECTOR + llama(128_384)
    )


def test_the_full_model_is_described_in_no_time_and_without_memory():
    held = sum(array.nbytes for array in jax.live_arrays())
    started = time.process_time()
    assert count_params(with_vocab(128_263)) > 3.8e9  # a size no other test has cached
    assert time.process_time() - started < 2
    # A few bytes of random key are all that may stay.
    assert sum(array.nbytes for array in jax.live_arrays()) - held < 1024


def test_abstract_parameters_are_the_initial_ones():
    cfg = tiny_config(text={"tie_word_embeddings": False})
    params = flatten(jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0)))
    described = abstract_params(cfg)
    assert set(params) == set(described)
    for path, info in described.items():
        assert params[path].shape == info.shape
        assert params[path].dtype == info.dtype == np.float32
        assert len(info.logical_axes) == len(info.shape), path
        assert ("layers" in path.split("/")) == (info.logical_axes[0] == "layers"), path


def test_a_key_decides_every_random_parameter():
    cfg = tiny_config()
    make = initializer(cfg)
    first, again, other = (flatten(make(jax.random.key(seed))) for seed in (0, 0, 1))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[path])
        constant = "norm" in path or "embed_positions" in path
        constant |= path.endswith("bias") and not path.startswith("projector")
        assert constant == bool((leaf == other[path]).all()), path


def test_flatten_and_split_lose_nothing():
    params = random_params(unflatten(abstract_params(tiny_config())))
    flat = flatten(params)
    assert list(flat) == sorted(flat)
    assert flatten(unflatten(flat)).keys() == flat.keys()
    trainable, frozen = split(params, lambda path: path.startswith("projector/"))
    assert set(trainable) == {"projector"}
    assert set(frozen) == {"audio_tower", "language_model"}
    merged = merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)
    )


def test_casting_reaches_every_leaf():
    params = random_params(unflatten(abstract_params(tiny_config())))
    assert {leaf.dtype for leaf in jax.tree.leaves(cast(params, "bfloat16"))} == {
        np.dtype("bfloat16")
    }


def test_gradient_by_a_trainable_part_equals_that_part_of_the_whole_gradient():
    cfg = tiny_config()
    params = random_params(unflatten(abstract_params(cfg)))
    batch = make_batch([[[[1, 2], 24, [3, 4, 5]]]], cfg, mel_length=24)
    trainable, frozen = split(params, lambda path: path.startswith("projector/"))
    part = jit(jax.grad(lambda t: bind(cfg, merge(t, frozen)).loss_sum(batch)))(trainable)
    whole = jit(jax.grad(lambda p: bind(cfg, p).loss_sum(batch)))(params)
    assert set(part) == {"projector"}
    for path, leaf in flatten(part).items():
        assert_close(leaf, flatten(whole)[path], LEAF, path)
