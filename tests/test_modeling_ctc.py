"""CTC of packed rows is torch's CTC of their samples, and against token embeddings that of all their scores."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import jit
from tolerances import LEAF, assert_close, difference

from llaso_jax.modeling import token_ctc
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.ctc import Alignment, align, ctc_loss, label_places
from llaso_jax.modeling.dropout import use_dropout
from llaso_jax.modeling.token_ctc import (
    BLANK,
    CTCConfig,
    CTCSums,
    class_count,
    ctc_sums,
    read,
    sample_classes,
)


class Sample(NamedTuple):
    """f32[T, K + 1] logits, the last of blank; labels below K."""

    logits: np.ndarray
    labels: list[int]


def sample(frames: int, labels: list[int], *, seed: int = 0) -> Sample:
    """Random scores of five labels and blank."""
    rng = np.random.default_rng([seed, frames, *labels])
    return Sample(2 * rng.standard_normal((frames, 6)).astype(np.float32), labels)


def torch_loss(one: Sample) -> tuple[float, np.ndarray]:
    """(loss, its gradient with respect to the logits), in float64."""
    logits = torch.tensor(one.logits, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1)[:, None],
        torch.tensor([one.labels], dtype=torch.long),
        torch.tensor([len(one.logits)]),
        torch.tensor([len(one.labels)]),
        blank=one.logits.shape[1] - 1,
        reduction="sum",
    )
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad.numpy()


def packed(
    rows: list[list[Sample]], *, count: int = 6, frames: int = 42, places: int = 22
) -> dict[str, np.ndarray]:
    """Logits and alignment of rows of samples, padded to one shape: it is compiled once."""
    out = {
        "logits": np.zeros((count, frames, 6), np.float32),
        "frame_segments": np.zeros((count, frames), np.int32),
        "labels": np.zeros((count, places), np.int32),
        "label_segments": np.zeros((count, places), np.int32),
    }
    for b, row in enumerate(rows):
        t = n = 0
        for segment, one in enumerate(row, 1):
            end, last = t + len(one.logits), n + len(one.labels)
            out["logits"][b, t:end], out["frame_segments"][b, t:end] = one.logits, segment
            out["labels"][b, n:last], out["label_segments"][b, n:last] = one.labels, segment
            t, n = end, last
    return out


def losses_of(logits: Any, **alignment: Any) -> jax.Array:
    scores = jax.nn.log_softmax(logits)
    labels = jnp.broadcast_to(
        alignment["labels"][:, None], (*scores.shape[:2], alignment["labels"].shape[1])
    )
    of_labels = jnp.take_along_axis(scores, labels, axis=-1)
    return ctc_loss(of_labels, scores[..., -1], **alignment)


def losses_and_gradients(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return jax.tree.map(np.asarray, _losses_and_gradients(arrays))


@jit
def _losses_and_gradients(arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    alignment = dict(arrays)
    logits = alignment.pop("logits")

    def total(logits: Any) -> tuple[jax.Array, jax.Array]:
        rows = losses_of(logits, **alignment)
        return rows.sum(), rows

    (_, rows), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    return rows, gradient


def check(rows: list[list[Sample]], tolerance: float = LEAF) -> None:
    arrays = packed(rows)
    losses, gradients = losses_and_gradients(arrays)
    expected = np.zeros_like(arrays["logits"])
    for b, row in enumerate(rows):
        t, total = 0, 0.0
        for one in row:
            loss, gradient = torch_loss(one)
            expected[b, t : t + len(gradient)] = gradient
            t, total = t + len(gradient), total + loss
        assert float(losses[b]) == pytest.approx(total, rel=tolerance)
    assert_close(gradients, expected, tolerance, "gradients")


# --- the recursion --------------------------------------------------------------------------------


def test_a_sample_a_row_is_torchs_ctc():
    labels = [[1], [1, 2], [3, 3], [0, 0, 0], [4, 1, 1, 2], [2, 3, 2, 3, 2]]
    check([[sample(frames, one)] for frames, one in zip((1, 2, 3, 5, 9, 12), labels, strict=True)])


def test_a_packed_row_is_the_sum_of_its_samples():
    """Equal labels on both sides of a border, samples as short as they can be, and one that says nothing."""
    rows = [
        [sample(4, [1, 2]), sample(6, [2, 2, 3]), sample(1, [3]), sample(5, [0])],
        [sample(3, [4, 4]), sample(3, []), sample(8, [4, 1]), sample(2, [1, 0])],
        [sample(9, [1, 1, 1, 1])],
    ]
    check(rows)


@pytest.mark.slow
def test_rounding_does_not_grow_with_the_row():
    """24 samples in a row of 1,440 frames: the logarithm of their likelihood is below -2,000."""
    rng = np.random.default_rng(0)
    row = [sample(60, rng.integers(0, 5, 12).tolist(), seed=i) for i in range(24)]
    arrays = packed([row], count=1, frames=1440, places=288)
    losses, gradients = losses_and_gradients(arrays)
    expected = [torch_loss(one) for one in row]
    assert sum(loss for loss, _ in expected) > 2000
    assert float(losses[0]) == pytest.approx(sum(loss for loss, _ in expected), rel=1e-6)
    assert_close(gradients[0, :1440], np.concatenate([g for _, g in expected]), LEAF)


def test_padding_costs_nothing_and_has_no_gradient():
    losses, gradients = losses_and_gradients(packed([[sample(4, [1, 2])]]))
    assert losses[0] > 0
    assert np.all(losses[1:] == 0)
    assert np.all(gradients[1:] == 0)
    assert np.all(gradients[0, 4:] == 0)


def test_a_label_that_is_all_but_impossible_has_a_finite_loss_and_gradient():
    """Where products of probabilities would be 0: 200 nats against each of 20 labels."""
    logits = np.zeros((40, 6), np.float32)
    logits[:, 5] = 200
    losses, gradients = losses_and_gradients(packed([[Sample(logits, [0, 1] * 10)]]))
    expected, _ = torch_loss(Sample(logits, [0, 1] * 10))
    assert float(losses[0]) == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(gradients).all()


# --- frames and labels of a batch -----------------------------------------------------------------


POSITIONS, PLACES = 26, 12
_align = jit(functools.partial(align, slots=POSITIONS - 1))


def alignment_of(*, segments: Any, slots: Any, index: Any, tokens: Any) -> Alignment:
    """Of one row, padded to one shape."""

    def padded(values: Any, length: int, fill: int) -> np.ndarray:
        return np.pad(
            np.asarray(values, np.int32), (0, length - len(values)), constant_values=fill
        )[None]

    found = _align(
        {
            "segment_ids": padded(segments, POSITIONS, 0),
            "audio_slot": padded(slots, POSITIONS, -1),
            "answer_index": padded(index, PLACES, -1),
            "answer_token": padded(tokens, PLACES, 0),
        }
    )
    return jax.tree.map(lambda array: np.asarray(array)[0], found)


def test_labels_are_answers_without_their_ends():
    index = np.array([[4, 5, 6, 20, 21, 30, 41, 42, -1, -1]])
    expected = [True, True, False, True, False, False, True, False, False, False]
    assert np.asarray(jit(label_places)(index))[0].tolist() == expected


def test_frames_and_labels_by_hand():
    """Three samples: one of two answers, one with a label too many, one without audio; audio slots out of order."""
    # 5 frames, "7 7" and "7": two repetitions need 5 frames; then 2 frames, "8 8"; then "9".
    plan = alignment_of(
        segments=[1] * 14 + [2] * 7 + [3] * 3,
        slots=[-1, 4, 3, 2, 1, 0] + [-1] * 9 + [6, 5],
        index=[6, 7, 8, 11, 12, 17, 18, 19, 22, 23],
        tokens=[7, 7, 1, 7, 1, 8, 8, 1, 9, 1],
    )
    assert plan.frame_slots[:7].tolist() == [4, 3, 2, 1, 0, 6, 5]
    assert plan.frame_segments[:8].tolist() == [1] * 5 + [2, 2, 0]
    assert plan.learnt.tolist() == [True] * 5 + [False] * 20
    assert plan.labels[:3].tolist() == [7, 7, 7]
    assert plan.label_segments.tolist() == [1, 1, 1] + [0] * 9
    assert plan.unaligned == 2  # the one without audio too
    assert len(plan.frame_slots) == POSITIONS - 1, "no more frames than slots are walked through"


def test_a_sample_in_the_middle_that_cannot_be_aligned_leaves_its_neighbours_as_they_are():
    plan = alignment_of(
        segments=[1] * 6 + [2] * 4 + [3] * 5,
        slots=[0, 1, 2, -1, -1, -1, 3, -1, -1, -1, 4, 5],
        index=[3, 4, 6, 7, 8, 12, 13],
        tokens=[5, 1, 6, 6, 1, 5, 1],
    )
    assert plan.labels[:2].tolist() == [5, 5]
    assert plan.label_segments.tolist() == [1, 3] + [0] * 10
    assert plan.learnt[:6].tolist() == [True] * 3 + [False] + [True] * 2
    assert plan.unaligned == 1


# --- token embeddings as classes ------------------------------------------------------------------

VOCABULARY, STORED, WIDTH = 45, 48, 32
PLAIN = CTCConfig(negatives=1000, dropout=0.0)
# Two samples a row: frames and labels of each. The last cannot be aligned.
SAMPLES = (
    ((6, [3, 9]), (12, [9, 9, 4])),
    ((12, [40, 41, 42, 43]), (6, [7])),
    ((12, [5] * 6), (1, [8, 8])),
)
LABELS = {token for row in SAMPLES for _, labels in row for token in labels}
END = 44


class Inputs(NamedTuple):
    """Projected frames [B, C*T, D], table of embeddings, vector of blank, and a batch without mel."""

    audio: np.ndarray
    table: np.ndarray
    blank: np.ndarray
    batch: dict[str, np.ndarray]


@functools.cache
def inputs() -> Inputs:
    rng = np.random.default_rng(1)
    batch = {
        name: np.full((3, 32), fill, np.int32)
        for name, fill in (("segment_ids", 0), ("audio_slot", -1))
    }
    batch |= {
        name: np.full((3, 12), fill, np.int32)
        for name, fill in (("answer_index", -1), ("answer_token", 0))
    }
    for b, row in enumerate(SAMPLES):
        place = slot = answer = 0
        for segment, (frames, labels) in enumerate(row, 1):
            spoken = [*labels, END]
            after = place + frames + len(spoken)
            batch["segment_ids"][b, place:after] = segment
            batch["audio_slot"][b, place : place + frames] = range(slot, slot + frames)
            batch["answer_index"][b, answer : answer + len(spoken)] = range(
                place + frames - 1, after - 1
            )
            batch["answer_token"][b, answer : answer + len(spoken)] = spoken
            place, slot, answer = after, slot + frames, answer + len(spoken)
    batch |= {"mel": np.zeros(0), "mel_frames": np.zeros(0)}
    return Inputs(
        audio=rng.standard_normal((3, 20, WIDTH)).astype(np.float32),
        table=rng.standard_normal((STORED, WIDTH)).astype(np.float32) / 2,
        blank=rng.standard_normal(WIDTH).astype(np.float32),
        batch=batch,
    )


def model_of(audio: Any, table: Any) -> Any:
    """What of a speech-language model is read: its projected frames and its token embeddings."""
    return SimpleNamespace(
        audio_frames=lambda batch: audio,
        language_model=SimpleNamespace(
            embed_tokens={"weight": jnp.asarray(table)}, compute=ComputeConfig()
        ),
        cfg=SimpleNamespace(text=SimpleNamespace(vocab_size=VOCABULARY)),
    )


@functools.cache
def sums_and_gradients(classes: tuple[int, ...], scores: int = 2**20) -> tuple[CTCSums, Any]:
    """And gradients of frames and blank; `scores`: so many at a time."""
    audio, table, blank, batch = inputs()

    def total(audio: Any, blank: Any) -> tuple[jax.Array, CTCSums]:
        sums = ctc_sums(model_of(audio, table), blank, batch, jnp.asarray(classes), PLAIN)
        return sums.rows.sum(), sums

    with patch.object(token_ctc, "SCORES", scores):
        run = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, sums), gradients = jax.tree.map(np.asarray, run(audio, blank))
    return sums, gradients


def everything() -> np.ndarray:
    return np.arange(VOCABULARY, dtype=np.int32)


def samples_among(classes: np.ndarray) -> list[list[Sample]]:
    """From the projected frames, sample by sample in NumPy."""
    audio, table, blank, _ = inputs()
    vectors = np.concatenate([table[classes], blank[None]])
    place = {int(token): i for i, token in enumerate(classes)}
    found: list[list[Sample]] = []
    for heard, row in zip(audio, SAMPLES, strict=True):
        scores, start = heard @ vectors.T, 0
        found.append([])
        for frames, labels in row:
            found[-1].append(Sample(scores[start : start + frames], [place[t] for t in labels]))
            start += frames
    return found


def expected_rows(classes: np.ndarray) -> list[float]:
    (a, b), (c, d), (e, _) = samples_among(classes)
    return [sum(torch_loss(one)[0] for one in row) for row in ((a, b), (c, d), (e,))]


@pytest.mark.parametrize(
    "classes",
    [
        everything(),
        pytest.param(np.array(sorted({*LABELS, 1, 20, 30})), marks=pytest.mark.slow),
    ],
    ids=["all", "some"],
)
def test_it_is_plain_ctc_of_the_scores_of_its_classes(classes):
    """With the whole vocabulary: of all scores there are."""
    sums, (gradient, of_blank) = sums_and_gradients(tuple(classes.tolist()))
    np.testing.assert_allclose(sums.rows, expected_rows(classes), rtol=LEAF)
    assert (int(sums.labels), int(sums.unaligned)) == (2 + 3 + 4 + 1 + 6, 1)
    vectors = np.concatenate([inputs().table[classes], inputs().blank[None]])
    expected, of_scores = np.zeros_like(inputs().audio), np.zeros(WIDTH)
    for b, row in enumerate(samples_among(classes)):
        start = 0
        for one in row[: 1 if b == 2 else 2]:
            _, d_scores = torch_loss(one)
            frames = slice(start, start + len(d_scores))
            expected[b, frames] = d_scores @ vectors
            of_scores += d_scores[:, -1] @ inputs().audio[b, frames]
            start = frames.stop
    assert_close(gradient, expected, LEAF, "gradient of the frames")
    assert_close(of_blank, of_scores, LEAF, "gradient of blank")
    assert not np.any(gradient[2, 12]), "the frame of a sample that cannot be aligned"


@pytest.mark.slow
def test_scores_of_some_frames_at_a_time_give_the_same():
    classes = tuple(range(VOCABULARY))
    expected = sums_and_gradients(classes)
    actual = sums_and_gradients(classes, 3 * VOCABULARY * 6)  # 20 frames: 6, 6, 6 and 2
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(ours, theirs, LEAF)


def test_reading_takes_the_likeliest_of_the_whole_vocabulary_and_blank():
    audio, table, blank, batch = inputs()
    sums, reading = jit(lambda audio: read(model_of(audio, table), blank, batch, PLAIN))(audio)
    np.testing.assert_allclose(sums.rows, expected_rows(everything()), rtol=LEAF)
    said = []
    for b, row in enumerate(samples_among(everything())):
        for segment, one in enumerate(row, 1):
            best = one.logits.argmax(-1)
            tokens = np.asarray(reading.tokens)[b][np.asarray(reading.segments)[b] == segment]
            assert tokens.tolist() == np.where(best == VOCABULARY, BLANK, best).tolist()
            said += tokens.tolist()
    assert BLANK in said
    assert len(set(said)) > 10


# Field -> another value. A field missing here fails the test.
CHANGES = {"negatives": 5, "dropout": 0.5, "scale": 0.5}


def test_every_setting_does_something():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(CTCConfig)}
    audio, table, blank, batch = inputs()
    base = CTCConfig(negatives=10, dropout=0.1)
    settings = {"": base}
    settings |= {field: dataclasses.replace(base, **{field: CHANGES[field]}) for field in CHANGES}
    classes = {field: drawn(3, class_count(VOCABULARY, 12, cfg)) for field, cfg in settings.items()}

    @jit
    def rows() -> dict[str, jax.Array]:
        with use_dropout(jax.random.key(0)):
            return {
                field: ctc_sums(model_of(audio, table), blank, batch, classes[field], cfg).rows
                for field, cfg in settings.items()
            }

    found = rows()
    for field in CHANGES:
        assert difference(found[field], found[""]) > 1e-3, field


@pytest.mark.parametrize(
    "wrong", [{"negatives": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"scale": 0.0}], ids=str
)
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        CTCConfig(**wrong)


# --- classes of a step ----------------------------------------------------------------------------


@functools.partial(jit, static_argnames="count")
def drawn_by(keys: Any, count: int) -> jax.Array:
    answers = (inputs().batch[name] for name in ("answer_index", "answer_token"))
    one = functools.partial(sample_classes, vocab_size=VOCABULARY, count=count)
    index, token = map(jnp.asarray, answers)
    return jax.vmap(lambda key: one(key, index, token))(keys)


def drawn(key: int, count: int) -> np.ndarray:
    return np.asarray(drawn_by(jax.random.key(key)[None], count))[0]


def test_classes_are_all_labels_and_others_without_repetition():
    for key in range(5):
        classes = drawn(key, 22)
        assert (np.diff(classes) > 0).all()
        assert set(classes.tolist()) >= LABELS
        assert classes.min() >= 0
        assert classes.max() < VOCABULARY
    np.testing.assert_array_equal(drawn(1, 22), drawn(1, 22))
    assert (drawn(1, 22) != drawn(2, 22)).any()
    assert drawn(0, VOCABULARY).tolist() == list(range(VOCABULARY))
    assert class_count(VOCABULARY, 36, PLAIN) == VOCABULARY
    assert class_count(49152, 36, CTCConfig()) == 1236


def test_every_other_token_is_drawn_as_often():
    draws = drawn_by(jax.random.split(jax.random.key(0), 400), 17)
    counts = np.bincount(np.asarray(draws).reshape(-1), minlength=VOCABULARY)
    others = np.array([counts[token] for token in range(VOCABULARY) if token not in LABELS])
    assert all(counts[token] == 400 for token in LABELS)
    # Binomial: 7 of 35 others in each of 400 draws, standard deviation 8.
    assert np.abs(others - 80).max() < 4 * 8
