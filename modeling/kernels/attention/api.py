"""The one attention call of the project: checks, choice of an implementation, and its place on a mesh."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.attention.chunked import chunked_attention, chunked_partial
from llaso_jax.modeling.kernels.attention.cudnn import cudnn_attention
from llaso_jax.modeling.kernels.attention.errors import UnsupportedAttentionError
from llaso_jax.modeling.kernels.attention.pallas_gpu import gpu_attention, gpu_partial
from llaso_jax.modeling.kernels.attention.pallas_tpu import tpu_attention, tpu_partial
from llaso_jax.modeling.kernels.attention.partial import Partial
from llaso_jax.modeling.kernels.attention.reference import reference_attention
from llaso_jax.modeling.kernels.attention.ring import Ring, ring_attention
from llaso_jax.modeling.kernels.attention.splash import splash_attention
from llaso_jax.modeling.kernels.attention.ulysses import check_heads, ulysses_attention
from llaso_jax.sharding.context import check_length, context_plan
from llaso_jax.sharding.rules import (
    LogicalAxes,
    ShardingError,
    constrain,
    parts_of,
    per_device,
    target_device,
)

logger = logging.getLogger(__name__)

Implementation = Literal[
    "auto", "reference", "chunked", "pallas_tpu", "pallas_gpu", "splash", "cudnn"
]
LARGE = 1 << 14
"""Scores of one row and head (S*T) from which on `auto` no longer lets XLA hold them all at once."""

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference_attention,
    "chunked": chunked_attention,
    "pallas_tpu": tpu_attention,
    "pallas_gpu": gpu_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}
PARTIALS: dict[str, Partial] = {
    "chunked": chunked_partial,
    "pallas_tpu": tpu_partial,
    "pallas_gpu": gpu_partial,
}
"""Implementations that ring attention can put together from parts of the keys."""

QUERIES = ("batch", "sequence", "heads", "head_dim")
KEYS = ("batch", "sequence", "kv_heads", "head_dim")
IDS = ("batch", "sequence")
WHOLE_IDS = ("batch", None)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    zigzag: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads.

    A query attends to the keys of its own segment and, when `causal`, to those at its own index or before. A query
    without any such key gets zeros, and no gradient. Where the active rules split the sequence, devices work together
    as they say: `ulysses.py` or `ring.py`.

    Args:
      q: [B, S, N, H] queries.
      k: [B, T, K, H] keys, N a multiple of K.
      v: [B, T, K, H] values.
      causal: index-based causal masking (needs S == T).
      q_segment_ids: i32[B, S], not negative; None = one segment.
      kv_segment_ids: i32[B, T]; None = one segment. Given together with q_segment_ids.
      zigzag: a ring's positions are in the order of `sharding.context.zigzag_order`; index means that before it.
      implementation: one of `IMPLEMENTATIONS`, or `auto`: the first of `preferences` that can do the case. Within a
        ring one of `PARTIALS`.

    Returns:
      [B, S, N, H] in the dtype of q. Softmax runs in f32.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or only one of the segment ids.
      UnsupportedAttentionError: the named implementation cannot do this case.
      ShardingError: a sequence, or heads, that do not split over the devices that hold its parts.
    """
    check_implementation(implementation)
    _check(q, k, causal, q_segment_ids, kv_segment_ids)
    plan = context_plan()
    if zigzag and (plan is None or plan.kind != "ring"):
        raise ValueError("zigzag is the order of a ring, and the active rules have none.")
    scores = q.shape[1] * k.shape[1]
    if plan is not None:
        for length in (q.shape[1], k.shape[1]):
            check_length(length, plan.ranks * (2 if zigzag else 1))
        if plan.kind == "ring":
            scores = LARGE  # rounds have no form that holds all scores at once
    names = (implementation,) if implementation != "auto" else preferences(scores, q.dtype)
    q = constrain(q, *QUERIES)
    k, v = constrain(k, *KEYS), constrain(v, *KEYS)
    arrays = q, k, v, q_segment_ids, kv_segment_ids

    def attempt(name: str) -> jax.Array:
        def compute(q, k, v, q_ids, kv_ids) -> jax.Array:
            masks = {"causal": causal, "q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
            return IMPLEMENTATIONS[name](q, k, v, **masks)

        if plan is None:
            return on_mesh(name, compute, (QUERIES, KEYS, KEYS, IDS, IDS), QUERIES)(*arrays)
        if plan.kind == "ulysses":
            check_heads(q.shape[2] // parts_of("heads"), plan.ranks)
            split, ids = ulysses_attention(compute, plan.ranks), WHOLE_IDS
        else:
            split, ids = ring_attention(Ring(_partial(name), plan.ranks, causal, zigzag)), IDS
        return per_device(split, (QUERIES, KEYS, KEYS, ids, ids), QUERIES)(*arrays)

    out = first_possible([partial(attempt, name) for name in names])
    return constrain(out, *QUERIES)


def _partial(name: str) -> Partial:
    if name not in PARTIALS:
        raise UnsupportedAttentionError(
            f"{name} cannot attend to a part of the keys, as each round of a ring does: choose "
            f"{', '.join(PARTIALS)} or auto, or context-ulysses in sharding.strategy."
        )
    return PARTIALS[name]


def preferences(scores: int, dtype: Any) -> tuple[str, ...]:
    """What `auto` tries in turn, by the platform that is compiled for; `scores` are those of one row and head.

    TPU: pallas_tpu. GPU: pallas_gpu, for other dtypes than f32, which takes it minutes to compile. Then, and on a CPU:
    reference, or chunked from LARGE scores on. A mesh that a kernel cannot be split over (rows or heads that do not
    divide) takes what follows it.
    """
    plain = "chunked" if scores >= LARGE else "reference"
    platform, _ = target_device()
    if platform == "tpu":
        return "pallas_tpu", plain
    if platform == "gpu" and dtype != jnp.float32:
        return "pallas_gpu", plain
    return (plain,)


def first_possible(attempts: Sequence[Callable[[], jax.Array]]) -> jax.Array:
    """The result of the first attempt that can do the case; the last one's error is its own."""
    *others, last = attempts
    for attempt in others:
        try:
            return attempt()
        except (UnsupportedAttentionError, ShardingError) as error:
            logger.info("attention takes the next implementation: %s", error)
    return last()


def on_mesh(
    name: str,
    compute: Callable[..., jax.Array],
    inputs: Sequence[LogicalAxes],
    output: LogicalAxes,
) -> Callable[..., jax.Array]:
    """`compute`, the named implementation, on each device's own rows and heads.

    `reference` is left to XLA's partitioner, and so is `chunked` where rows or heads do not split evenly.
    """
    if name == "reference":
        return compute
    split = per_device(compute, inputs, output)
    if name == "chunked":
        return lambda *arrays: first_possible([partial(split, *arrays), partial(compute, *arrays)])
    return split


def _check(
    q: jax.Array,
    k: jax.Array,
    causal: bool,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads do not split over {k.shape[2]} key/value heads evenly."
        )
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal attention needs equal lengths, got {q.shape[1]} and {k.shape[1]}."
        )
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("give both q_segment_ids and kv_segment_ids, or neither.")


def check_implementation(name: str) -> None:
    """Raise ValueError for a name that no implementation has."""
    names = get_args(Implementation)
    if name not in names:
        raise ValueError(f"attention implementation {name!r}: choose one of {', '.join(names)}.")
