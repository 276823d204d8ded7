"""Every sample once per epoch, the same batches after a resume, in any number of workers."""

import json

import numpy as np
import pytest
from data_corpus import LAYOUT, PROMPT, SHAPE, ask, batches_of, byte_tokenizer, ids_of, write_corpus

from llaso_jax.data import features
from llaso_jax.data.audio import load_audio
from llaso_jax.data.batch import PipelineStats, empty_batch
from llaso_jax.data.config import AudioLayout, DataConfig
from llaso_jax.data.packing import BatchShape
from llaso_jax.data.pipeline import _share, make_lanes, make_pipeline
from llaso_jax.errors import AudioError, ConfigError, DataError

ALL = sorted(f"s{i}" for i in range(17))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.sample_ids == b.sample_ids
        assert a.stats == b.stats
        assert a.arrays.keys() == b.arrays.keys()
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_sample_is_seen_exactly_once_per_epoch(corpus, tokenizer, split, packing):
    batches = list(batches_of(corpus, tokenizer, split=split, packing=packing))
    assert sorted(ids_of(batches)) == ALL
    if not packing:
        assert max(len(row) for b in batches for row in b.sample_ids) == 1
    assert batches[-1].stats.epoch == 1


def test_two_epochs_hold_every_sample_twice_in_another_order(corpus, tokenizer):
    once = ids_of(batches_of(corpus, tokenizer))
    twice = ids_of(batches_of(corpus, tokenizer, epochs=2))
    assert sorted(twice) == sorted(ALL * 2)
    assert twice[:10] == once[:10]
    assert once != twice[17:]


def test_order_depends_on_the_seed_only(corpus, tokenizer):
    first, again = (list(batches_of(corpus, tokenizer, seed=1)) for _ in range(2))
    assert_same(first, again)
    assert ids_of(first) != ids_of(batches_of(corpus, tokenizer, seed=2))
    in_order = ids_of(batches_of(corpus, tokenizer, shuffle=False, packing=False, window=1, rows=1))
    assert in_order == [f"s{i}" for i in range(17)]


def test_part_epochs_and_endless_streams(corpus, tokenizer):
    assert len(ids_of(batches_of(corpus, tokenizer, epochs=0.5))) == 8
    endless = batches_of(corpus, tokenizer, epochs=None)
    seen = ids_of(next(endless) for _ in range(20))
    endless.close()
    assert len(seen) > 40


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_resume_gives_exactly_the_batches_that_would_have_followed(
    corpus, tokenizer, stop, prefetch
):
    expected = list(batches_of(corpus, tokenizer, epochs=2))
    first = batches_of(corpus, tokenizer, epochs=2, prefetch_batches=prefetch)
    before = [next(first) for _ in range(stop)]
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    second = batches_of(corpus, tokenizer, epochs=2, prefetch_batches=prefetch)
    second.set_state(state)
    assert second.get_state() == state
    after = list(second)
    second.close()
    assert_same(before + after, expected)


def test_setting_a_state_back_replays_the_batches(corpus, tokenizer):
    batches = batches_of(corpus, tokenizer)
    next(batches)
    state = batches.get_state()
    rest = list(batches)
    batches.set_state(state)
    assert_same(list(batches), rest)


def test_grain_checkpoint_handlers_save_and_restore_the_position(corpus, tokenizer, tmp_path):
    import grain
    import orbax.checkpoint as ocp

    expected = list(batches_of(corpus, tokenizer))
    batches = batches_of(corpus, tokenizer)
    for _ in range(2):
        next(batches)
    with ocp.CheckpointManager(tmp_path / "ckpt") as manager:
        manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        resumed = batches_of(corpus, tokenizer)
        manager.restore(
            2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed))
        )
    assert_same(list(resumed), expected[2:])


LANES = {"rows": 4, "lanes": 4, "mel_buckets": (150,), "window": 8}


