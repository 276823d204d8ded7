"""Which blocks of queries and keys interact: what is above the diagonal or in other segments is never visited."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NONE, SOME, ALL = 0, 1, 2
"""What a block of queries sees of a block of keys: nothing, some entries (a mask is needed), all of them."""
LANES = 128
"""Entries of a vector register's row on a TPU: blocks there are multiples of it."""
FLOOR = -1e30
"""Below every score, and finite: a row that sees no key has weights exp(-inf - FLOOR) = 0, and no NaN."""
Q_PADDING, KV_PADDING = -1, -2
"""Segment ids of padding that a kernel adds: they match nothing."""


class Padded(NamedTuple):
    """Segment ids up to whole blocks: i32[R, S'] and i32[R, T'], R = B, or 1 where all rows are alike.

    NumPy arrays where nothing but lengths decides: block pairs are then worked out while tracing.
    """

    q: Any
    kv: Any


def score_scale(head_dim: int) -> float:
    """1/sqrt(head_dim), and log2(e): kernels compute 2 to the power of a score, as the hardware does."""
    return head_dim**-0.5 * math.log2(math.e)


def even_block(length: int, target: int, multiple: int = LANES) -> int:
    """Block near `target` that cuts `length` into blocks of one size with little padding.

    1500 positions: 2 x 768 for a target of 1024; 1560: 2 x 896; 4096: 4 x 1024.
    """
    count = -(-length // target)
    per_block = -(-length // count)
    return -(-per_block // multiple) * multiple


def whole_blocks(length: int, block: int) -> int:
    """`length` rounded up to a multiple of `block`."""
    return -(-length // block) * block


def pad_ids(
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
) -> Padded:
    """Segment ids of queries and keys up to whole `blocks`; without any, all `lengths` positions are one segment."""

    def of(ids: jax.Array | None, length: int, block: int, filler: int) -> Any:
        known = np.zeros((1, length), np.int32) if ids is None else ids
        room = ((0, 0), (0, whole_blocks(length, block) - length))
        return _like(known).pad(known, room, constant_values=filler).astype(np.int32)

    return Padded(
        of(q_ids, lengths[0], blocks[0], Q_PADDING), of(kv_ids, lengths[1], blocks[1], KV_PADDING)
    )


def relations(ids: Padded, block_q: int, block_kv: int, *, causal: bool) -> Any:
    """i32[R, query blocks, key blocks] of NONE, SOME and ALL.

    Judged by the lowest and highest id of each block, so that a pair may be visited that turns out to have nothing
    in common, never the other way round. Segment 0 counts apart: it pads rows on the right, where it would stretch
    the range of the last block over all segments.
    """
    q, kv = _ranges(ids.q, block_q), _ranges(ids.kv, block_kv)
    overlap = (q.low[:, :, None] <= kv.high[:, None]) & (kv.low[:, None] <= q.high[:, :, None])
    some = overlap | (q.zero[:, :, None] & kv.zero[:, None])
    every = (q.only[:, :, None] == kv.only[:, None]) & (q.only >= 0)[:, :, None]
    if causal:
        q_start, kv_start = (
            np.arange(x.low.shape[1]) * b for x, b in ((q, block_q), (kv, block_kv))
        )
        some &= (q_start[:, None] + block_q > kv_start[None, :])[None]
        every &= (q_start[:, None] >= kv_start[None, :] + block_kv - 1)[None]
    xp = _like(ids.q)
    return xp.where(every, ALL, xp.where(some, SOME, NONE)).astype(np.int32)


def _like(array: Any) -> Any:
    """The library of an array: NumPy for what is known while tracing."""
    return np if isinstance(array, np.ndarray) else jnp


class _Ranges(NamedTuple):
    """Per block [R, count]: lowest and highest id above 0, whether there is a 0, and the id it has throughout or -1."""

    low: Any
    high: Any
    zero: Any
    only: Any


def _ranges(ids: Any, block: int) -> _Ranges:
    xp = _like(ids)
    blocks = ids.reshape(len(ids), -1, block)
    real = blocks > 0
    return _Ranges(
        low=xp.where(real, blocks, np.iinfo(np.int32).max).min(-1),
        high=xp.where(real, blocks, 0).max(-1),
        zero=(blocks == 0).any(-1),
        only=xp.where((blocks == blocks[..., :1]).all(-1), blocks[..., 0], -1),
    )


class Schedule(NamedTuple):
    """Block pairs in the order a kernel visits them, all of one outer block after each other.

    outer: i32[P] the block that results are summed for; inner: i32[R, P] the block to be there beside it;
    kind: i32[R, P] their relation. Pairs of NONE repeat the inner block before them: nothing is fetched.
    """

    outer: jax.Array
    inner: jax.Array
    kind: jax.Array


def schedule(relation: Any, block_q: int, block_kv: int, *, causal: bool, by: str) -> Schedule:
    """Pairs of blocks, `by` "q" or "kv" first; those above the diagonal are not even listed.

    Every outer block is listed at least once, so that each gets a result.
    """
    _, rows, columns = relation.shape
    q, kv = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    listed = np.ones((rows, columns), bool)
    if causal:
        listed = (q + 1) * block_q > kv * block_kv
        # More keys than queries after padding: blocks of keys that no query reaches.
        listed[-1] |= ~listed.any(0)
    q, kv = q[listed], kv[listed]
    if by == "kv":
        turn = np.lexsort((q, kv))
        q, kv = q[turn], kv[turn]
    kind = relation[:, q, kv]
    outer, inner = (q, kv) if by == "q" else (kv, q)
    last = jax.lax.cummax(jnp.where(kind == NONE, 0, np.arange(len(q))[None]), axis=1)
    fetched = jnp.asarray(inner, jnp.int32)[last]
    return Schedule(jnp.asarray(outer, jnp.int32), fetched, jnp.asarray(kind))


class Spans(NamedTuple):
    """Inner blocks that each outer block visits, i32[R, outer blocks] each: from `start` up to `end`.

    Those from `whole` up to `part` are seen entirely; before and after them a mask is needed.
    """

    start: jax.Array
    whole: jax.Array
    part: jax.Array
    end: jax.Array


def spans(relation: Any) -> Spans:
    """For kernels that loop over inner blocks: a range of them, which may hold pairs with nothing in common.

    relation: i32[R, outer blocks, inner blocks].
    """
    index = np.arange(relation.shape[2])[None, None]
    count = relation.shape[2]
    xp = _like(relation)
    some, every = relation != NONE, relation == ALL
    end = xp.where(some, index + 1, 0).max(-1)
    start = xp.minimum(xp.where(some, index, count).min(-1), end)
    whole = xp.minimum(xp.where(every, index, count).min(-1), end)
    part = xp.where(~every & (index > whole[..., None]), index, end[..., None]).min(-1)
    part = xp.minimum(part, end)
    return Spans(*(jnp.asarray(x, jnp.int32) for x in (start, whole, part, end)))
