"""SpecAugment: masks of the stated sizes, the same after a resume, and none where they would falsify the answer."""

import dataclasses
import json
from itertools import islice

import numpy as np
import pytest
from data_corpus import LAYOUT, PROMPT, SHAPE, batches_of, byte_tokenizer, write_corpus

from llaso_jax.data.config import DataConfig, SpecAugmentConfig
from llaso_jax.data.log_mel import pad_mel
from llaso_jax.data.pipeline import make_lanes
from llaso_jax.data.spec_augment import masked
from llaso_jax.errors import ConfigError

MASKS = SpecAugmentConfig(frequency_width=3, time_width=20, time_share=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def clip(bins: int = 40, frames: int = 120) -> np.ndarray:
    """Features without two equal entries."""
    mel = np.random.default_rng(0).permutation(bins * frames).astype(np.float32)
    return mel.reshape(bins, frames) / mel.size


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_whole_bins_and_frames_of_the_stated_width(seed):
    mel, audio = clip(), 110
    config = SpecAugmentConfig(
        frequency_masks=1, frequency_width=7, time_masks=1, time_width=30, time_share=0.2
    )
    out = masked(mel, audio, config, np.random.default_rng(seed))
    changed = out != mel
    loudest = np.unravel_index(mel.argmax(), mel.shape)
    changed[loudest] = changed[:audio].any()  # may stand alone in a mask
    assert not changed[:, audio:].any(), "padding is left alone"
    bins = np.flatnonzero((out != mel)[:, :audio].sum(1) > 60)
    frames = np.flatnonzero((out != mel)[:, :audio].sum(0) > 25)
    assert len(bins) <= 7
    assert len(frames) <= 0.2 * audio
    assert (np.diff(bins) == 1).all()
    assert (np.diff(frames) == 1).all()
    inside = np.zeros(mel.shape, bool)
    inside[bins, :audio] = inside[:, frames] = True
    inside[loudest] = False
    assert np.array_equal(out != mel, inside)
    np.testing.assert_array_equal(out[inside], mel[:, :audio].mean())


def test_masks_come_in_every_width_and_place():
    mel = clip()
    config = SpecAugmentConfig(frequency_masks=0, time_masks=1, time_width=5, time_share=1.0)
    masks = set()
    for seed in range(300):
        hit = np.flatnonzero((masked(mel, 120, config, np.random.default_rng(seed)) != mel).any(0))
        masks.add(tuple(hit))
    assert {len(mask) for mask in masks} == set(range(6))
    assert {0, 119} <= {frame for mask in masks for frame in mask}


def test_padding_stays_what_whisper_makes_of_silence():
    mel = clip(bins=4, frames=10)
    everything = SpecAugmentConfig(
        frequency_masks=9, frequency_width=4, time_masks=9, time_width=10, time_share=1.0
    )
    for seed in range(10):
        out = masked(mel, 10, everything, np.random.default_rng(seed))
        np.testing.assert_array_equal(pad_mel(out, 20)[:, 10:], pad_mel(mel, 20)[:, 10:])


def test_nothing_is_changed_in_place_and_no_masks_are_none():
    mel, before = clip(), clip()
    masked(mel, 120, MASKS, np.random.default_rng(0))
    np.testing.assert_array_equal(mel, before)
    none = SpecAugmentConfig(frequency_masks=0, time_masks=0)
    np.testing.assert_array_equal(masked(mel, 120, none, np.random.default_rng(0)), before)


# --- through the pipeline -------------------------------------------------------------------------


def by_sample(batches) -> dict[str, list[np.ndarray]]:
    """Audio of each sample, of every time it came; rows of one sample each."""
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for row, ids in enumerate(batch.sample_ids):
            for sample_id in ids:
                found.setdefault(sample_id, []).append(batch.arrays["mel"][row])
    return found


ALONE = {"packing": False, "mel_buckets": (150,), "feature_cache_mb": 10}


def test_every_pass_has_masks_of_its_own_and_features_in_memory_stay_clean(corpus, tokenizer):
    clean = by_sample(batches_of(corpus, tokenizer, **ALONE))
    ours = by_sample(batches_of(corpus, tokenizer, epochs=3, spec_augment=MASKS, **ALONE))
    for sample_id, (expected,) in clean.items():
        passes = ours[sample_id]
        assert len(passes) == 3
        if not expected.any():
            continue  # text only
        for mel in passes:
            assert (mel != expected).any()
            # Masks of masked features would leave less and less.
            assert (mel == expected).mean() > 0.2
        assert not np.array_equal(passes[0], passes[1])


def test_a_resume_and_other_workers_draw_the_same_masks(corpus, tokenizer):
    settings = {"epochs": 2, "spec_augment": MASKS, "mel_buckets": (150,)}
    expected = list(batches_of(corpus, tokenizer, **settings))
    first = batches_of(corpus, tokenizer, **settings)
    before = list(islice(first, 3))
    second = batches_of(corpus, tokenizer, num_threads=1, **settings)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for ours, theirs in zip([*before, *second], expected, strict=True):
        np.testing.assert_array_equal(ours.arrays["mel"], theirs.arrays["mel"])


def test_lanes_read_apart_draw_the_masks_they_draw_together(corpus, tokenizer):
    config = DataConfig(
        train_json=(str(corpus),),
        **{**SHAPE, "rows": 4, "lanes": 4, "mel_buckets": (150,), "window": 8},
        spec_augment=MASKS,
    )

    def lane(which):
        lanes = make_lanes(
            config,
            which,
            split="train",
            tokenizer=tokenizer,
            layout=LAYOUT,
            prompt=PROMPT,
            quarantine_files={},
        )
        return list(iter(lanes[2]))

    for ours, theirs in zip(lane([2]), lane(range(4)), strict=True):
        np.testing.assert_array_equal(ours.arrays["mel"], theirs.arrays["mel"])


def test_another_seed_draws_other_masks_and_held_out_samples_get_none(corpus, tokenizer):
    settings = {"shuffle": False, **ALONE}
    clean = by_sample(batches_of(corpus, tokenizer, **settings))
    ours, other = (
        by_sample(batches_of(corpus, tokenizer, spec_augment=MASKS, seed=seed, **settings))
        for seed in (0, 1)
    )
    assert any(not np.array_equal(ours[i][0], other[i][0]) for i in clean)
    held_out = by_sample(
        batches_of(corpus, tokenizer, split="eval", spec_augment=MASKS, **settings)
    )
    for sample_id, (expected,) in clean.items():
        np.testing.assert_array_equal(held_out[sample_id][0], expected)


@pytest.mark.parametrize("key", ["metadata", "meta-data"])
def test_records_and_tasks_may_rule_masks_out(corpus, tokenizer, tmp_path, key):
    records = json.loads(corpus.read_text())
    ruled_out = {"s0": {"task": "Pitch"}, "s4": {"spec_augment": False}}
    fine = {"s1": {"task": "ASR"}, "s5": {"spec_augment": True}}
    for record in records:
        if record["id"] in ruled_out | fine:
            record[key] = (ruled_out | fine)[record["id"]]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    settings = {"data_root": str(corpus.parent), **ALONE}
    clean = by_sample(batches_of(path, tokenizer, **settings))
    config = dataclasses.replace(MASKS, except_tasks=("Pitch",))
    ours = by_sample(batches_of(path, tokenizer, spec_augment=config, **settings))
    for sample_id in ruled_out:
        np.testing.assert_array_equal(ours[sample_id][0], clean[sample_id][0])
    for sample_id in fine:
        assert not np.array_equal(ours[sample_id][0], clean[sample_id][0])


def test_sizes_that_cannot_be_are_told():
    with pytest.raises(ConfigError, match=r"`spec_augment.time_width` is -1"):
        SpecAugmentConfig(time_width=-1)
    with pytest.raises(ConfigError, match=r"`spec_augment.time_share` is 1.5"):
        SpecAugmentConfig(time_share=1.5)