def lanes_of(corpus, tokenizer, lanes, **settings):
    """Iterators over `lanes` of 4."""
    config = DataConfig(train_json=(str(corpus),), **{**SHAPE, **LANES, **settings})
    datasets = make_lanes(
        config,
        lanes,
        split="train",
        tokenizer=tokenizer,
        layout=LAYOUT,
        prompt=PROMPT,
        quarantine_files={},
    )
    return {lane: iter(dataset) for lane, dataset in datasets.items()}


def test_lanes_share_the_samples_without_overlap(corpus, tokenizer):
    lanes = lanes_of(corpus, tokenizer, range(4))
    parts = {lane: list(batches) for lane, batches in lanes.items()}
    assert parts[0][0].arrays["tokens"].shape[0] == 1
    seen = [ids_of(batches) for batches in parts.values()]
    assert sorted(i for ids in seen for i in ids) == ALL
    assert {len(ids) for ids in seen} == {4, 5}


def test_a_lane_does_not_depend_on_which_others_are_read(corpus, tokenizer):
    together = lanes_of(corpus, tokenizer, range(4), epochs=2)
    alone = lanes_of(corpus, tokenizer, [2], epochs=2, num_threads=1, prefetch_batches=2)
    interleaved = zip(*(list(batches) for batches in together.values()), strict=False)
    assert_same(list(alone[2])[:3], [batches[2] for batches in interleaved][:3])


def test_the_position_of_a_lane_goes_to_any_process(corpus, tokenizer):
    """Read by two processes, of two lanes each; then by one."""
    old = lanes_of(corpus, tokenizer, [0, 1]) | lanes_of(corpus, tokenizer, [2, 3])
    seen = ids_of(next(old[lane]) for lane in (0, 1, 2, 3, 3))
    states = {lane: batches.get_state() for lane, batches in old.items()}
    new = lanes_of(corpus, tokenizer, range(4))
    for lane, batches in new.items():
        batches.set_state(states[lane])
        seen += ids_of(batches)
    assert sorted(seen) == ALL
    with pytest.raises(ConfigError, match="lanes = 4, this run has 1"):
        batches_of(corpus, tokenizer).set_state(states[0])


def test_a_pipeline_of_one_lane_refuses_more(corpus, tokenizer):
    config = DataConfig(train_json=(str(corpus),), **{**SHAPE, **LANES})
    with pytest.raises(ConfigError, match="`make_lanes` reads them"):
        make_pipeline(config, split="train", tokenizer=tokenizer, layout=LAYOUT, prompt=PROMPT)


@pytest.mark.parametrize(
    ("lanes", "settings", "expected"),
    [
        (1, {"num_threads": 4, "read_ahead": 16}, (0, 4, 16)),
        (8, {"num_threads": 4, "read_ahead": 16}, (0, 1, 2)),
        (8, {"num_workers": 8, "num_threads": 4, "read_ahead": 16}, (1, 4, 16)),
        (4, {"num_workers": 2, "num_threads": 4, "read_ahead": 16}, (1, 2, 8)),
    ],
)
def test_lanes_of_one_process_share_its_threads(lanes, settings, expected):
    share = _share(DataConfig(**settings), lanes)
    assert (share.num_workers, share.num_threads, share.read_ahead) == expected


def test_a_position_in_other_data_or_order_is_refused(corpus, tokenizer, tmp_path):
    state = batches_of(corpus, tokenizer).get_state()
    with pytest.raises(ConfigError, match="order = 'train, shuffled by seed 0'"):
        batches_of(corpus, tokenizer, seed=5).set_state(state)
    with pytest.raises(ConfigError, match="samples_per_epoch = 17, this run has 3"):
        batches_of(write_corpus(tmp_path, samples=3), tokenizer).set_state(state)


