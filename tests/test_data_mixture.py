"""Mixtures: shares hold in every stretch of every lane, no sample is left out, and a resume goes on with the next."""

import json
from collections import Counter
from itertools import islice

import pytest
from data_corpus import LAYOUT, PROMPT, SHAPE, ask, byte_tokenizer, ids_of

from llaso_jax.data.config import DataConfig, MixtureSource
from llaso_jax.data.mixture import Turns, source_sizes
from llaso_jax.data.pipeline import make_lanes, make_pipeline
from llaso_jax.data.records import RecordSource
from llaso_jax.errors import ConfigError, DataError

WEIGHTS = [
    *((1, 1), (2, 1), (9, 1), (0.1, 0.3), (5, 3, 1), (1.37, 1, 0.63)),
    *((1, 1, 1, 1, 1, 97), (1, 2, 5, 5, 10, 20)),
]
TOKENIZER = byte_tokenizer()
SIZES = {"a": 10, "b": 4, "c": 7}
"""Records of each source; with weights 2, 1 and 1 source b is seen most often."""


# --- whose turn it is -----------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_stretch_of_every_lane_has_the_shares(weights, lanes):
    turns = Turns(weights, lanes=lanes)
    drawn = [turns[i][0] for i in range(200 * lanes)]
    for lane in range(lanes):
        mine = drawn[lane::lanes]
        for source, weight in enumerate(weights):
            behind = [0.0]
            for other in mine:
                behind.append(behind[-1] + (other == source) - weight / sum(weights))
            # Any stretch is off by no more than the highest and the lowest of this walk are apart.
            assert max(behind) - min(behind) < 2, (lane, source)


@pytest.mark.parametrize("lanes", [4, 8, 64])
def test_lanes_take_turns_at_a_rare_source(lanes):
    """Each row of a batch is of some lane: a source of 10 % must not come in all of them at once."""
    turns = Turns((9, 1), lanes=lanes)
    for start in range(0, 50 * lanes, lanes):
        rare = sum(turns[start + lane][0] for lane in range(lanes))
        assert abs(rare - 0.1 * lanes) <= 1


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_source_hands_out_every_number_once_and_in_order(weights, lanes):
    turns = Turns(weights, lanes=lanes)
    numbers: dict[tuple[int, int], list[int]] = {}
    for position in range(400 * lanes):
        source, number = turns[position]
        assert number % lanes == position % lanes
        numbers.setdefault((source, position % lanes), []).append(number)
    assert {source for source, _ in numbers} == set(range(len(weights)))
    for (_, lane), found in numbers.items():
        assert found == list(range(lane, lane + lanes * len(found), lanes))


def test_the_pattern_is_that_of_the_documentation():
    turns = Turns([2, 1], lanes=1)
    assert [turns[i] for i in range(6)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1)]


# --- through the pipeline -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of text-only records for each source."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, size in SIZES.items():
        records = [ask(f"Say {i}", f"{name} {i}", [], id=f"{name}{i}") for i in range(size)]
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def config(folder, *, weights=(2, 1, 1), **settings):
    sources = tuple(
        MixtureSource(name, (str(folder / f"{name}.json"),), weight)
        for name, weight in zip(SIZES, weights, strict=True)
    )
    return DataConfig(**{**SHAPE, "mel_buckets": (50,), "mixture": sources, **settings})


