"""The batch contract: what is in every array, for every audio mode, packed or not."""

import json

import numpy as np
import pytest
import soundfile as sf
from data_corpus import PROMPT, ask, batches_of, byte_tokenizer, write_corpus

from llaso_jax.data.config import AudioLayout, DataConfig
from llaso_jax.data.log_mel import log_mel, pad_mel
from llaso_jax.data.packing import BatchShape, Row, assemble, first_fit
from llaso_jax.data.records import RecordSource
from llaso_jax.data.samples import BadSample, SampleLoader, SampleSource
from llaso_jax.modeling.frames import AUDIO_MODES, projected_frames

BUCKETS = {"padded": (3000,), "trimmed": (3000,), "true_length": (50, 150)}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), samples=9)


def loader(tokenizer, layout, **settings):
    return SampleLoader(tokenizer, prompt=PROMPT, layout=layout, **settings)


def samples(corpus, tokenizer, layout):
    source = SampleSource(RecordSource([corpus]), loader(tokenizer, layout))
    return {sample.sample_id: sample for sample in (source[i] for i in range(len(source)))}


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("mode", AUDIO_MODES)
def test_every_segment_of_a_batch_is_its_sample(corpus, tokenizer, mode, stack):
    layout = AudioLayout(mode=mode, stack=stack, mel_bins=8)
    expected = samples(corpus, tokenizer, layout)
    sizes = {"sequence_length": 6400, "answers_per_row": 60, "mel_buckets": BUCKETS[mode]}
    for batch in batches_of(corpus, tokenizer, layout=layout, **sizes):
        arrays = batch.arrays
        per_chunk = projected_frames(arrays["mel"].shape[-1], stack=stack)
        assert arrays["mel"].shape[-1] in BUCKETS[mode]
        for b, row_ids in enumerate(batch.sample_ids):
            row = {name: array[b] for name, array in arrays.items()}
            assert sorted(set(row["segment_ids"])) == sorted({0, *range(len(row_ids) + 1)})
            chunk = 0
            for segment, sample_id in enumerate(row_ids, 1):
                sample = expected[sample_id]
                places = np.flatnonzero(row["segment_ids"] == segment)
                assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
                assert np.array_equal(row["tokens"][places], sample.tokens)
                assert np.array_equal(row["positions"][places], np.arange(len(places)))
                # audio: every slot points at its own chunk and frame
                audio = sample.slot_chunk >= 0
                slots = row["audio_slot"][places]
                assert np.array_equal(slots >= 0, audio)
                assert np.array_equal(slots[audio] // per_chunk - chunk, sample.slot_chunk[audio])
                assert np.array_equal(slots[audio] % per_chunk, sample.slot_frame[audio])
                for i, mel in enumerate(sample.mels):
                    F = arrays["mel"].shape[-1]
                    assert np.array_equal(row["mel"][chunk + i], pad_mel(mel, F))
                    assert row["mel_frames"][chunk + i] == sample.mel_frames[i]
                # answers: the next token of each position is supervised
                mine = np.isin(row["answer_index"], places)
                index = row["answer_index"][mine]
                assert np.array_equal(index - places[0], sample.answer_index)
                assert np.array_equal(row["tokens"][index + 1], row["answer_token"][mine])
                chunk += len(sample.mels)
            assert not row["mel_frames"][chunk:].any()
            assert (row["audio_slot"][row["segment_ids"] == 0] == -1).all()
            assert (row["answer_index"] >= 0).sum() == sum(
                len(expected[i].answer_token) for i in row_ids
            )


def test_batch_has_exactly_the_arrays_of_the_contract(corpus, tokenizer):
    arrays = next(batches_of(corpus, tokenizer)).arrays
    frames = arrays["mel"].shape[-1]
    assert {name: (a.shape, str(a.dtype)) for name, a in arrays.items()} == {
        "tokens": ((2, 700), "int32"),
        "audio_slot": ((2, 700), "int32"),
        "positions": ((2, 700), "int32"),
        "segment_ids": ((2, 700), "int32"),
        "mel": ((2, 4, 8, frames), "float32"),
        "mel_frames": ((2, 4), "int32"),
        "answer_index": ((2, 60), "int32"),
        "answer_token": ((2, 60), "int32"),
    }


def test_supervised_tokens_of_a_batch_are_its_answers(corpus, tokenizer):
    for batch in batches_of(corpus, tokenizer):
        for row, ids in enumerate(batch.sample_ids):
            used = batch.arrays["answer_index"][row] >= 0
            text = tokenizer.decode(batch.arrays["answer_token"][row][used])
            assert text == "".join(f"answer {i[1:]}<|im_end|>" for i in ids)


def test_rows_respect_every_limit_and_packing_shares_them(corpus, tokenizer):
    packed = list(batches_of(corpus, tokenizer, mel_buckets=(150,)))
    alone = list(batches_of(corpus, tokenizer, mel_buckets=(150,), packing=False))
    assert len(packed) < len(alone)
    assert max(len(row) for b in packed for row in b.sample_ids) > 1


def test_first_fit_fills_earlier_rows_first(corpus, tokenizer):
    layout = AudioLayout(mode="true_length", mel_bins=8)
    items = list(samples(corpus, tokenizer, layout).values())
    config = DataConfig(sequence_length=450, rows=2, mel_buckets=(150,), answers_per_row=25)
    shape = BatchShape.of(config, layout, pad_id=0)
    rows, placed = first_fit(items, shape)
    assert placed[0] == 0
    assert sum(len(row.samples) for row in rows) == len(placed)
    for i, item in enumerate(items):
        if i not in placed:  # it fits no row, even at the end
            assert not any(row.fits(item, shape) for row in rows)


def test_slots_beyond_a_chunk_are_caught_before_they_reach_the_model(corpus, tokenizer):
    layout = AudioLayout(mode="true_length", mel_bins=8)
    sample = samples(corpus, tokenizer, layout)["s0"]
    shape = BatchShape.of(DataConfig(mel_buckets=(150,)), layout, pad_id=0)
    row = Row()
    row.add(sample)
    with pytest.raises(AssertionError, match="of a chunk that has 10 frames"):
        assemble([row], shape, mel_frames=20)


def test_long_audio_becomes_chunks_of_30_seconds_in_order(tokenizer, tmp_path):
    wave = (0.1 * np.random.default_rng(0).standard_normal(16_000 * 65)).astype(np.float32)
    sf.write(tmp_path / "long.wav", wave, 16_000, subtype="FLOAT")
    sf.write(tmp_path / "short.wav", wave[:8000], 16_000, subtype="FLOAT")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([ask("A<audio>B<audio>", "c", ["long.wav", "short.wav"])]))
    for mode, slots in (
        ("padded", [1500] * 4),
        ("trimmed", [1500, 1500, 250, 25]),
        ("true_length", [1500, 1500, 250, 25]),
    ):
        sample = loader(tokenizer, AudioLayout(mode=mode, mel_bins=8)).load(RecordSource([path])[0])
        assert sample.mel_frames.tolist() == [3000, 3000, 500, 50]
        assert [int((sample.slot_chunk == c).sum()) for c in range(4)] == slots
        assert (np.diff(sample.slot_chunk[sample.slot_chunk >= 0]) >= 0).all()
        assert sample.audio_seconds == 65.5
        second = log_mel(wave[480_000:960_000], mel_bins=8)
        np.testing.assert_array_equal(sample.mels[1], second)


def test_truncated_audio_is_recorded_in_the_sample(corpus, tokenizer):
    layout = AudioLayout(mode="trimmed", mel_bins=8)
    record = RecordSource([corpus])[0]
    whole = loader(tokenizer, layout).load(record)
    cut = loader(tokenizer, layout, max_audio_seconds=0.5, audio_policy="truncate").load(record)
    assert (cut.audio_seconds, cut.mel_frames.tolist()) == (0.5, [50])
    assert cut.seconds_dropped == pytest.approx(whole.audio_seconds - 0.5)
    source = SampleSource(RecordSource([corpus]), loader(tokenizer, layout, max_audio_seconds=0.5))
    assert isinstance(source[0], BadSample)
    assert "`max_audio_seconds` is 0.5" in str(source[0].error)
