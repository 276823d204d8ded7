"""Speech read frame by frame: CTC of projected audio frames, with the language model's token embeddings as classes.

A frame's score of a token is its inner product with the token's embedding, of blank that with a vector of its own. A
projector that is trained so speaks the language model's input language before that model is ever run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llaso_jax.modeling.ctc import align, ctc_loss, label_places
from llaso_jax.modeling.dropout import dropout
from llaso_jax.modeling.kernels.chunks import cut, join
from llaso_jax.modeling.speech_lm import Batch, SpeechLM
from llaso_jax.sharding.rules import constrain, gather, parts_of

BLANK = -1
"""In place of a token: nothing new is said."""
SCORES = 2**25
"""Scores that a device works on at a time: 134 MB in f32. Of more frames they are computed again for their gradient."""


@dataclasses.dataclass(frozen=True)
class CTCConfig:
    """What CTC against token embeddings is trained with.

    Attributes:
      negatives: tokens that a step tells its labels from, beside each other: drawn anew for every step, at least
        so many, and one more for every place of `answers_per_row` that holds no new label.
      dropout: share of the entries of projected frames that are zeroed.
      scale: factor on inner products of frames and embeddings: the smaller, the longer frames become.
    """

    negatives: int = 1200
    dropout: float = 0.15
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise ValueError(f"negatives={self.negatives} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} must be positive.")


class CTCSums(NamedTuple):
    """Of a batch.

    rows: f32[B] CTC losses of the samples of each row; labels: i32[] labels they are of;
    unaligned: i32[] samples left out, whose labels are more than their frames can say.
    """

    rows: jax.Array
    labels: jax.Array
    unaligned: jax.Array


class Reading(NamedTuple):
    """What is heard at every frame.

    tokens: i32[B, T] the likeliest token of the vocabulary, or BLANK; segments: i32[B, T] its sample, 0: no frame.
    """

    tokens: jax.Array
    segments: jax.Array


def class_count(vocab_size: int, answers: int, cfg: CTCConfig) -> int:
    """Tokens that frames are scored against in a step with `answers` places for supervised tokens."""
    return min(vocab_size, cfg.negatives + answers)


def sample_classes(
    key: jax.Array, answer_index: jax.Array, answer_token: jax.Array, *, vocab_size: int, count: int
) -> jax.Array:
    """i32[count] distinct tokens, rising: all labels of the batch, and others drawn evenly from the vocabulary.

    Args:
      key: what is drawn; the same on every mesh.
      answer_index, answer_token: i32[..., A] of all rows and micro-batches.
      vocab_size: tokens there are.
      count: see `class_count`; the whole vocabulary where it is that large.
    """
    if count == vocab_size:
        return jnp.arange(vocab_size, dtype=jnp.int32)
    labels = jnp.where(label_places(answer_index), answer_token, vocab_size).reshape(-1)
    draw = jax.random.uniform(key, (vocab_size,))
    draw = draw.at[constrain(labels, None)].set(2.0, mode="drop")  # before all that were drawn
    return jnp.sort(jax.lax.top_k(draw, count)[1])


def ctc_sums(
    model: SpeechLM, blank: jax.Array, batch: Batch, classes: jax.Array, cfg: CTCConfig
) -> CTCSums:
    """CTC loss of a batch among `classes` and blank. The language model is not run.

    Args:
      model: speech-language model.
      blank: f32[D] the vector of blank.
      batch: the batch contract.
      classes: i32[K] distinct tokens, rising, all labels among them.
      cfg: settings; dropout needs an active key (modeling/dropout.py).
    """
    vectors = gather(
        _table(model)[classes].astype(model.language_model.compute.jnp_dtype), (None, "embed")
    )
    return _read(model, blank, batch, cfg, vectors, classes)[0]


def read(
    model: SpeechLM, blank: jax.Array, batch: Batch, cfg: CTCConfig
) -> tuple[CTCSums, Reading]:
    """CTC loss of a batch among the whole vocabulary, and what every frame says."""
    vectors = gather(
        _table(model).astype(model.language_model.compute.jnp_dtype), ("vocab", "embed")
    )
    return _read(model, blank, batch, cfg, vectors, None)


def _table(model: SpeechLM) -> jax.Array:
    return model.language_model.embed_tokens["weight"][...]


def _read(
    model: SpeechLM,
    blank: jax.Array,
    batch: Batch,
    cfg: CTCConfig,
    vectors: jax.Array,
    classes: jax.Array | None,
) -> tuple[CTCSums, Reading]:
    """Among `classes` of these `vectors`; None: all tokens, whose table may have more rows than those."""
    audio = model.audio_frames(batch)
    assert audio is not None, "a batch of CTC has audio"
    plan = align(batch, slots=audio.shape[1])
    frames = jnp.take_along_axis(audio, plan.frame_slots[..., None], axis=1)
    frames = constrain(dropout(frames, cfg.dropout, name="ctc") * cfg.scale, "batch", None, "embed")

    blank_scores = jnp.einsum(
        "BTD,D->BT", frames, blank.astype(frames.dtype), preferred_element_type=jnp.float32
    )
    places = plan.labels if classes is None else jnp.searchsorted(classes, plan.labels)
    label_scores = jnp.einsum(
        "BTD,BND->BTN", frames, vectors[places], preferred_element_type=jnp.float32
    )
    vocab_size = model.cfg.text.vocab_size

    def summary(scores: jax.Array) -> tuple[jax.Array, ...]:
        if classes is not None:
            return (jax.nn.logsumexp(scores, axis=-1),)
        if scores.shape[-1] > vocab_size:
            real = jnp.arange(scores.shape[-1]) < vocab_size
            scores = jnp.where(real[None, None], scores, -1e30)
        return jax.nn.logsumexp(scores, axis=-1), scores.max(-1), scores.argmax(-1)

    total, *best = _over_frames(summary, frames, vectors)
    normalizer = jnp.logaddexp(total, blank_scores)
    rows = ctc_loss(
        label_scores - normalizer[..., None],
        blank_scores - normalizer,
        frame_segments=jnp.where(plan.learnt, plan.frame_segments, 0),
        labels=plan.labels,
        label_segments=plan.label_segments,
    )
    sums = CTCSums(rows, (plan.label_segments > 0).sum(), plan.unaligned.sum())
    tokens = jnp.full_like(plan.frame_segments, BLANK)
    if best:
        score, token = best
        tokens = jnp.where(score > blank_scores, token.astype(jnp.int32), BLANK)
    return sums, Reading(tokens, plan.frame_segments)


def _over_frames(summary: Callable[[jax.Array], Any], frames: jax.Array, vectors: jax.Array) -> Any:
    """`summary` of the scores f32[B, t, K] of frames [B, T, D] with vectors [K, D]: arrays [B, T] of f32[B, t].

    Some frames at a time where all scores together are more than SCORES.
    """

    def part(frames: jax.Array) -> Any:
        return summary(
            jnp.einsum("BTD,KD->BTK", frames, vectors, preferred_element_type=jnp.float32)
        )

    length = frames.shape[1]
    rows = -(-len(frames) // parts_of("batch"))
    chunk = max(1, SCORES // (rows * len(vectors)))
    if length <= chunk:
        return part(frames)
    recomputed = jax.checkpoint(part, prevent_cse=False)
    _, parts = jax.lax.scan(lambda none, some: (none, recomputed(some)), None, cut(frames, chunk))
    return jax.tree.map(lambda chunks: join(chunks, length), parts)
