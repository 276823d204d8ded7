"""Attention some queries at a time: plain XLA, on every platform, with memory that grows with S and not with S*T.

One key/value head after the other, so that a chunk of scores stays in a CPU's cache and every product is of two plain
matrices. The backward pass computes the scores again from q, k and the saved logsumexp of each row, as in
FlashAttention (arXiv 2205.14135, algorithm 4): dS = P * (dO V^T - rowsum(dO * O)).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.attention.blocks import FLOOR
from llaso_jax.modeling.kernels.attention.partial import Keys, Partial, Queries
from llaso_jax.modeling.kernels.attention.residuals import named
from llaso_jax.modeling.kernels.chunks import cut, join

CHUNK = 128
"""Most queries of a head whose scores are there at a time."""
LANES = 8
"""Chunks of more queries are a multiple of it: the f32 entries of an AVX register."""
STRIPS = 8
"""Causal queries are cut into at most so many strips, each with the keys up to its end: 56 % of all scores."""


class Head(NamedTuple):
    """What one key/value head of one row works on.

    q: [S, G, H] its group's queries; k, v: [T, H]; q_ids, kv_ids: i32[S], i32[T] segments or None.
    """

    q: Any
    k: Any
    v: Any
    q_ids: Any
    kv_ids: Any


class Options(NamedTuple):
    """What is not an array."""

    causal: bool
    chunk: int


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    chunk: int = CHUNK,
) -> jax.Array:
    """See `llaso_jax.modeling.kernels.attention.attention`. Memory: chunk*N/K*T f32 scores, of one head at a time."""
    options = Options(causal, _even_chunk(q.shape[1], chunk))
    return _attention(q, k, v, q_segment_ids, kv_segment_ids, options)


def _even_chunk(length: int, most: int) -> int:
    """Queries of each chunk, at most `most`, so that the last chunk is about as full as the others."""
    even = -(-length // -(-length // most))
    return min(most, -(-even // LANES) * LANES, length)


def _value(q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any, options: Options) -> jax.Array:
    return _forward(q, k, v, q_ids, kv_ids, options)[0]


def _forward(q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any, options: Options):
    heads = _heads(q, k, v, q_ids, kv_ids)
    out, lse = named(*jax.lax.map(functools.partial(_head_forward, options), heads))
    return _queries_of(out, q.shape), (heads, out, lse)


def _backward(options: Options, saved, d_out: jax.Array):
    heads, out, lse = saved
    batch, length, count, width = d_out.shape
    kv_heads = len(heads.k) // batch
    d_heads = _split(d_out, kv_heads)
    step = functools.partial(_head_backward, options)
    d_q, d_k, d_v = jax.lax.map(step, (heads, out, lse, d_heads))
    d_k, d_v = (_keys_of(x, batch) for x in (d_k, d_v))
    return _queries_of(d_q, (batch, length, count, width)), d_k, d_v, None, None


_attention = jax.custom_vjp(_value, nondiff_argnums=(5,))
_attention.defvjp(_forward, _backward)


def _partial_forward(queries: Queries, keys: Keys, *, causal: bool) -> tuple[jax.Array, jax.Array]:
    q = queries.q
    options = Options(causal, _even_chunk(q.shape[1], CHUNK))
    heads = _heads(q, keys.k, keys.v, queries.ids, keys.ids)
    out, lse = jax.lax.map(functools.partial(_head_forward, options), heads)
    return _queries_of(out, q.shape), _queries_of(lse[..., None], (*q.shape[:3], 1))[..., 0]


def _partial_backward(queries: Queries, keys: Keys, *, causal: bool) -> tuple[jax.Array, ...]:
    q, count = queries.q, keys.k.shape[2]
    options = Options(causal, _even_chunk(q.shape[1], CHUNK))
    heads = _heads(q, keys.k, keys.v, queries.ids, keys.ids)
    lse = _split(queries.lse[..., None], count)[..., 0]
    saved = heads, _split(queries.out, count), lse
    return _backward(options, saved, queries.d_out)[:3]


chunked_partial = Partial(_partial_forward, _partial_backward)


def _heads(q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any) -> Head:
    """All heads of all rows along one new first axis [B*K]. Query head i uses key/value head i // (N/K)."""
    count = k.shape[2]

    def ids(array: Any) -> Any:
        return None if array is None else jnp.repeat(jnp.asarray(array), count, axis=0)

    keys, values = (x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (k, v))
    return Head(_split(q, count), keys, values, ids(q_ids), ids(kv_ids))


def _split(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, S, N, H] -> [B*K, S, G, H]."""
    batch, length, count, width = q.shape
    grouped = q.reshape(batch, length, kv_heads, count // kv_heads, width)
    return jnp.moveaxis(grouped, 2, 1).reshape(batch * kv_heads, length, -1, width)


def _queries_of(heads: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_split`: [B*K, S, G, H] -> [B, S, N, H]."""
    grouped = heads.reshape(shape[0], -1, *heads.shape[1:])
    return jnp.moveaxis(grouped, 1, 2).reshape(shape)