def pipeline(folder, **settings):
    return iter(
        make_pipeline(
            config(folder, **settings),
            split="train",
            tokenizer=TOKENIZER,
            layout=LAYOUT,
            prompt=PROMPT,
        )
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_epochs_count_samples_and_each_source_goes_through_its_own_passes(folder, shuffle):
    total = 4 * sum(SIZES.values())
    counts = Counter(ids_of(pipeline(folder, epochs=4, shuffle=shuffle)))
    assert counts.total() == total
    for (name, size), share in zip(SIZES.items(), (0.5, 0.25, 0.25), strict=True):
        seen = [counts[f"{name}{i}"] for i in range(size)]
        assert abs(sum(seen) - share * total) <= 2
        assert max(seen) - min(seen) <= 1, "a sample comes again only when all others have come"


def test_every_pass_over_a_source_has_an_order_of_its_own(folder):
    order = ids_of(pipeline(folder, epochs=4, packing=False, rows=1, window=1))
    of_b = [i for i in order if i.startswith("b")]
    passes = [tuple(of_b[start : start + 4]) for start in range(0, 16, 4)]
    assert all(len(set(one)) == 4 for one in passes)
    assert len(set(passes)) > 1
    assert order != ids_of(pipeline(folder, epochs=4, packing=False, rows=1, window=1, seed=1))


def test_batches_tell_how_many_samples_of_each_source_they_hold(folder):
    batches = list(pipeline(folder, epochs=3))
    for batch in batches:
        counts = Counter(sample_id[0] for sample_id in ids_of([batch]))
        assert batch.stats.sources == tuple(counts[name] for name in SIZES)
    assert len(batches) > 3


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resume_goes_on_with_the_next_sample(folder, stop):
    expected = [batch.sample_ids for batch in pipeline(folder, epochs=4)]
    first = pipeline(folder, epochs=4)
    before = [batch.sample_ids for batch in islice(first, stop)]
    second = pipeline(folder, epochs=4)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert before + [batch.sample_ids for batch in second] == expected


def test_a_position_in_another_mixture_is_refused(folder):
    state = pipeline(folder).get_state()
    with pytest.raises(
        ConfigError, match=r"mixed a 2(.0)? of 10, b 1(.0)? of 4.* mixed a 1(.0)? of 10"
    ):
        pipeline(folder, weights=(1, 1, 1)).set_state(state)


def test_lanes_together_see_what_one_sees(folder):
    lanes = make_lanes(
        config(folder, epochs=4, rows=4, lanes=4, window=8),
        range(4),
        split="train",
        tokenizer=TOKENIZER,
        layout=LAYOUT,
        prompt=PROMPT,
        quarantine_files={},
    )
    counts = Counter(i for lane in lanes.values() for i in ids_of(iter(lane)))
    assert counts.total() == 4 * sum(SIZES.values())
    for (name, size), share in zip(SIZES.items(), (0.5, 0.25, 0.25), strict=True):
        seen = [counts[f"{name}{i}"] for i in range(size)]
        assert abs(sum(seen) - share * counts.total()) <= 4
        # Lanes reach the next pass at slightly different times.
        assert max(seen) - min(seen) <= 2


@pytest.mark.slow  # a worker process imports JAX
def test_worker_processes_draw_the_same(folder):
    expected = ids_of(pipeline(folder, epochs=2))
    assert ids_of(pipeline(folder, epochs=2, num_workers=1)) == expected


# --- settings -------------------------------------------------------------------------------------


def test_contradictions_are_told(folder):
    with pytest.raises(ConfigError, match="`train_json` and `mixture` both name training files"):
        config(folder, train_json=("x.json",))
    with pytest.raises(ConfigError, match="different names, got a, a"):
        DataConfig(mixture=(MixtureSource("a", ("x",)), MixtureSource("a", ("y",))))
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="`weight` of source 'a' of `mixture` is"):
            MixtureSource("a", ("x",), weight)
    with pytest.raises(ConfigError, match="names no `files`"):
        MixtureSource("a", ())


def test_a_source_that_would_get_nothing_is_told(folder, tmp_path):
    small = config(folder, weights=(1000, 1, 1), epochs=1)
    records = RecordSource(small.training_files)
    assert source_sizes(config(folder), records) == tuple(SIZES.values())
    with pytest.raises(ConfigError, match="source 'b' of `mixture` gets none of them"):
        source_sizes(small, records)
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    lacking = DataConfig(mixture=(MixtureSource("none", (str(empty),)),))
    with pytest.raises(DataError, match="source 'none' of `mixture` holds no records"):
        source_sizes(lacking, RecordSource(lacking.training_files))