def bad_corpus(folder):
    """17 good records and 8 bad ones of every kind, mixed."""
    path = write_corpus(folder)
    records = json.loads(path.read_text())
    (folder / "zero.wav").touch()
    (folder / "text.wav").write_text("not audio " * 30)
    bad = [
        ask("Say<audio>", "x", ["missing.wav"], id="bad0"),
        ask("Say<audio>", "x", ["zero.wav"], id="bad1"),
        ask("Say<audio>", "x", ["text.wav"], id="bad2"),
        ask("Say<audio>", "  ", ["0-0.wav"], id="bad3"),
        ask("Say<audio><audio>", "x", ["0-0.wav"], id="bad4"),
        ask("Say", "x" * 61, [], id="bad5"),
        {"id": "bad6", "conversations": []},
        {"id": "bad7", "voice": [], "conversations": [{"from": "robot", "value": "x"}]},
    ]
    for i, record in enumerate(bad):
        records.insert(3 * i, record)
    path.write_text(json.dumps(records))
    return path


def test_quarantine_lists_every_bad_sample_and_loses_no_good_one(tokenizer, tmp_path):
    path, listing = bad_corpus(tmp_path), tmp_path / "run" / "quarantine.jsonl"
    settings = {"bad_sample_policy": "quarantine", "max_quarantined_share": 0.5}
    batches = list(batches_of(path, tokenizer, **settings, pipeline={"quarantine_file": listing}))
    assert sorted(ids_of(batches)) == ALL
    assert batches[-1].stats.quarantined == 8
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert sorted(line["sample_id"] for line in lines) == [f"bad{i}" for i in range(8)]
    by_id = {line["sample_id"]: line for line in lines}
    assert by_id["bad0"]["error"] == "AudioError"
    assert "does not exist" in by_id["bad0"]["message"]
    assert "`answers_per_row`" in by_id["bad5"]["message"]
    assert by_id["bad6"]["record"].startswith("record 18 (byte ")


def test_worker_processes_give_the_same_batches_and_bad_samples(tokenizer, tmp_path):
    path, found = bad_corpus(tmp_path), []
    for workers in (0, 2):
        listing = tmp_path / f"quarantine-{workers}.jsonl"
        batches = batches_of(
            path,
            tokenizer,
            num_workers=workers,
            num_threads=1,
            prefetch_batches=2,
            bad_sample_policy="quarantine",
            max_quarantined_share=0.5,
            pipeline={"quarantine_file": listing},
        )
        found.append((list(batches), listing.read_text()))
        batches.close()
    assert_same(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_a_cache_of_features_saves_reading_and_changes_no_batch(corpus, tokenizer, monkeypatch):
    reads, found = [], []

    def counting(path, **settings):
        reads[-1] += 1
        return load_audio(path, **settings)

    monkeypatch.setattr(features, "load_audio", counting)
    for megabytes in (0, 100):
        reads.append(0)
        settings = {"epochs": 3.0, "feature_cache_mb": megabytes, "num_threads": 1}
        found.append(list(batches_of(corpus, tokenizer, split="train", **settings)))
    assert_same(found[1], found[0])
    assert reads[0] == 3 * reads[1]


def test_quarantine_totals_and_file_survive_a_resume(tokenizer, tmp_path):
    path, listing = bad_corpus(tmp_path), tmp_path / "quarantine.jsonl"
    settings = {
        "bad_sample_policy": "quarantine",
        "max_quarantined_share": 0.5,
        "pipeline": {"quarantine_file": listing},
    }
    expected = list(batches_of(path, tokenizer, **settings))
    lines = listing.read_text()
    batches = batches_of(path, tokenizer, **settings)
    before = [next(batches) for _ in range(2)]
    state = batches.get_state()
    next(batches)  # read past the checkpoint, then killed
    resumed = batches_of(path, tokenizer, **settings)
    resumed.set_state(state)
    assert_same(before + list(resumed), expected)
    assert listing.read_text() == lines


def test_run_stops_past_the_quarantined_share(tokenizer, tmp_path):
    path = bad_corpus(tmp_path)
    pipeline = {"quarantine_file": tmp_path / "quarantine.jsonl"}
    settings = {"bad_sample_policy": "quarantine", "pipeline": pipeline}
    with pytest.raises(DataError, match=r"8 of 25 samples are bad .*`max_quarantined_share`"):
        list(batches_of(path, tokenizer, **settings, max_quarantined_share=0.3))
    with pytest.raises(DataError, match="of 10 samples are bad"):
        list(
            batches_of(
                path,
                tokenizer,
                **settings,
                max_quarantined_share=0.1,
                quarantine_min_samples=10,
                split="eval",
            )
        )


def test_raise_policy_stops_at_the_first_bad_sample(tokenizer, tmp_path):
    path = bad_corpus(tmp_path)
    with pytest.raises(AudioError, match=r"missing\.wav does not exist.*'bad0', record 0"):
        next(batches_of(path, tokenizer, split="eval"))


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"sequence_length": 100}, "sequence_length"),
        ({"chunks_per_row": 1}, "chunks_per_row"),
        ({"answers_per_row": 3}, "answers_per_row"),
        ({"mel_buckets": (30,)}, "mel_buckets"),
    ],
)
def test_a_sample_too_big_for_a_row_names_the_setting_to_raise(
    corpus, tokenizer, settings, setting
):
    with pytest.raises(DataError, match=f"raise `{setting}`"):
        list(batches_of(corpus, tokenizer, **settings))