def _keys_of(heads: jax.Array, batch: int) -> jax.Array:
    """[B*K, T, H] -> [B, T, K, H]."""
    return heads.reshape(batch, -1, *heads.shape[1:]).swapaxes(1, 2)


def _strips(length: int, keys: int, options: Options) -> list[tuple[slice, slice]]:
    """Ranges of queries, whole chunks but for the last, and of the keys that they see."""
    if not options.causal:
        return [(slice(0, length), slice(0, keys))]
    chunks = -(-length // options.chunk)
    size = -(-chunks // STRIPS) * options.chunk
    starts = range(0, length, size)
    return [(slice(s, min(s + size, length)), slice(0, min(s + size, length))) for s in starts]


class _Part(NamedTuple):
    """Some queries [chunk, G, H], the indices i32[chunk] they have, and their segments."""

    q: Any
    index: Any
    ids: Any


def _parts(head: Head, queries: slice, chunk: int) -> _Part:
    """A strip's queries, chunk by chunk along a new first axis."""
    index = jnp.arange(queries.start, queries.stop)
    ids = None if head.q_ids is None else _cut(head.q_ids[queries], chunk)
    return _Part(_cut(head.q[queries], chunk), _cut(index, chunk), ids)


def _cut(array: jax.Array, chunk: int) -> jax.Array:
    return cut(array[None], chunk)[:, 0]


def _join(chunks: jax.Array, length: int) -> jax.Array:
    return join(chunks[:, None], length)[0]


def _scores(part: _Part, head: Head, keys: slice, causal: bool) -> jax.Array:
    """f32[chunk, G, T] scores, -inf where a key is not seen."""
    scores = jnp.einsum("SGH,TH->SGT", part.q, head.k[keys], preferred_element_type=jnp.float32)
    scores = scores * head.k.shape[-1] ** -0.5
    seen = None
    if causal:
        seen = part.index[:, None] >= jnp.arange(keys.stop)[None, :]
    if part.ids is not None:
        same = part.ids[:, None] == head.kv_ids[None, keys]
        seen = same if seen is None else same & seen
    return scores if seen is None else jnp.where(seen[:, None], scores, -jnp.inf)


def _head_forward(options: Options, head: Head) -> tuple[jax.Array, jax.Array]:
    """[S, G, H] results, and f32[S, G] logsumexp of the scores (FLOOR where there are none)."""
    results = []
    for queries, keys in _strips(len(head.q), len(head.k), options):

        def step(_, part: _Part, keys: slice = keys):
            scores = _scores(part, head, keys, options.causal)
            top = jnp.maximum(scores.max(-1), FLOOR)
            weights = jnp.exp(scores - top[..., None])
            total = weights.sum(-1)
            total = jnp.where(total == 0, 1, total)
            values = head.v[keys]
            out = jnp.einsum(
                "SGT,TH->SGH",
                weights.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            return None, ((out / total[..., None]).astype(head.q.dtype), top + jnp.log(total))

        _, chunks = jax.lax.scan(step, None, _parts(head, queries, options.chunk))
        results.append([_join(x, queries.stop - queries.start) for x in chunks])
    out, lse = (jnp.concatenate(x) for x in zip(*results, strict=True))
    return out, lse


def _head_backward(options: Options, saved: tuple[Head, jax.Array, jax.Array, jax.Array]):
    """Gradients [S, G, H], [T, H] and [T, H] of a head's q, k and v."""
    head, out, lse, d_out = saved
    # f32[S, G]: what softmax's gradient subtracts from every score of a row.
    mean = jnp.einsum("SGH,SGH->SG", out, d_out, preferred_element_type=jnp.float32)
    sums = jnp.zeros(head.k.shape, jnp.float32), jnp.zeros(head.v.shape, jnp.float32)
    d_q = []
    for queries, keys in _strips(len(head.q), len(head.k), options):
        rows = tuple(_cut(x[queries], options.chunk) for x in (d_out, lse, mean))

        def step(sums, parts, keys: slice = keys):
            part, (d_out, lse, mean) = parts
            d_k, d_v = sums
            scores = _scores(part, head, keys, options.causal)
            weights = jnp.exp(scores - lse[..., None])
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_v += product("SGT,SGH->TH", weights.astype(head.v.dtype), d_out)
            d_weights = product("SGH,TH->SGT", d_out, head.v[keys])
            d_scores = weights * (d_weights - mean[..., None]) * head.k.shape[-1] ** -0.5
            d_scores = d_scores.astype(head.q.dtype)
            d_k += product("SGT,SGH->TH", d_scores, part.q)
            d_q = product("SGT,TH->SGH", d_scores, head.k[keys]).astype(head.q.dtype)
            return (d_k, d_v), d_q

        seen = tuple(x[keys] for x in sums)
        seen, chunks = jax.lax.scan(step, seen, (_parts(head, queries, options.chunk), rows))
        sums = tuple(x.at[keys].set(y) for x, y in zip(sums, seen, strict=True))
        d_q.append(_join(chunks, queries.stop - queries.start))
    d_k, d_v = sums
    return jnp.concatenate(d_q), d_k.astype(head.k.dtype), d_v.astype(head.v.dtype)
