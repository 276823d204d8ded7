"""Connectionist temporal classification (CTC) of packed rows: one recursion over a row, whatever samples share it.

A row is one problem: the frames of all its samples, in order, against the labels of all of them, in order. A state
counts only at frames of its own sample, and at a sample's last frame only if all of its labels are said. So no path
leaves its sample, and the sum over the paths of a row is the product of the sums of its samples, exactly. Nothing has
to be known of how many samples share a row or how long one is, and no sample is padded to the longest.

Sums are kept in f32 as logarithms relative to the likeliest state of each frame: their rounding does not grow with the
row's length, and gradients are as exact in its middle as at its ends. (optax.ctc_loss has a sample in every row, and
adds up the logarithms themselves.)

Source: Graves et al. 2006, "Connectionist Temporal Classification", section 4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_NEVER = -1e30  # the logarithm of 0, as a number that can be added to and differentiated
_NOWHERE = 2**30  # segment of what is not there: after all others


class Alignment(NamedTuple):
    """Frames and labels of packed rows, each in order of their samples, those that are not there last.

    Attributes:
      frame_slots: i32[B, T] audio slots of the frames.
      frame_segments: i32[B, T] their samples; 0: no frame.
      learnt: bool[B, T] frames of samples that can be aligned.
      labels: i32[B, N] of samples that can be aligned.
      label_segments: i32[B, N] their samples; 0: no label.
      unaligned: i32[B] samples of a row that cannot be aligned: they have fewer frames than labels, where two
        equal labels in a row need a frame more between them.
    """

    frame_slots: jax.Array
    frame_segments: jax.Array
    learnt: jax.Array
    labels: jax.Array
    label_segments: jax.Array
    unaligned: jax.Array


def label_places(answer_index: jax.Array) -> jax.Array:
    """bool[..., A]: the supervised tokens that are spoken: of each answer all but the last, which ends the turn.

    Args:
      answer_index: i32[..., A] of the batch contract. The tokens of an answer follow each other.

    Example: [4, 5, 6, 20, 21, -1] -> [True, True, False, True, False, False].
    """
    end = jnp.full_like(answer_index[..., :1], -1)
    following = jnp.concatenate([answer_index[..., 1:], end], axis=-1)
    return (answer_index >= 0) & (following == answer_index + 1)


def align(batch: dict[str, jax.Array], *, slots: int) -> Alignment:
    """Frames and labels of a batch by the contract: positions with an audio slot, and answers without their end.

    Args:
      batch: audio_slot, segment_ids i32[B, S]; answer_index, answer_token i32[B, A]. Segments rise along a row.
      slots: audio slots of a row: there are T = min(S, slots) frames at most.
    """
    index = batch["answer_index"]
    segments = jnp.take_along_axis(batch["segment_ids"], jnp.maximum(index, 0), axis=1)
    segments, labels = _in_order(jnp.where(label_places(index), segments, 0), batch["answer_token"])
    heard = jnp.where(batch["audio_slot"] >= 0, batch["segment_ids"], 0)
    frame_segments, frame_slots = (
        array[:, : min(slots, array.shape[1])]
        for array in _in_order(heard, jnp.maximum(batch["audio_slot"], 0))
    )

    same = segments[:, :, None] == segments[:, None, :]
    first = segments != _shifted(segments)
    repeated = ~first & (labels == _shifted(labels))
    needed = jnp.where(same, 1 + repeated.astype(jnp.int32)[:, None, :], 0).sum(-1)
    of_frames = segments[:, None, :] == frame_segments[:, :, None]  # [B, T, N]
    unfit = (segments > 0) & (of_frames.sum(1) < needed)

    learnt = (frame_segments > 0) & ~(of_frames & unfit[:, None, :]).any(-1)
    label_segments, labels = _in_order(jnp.where(unfit, 0, segments), labels)
    unaligned = (unfit & first).sum(-1)
    return Alignment(frame_slots, frame_segments, learnt, labels, label_segments, unaligned)


def ctc_loss(
    label_scores: jax.Array,
    blank_scores: jax.Array,
    *,
    frame_segments: jax.Array,
    labels: jax.Array,
    label_segments: jax.Array,
) -> jax.Array:
    """Negative log-likelihood of the labels of all samples of each row, f32[B]; 0 where there are none.

    Every sample has to have as many frames as its labels need (`align`).

    Args:
      label_scores: f32[B, T, N] log-probability of each label at each frame.
      blank_scores: f32[B, T] log-probability of blank.
      frame_segments: i32[B, T] sample of each frame, rising along the row; frames of 0 are passed over.
      labels: i32[B, N] classes of the labels.
      label_segments: i32[B, N] their samples, rising; 0, at the end only: no label.
    """
    rows, count = labels.shape
    own = jnp.where(label_segments > 0, label_segments, _NOWHERE)
    # Blank n stands before label n, blank N after the last.
    before = jnp.pad(own, ((0, 0), (1, 0)))
    after = jnp.pad(own, ((0, 0), (0, 1)), constant_values=_NOWHERE)
    may_follow = (labels != _shifted(labels)) | (own != before[:, :-1])
    following = jnp.pad(frame_segments[:, 1:], ((0, 0), (0, 1)))
    is_last = (frame_segments != following).astype(jnp.int32)

    def step(carry: tuple[jax.Array, ...], frame: tuple[jax.Array, ...]):
        blanks, said, total = carry  # f32[B, N + 1], f32[B, N], f32[B]
        label_score, blank_score, segment, last = frame
        previous = jnp.pad(said, ((0, 0), (1, 0)), constant_values=_NEVER)
        to_blank = _log_sum(blanks, previous) + blank_score[:, None]
        skipped = jnp.where(may_follow, previous[:, :-1], _NEVER)
        to_label = _log_sum(said, blanks[:, :-1], skipped) + label_score
        # At a sample's last frame: only where the next label, if any, is of a later sample.
        here, reached = segment[:, None], (segment + last)[:, None] <= after
        to_blank = jnp.where((before <= here) & reached, to_blank, _NEVER)
        to_label = jnp.where((own == here) & reached[:, 1:], to_label, _NEVER)
        # Any number may be taken out here and added to the total: no gradient goes through it.
        top = jax.lax.stop_gradient(jnp.maximum(to_blank.max(-1), to_label.max(-1)))
        heard = segment > 0
        blanks = jnp.where(heard[:, None], to_blank - top[:, None], blanks)
        said = jnp.where(heard[:, None], to_label - top[:, None], said)
        return (blanks, said, total + jnp.where(heard, top, 0)), None

    start = (
        jnp.full((rows, count + 1), _NEVER).at[:, 0].set(0),
        jnp.full((rows, count), _NEVER),
        jnp.zeros(rows),
    )
    frames = (label_scores, blank_scores, frame_segments, is_last)
    in_time = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), frames)
    (blanks, said, total), _ = jax.lax.scan(step, start, in_time)
    return -(total + jax.nn.logsumexp(jnp.concatenate([blanks, said], axis=1), axis=1))


def _log_sum(*terms: jax.Array) -> jax.Array:
    """log(sum(exp(terms))), for terms that may all be _NEVER."""
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, terms))
    return top + jnp.log(sum(jnp.exp(term - top) for term in terms))


def _shifted(array: jax.Array) -> jax.Array:
    """[B, N] with every entry one place later, 0 first."""
    return jnp.pad(array[:, :-1], ((0, 0), (1, 0)))


def _in_order(segments: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in the order of segments, those of 0 at the end."""
    order = jnp.argsort(jnp.where(segments > 0, segments, _NOWHERE), axis=1, stable=True)
    return jnp.take_along_axis(segments, order, axis=1), jnp.take_along_axis(values, order, axis=1)