@pytest.mark.parametrize(
    ("settings", "layout", "problem"),
    [
        ({}, AudioLayout(mode="padded", mel_bins=8), r"set it to \(3000,\)"),
        ({"rows": 3, "lanes": 2, "mel_buckets": (150,)}, LAYOUT, "not a multiple of `lanes` = 2"),
        ({"lanes": 2}, LAYOUT, "one program needs one shape"),
        ({"window": 3, "rows": 4}, LAYOUT, "rows would stay empty"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, layout, problem):
    with pytest.raises(ConfigError, match=problem):
        DataConfig(**{**SHAPE, **settings}).check(layout)


@pytest.mark.parametrize(
    "setting",
    [
        {"rows": 0},
        {"epochs": 0.0},
        {"num_workers": -1},
        {"mel_buckets": (300, 200)},
        {"mel_buckets": (3001,)},
        {"max_quarantined_share": 2.0},
    ],
)
def test_impossible_settings_are_refused_by_name(setting):
    with pytest.raises(ConfigError, match=f"`{next(iter(setting))}`"):
        DataConfig(**setting)


def test_quarantine_needs_a_file_and_data_needs_records(tokenizer, tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="hold no records"):
        batches_of(tmp_path / "empty.json", tokenizer)
    with pytest.raises(ConfigError, match="needs a file"):
        batches_of(tmp_path / "empty.json", tokenizer, bad_sample_policy="quarantine")


def test_statistics_report_padding_audio_and_speed(corpus, tokenizer):
    total = PipelineStats()
    for batch in batches_of(corpus, tokenizer):
        used = int((batch.arrays["segment_ids"] > 0).sum())
        assert batch.stats.tokens == used
        assert batch.stats.padding == pytest.approx(1 - used / 1400)
        assert batch.stats.answers == int((batch.arrays["answer_index"] >= 0).sum())
        total.add(batch.stats)
    seconds = sum(
        round(len(np.fromfile(f, np.int16)[22:]) / 16_000, 4) for f in corpus.parent.glob("*.wav")
    )
    assert total.samples == 17
    assert total.audio_seconds == pytest.approx(seconds, abs=1e-2)
    assert 0 < total.padding < 1
    assert total.samples_per_second > 0
    assert total.audio_seconds_per_second > 0


def test_empty_batches_supervise_nothing_and_have_the_same_shapes(corpus, tokenizer):
    shape = BatchShape.of(DataConfig(**SHAPE), LAYOUT, pad_id=tokenizer.pad_token_id)
    empty = empty_batch(shape)
    real = next(batches_of(corpus, tokenizer, mel_buckets=(150,)))
    for name, array in empty.arrays.items():
        assert (array.shape, array.dtype) == (real.arrays[name].shape, real.arrays[name].dtype)
    assert (empty.arrays["answer_index"] == -1).all()
    assert not empty.arrays["segment_ids"].any()
