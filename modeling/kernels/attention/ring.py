"""Ring attention (arXiv 2310.01889): queries stay, keys and values of all other parts come by, one part at a time.

Each device holds its part of every row. In round 0 it attends to its own keys; in each further round keys and values
move on by one device, and what a round gives is merged by the logsumexp of its scores. What moves is on its way while
the round before is computed. The backward pass goes round again: gradients of keys and values travel with them, f32,
and arrive home after the last round.

Causal rows in zig-zag order (sharding/context.py) give each device, in each round but the first, two quarters of the
pairs of its positions and those that came: its later half sees the earlier half of any other device, and of the pairs
of equal halves one is seen entirely and the other not at all. So no round needs a causal mask, and none is longer on
one device than on another. Other rows are taken whole in each round; causal ones then cost twice as much.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.attention.partial import Keys, Partial, Queries
from llaso_jax.modeling.kernels.attention.residuals import differentiable, named
from llaso_jax.sharding.context import AXIS, pass_on


class Ring(NamedTuple):
    """What is not an array: `zigzag` says that rows are in that order."""

    partial: Partial
    ranks: int
    causal: bool
    zigzag: bool


def ring_attention(ring: Ring) -> Callable[..., jax.Array]:
    """Attention of a device's part of the queries to all parts of the keys, inside jax.shard_map.

    It takes q [B, S/ranks, N, H], k and v [B, T/ranks, K, H], and the segment ids of these parts, or None twice.
    """

    def attend(q, k, v, q_ids, kv_ids) -> jax.Array:
        return _attention(q, k, v, q_ids, kv_ids, ring)

    return attend


def _forward(q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any, ring: Ring):
    queries, own = Queries(q, q_ids), Keys(k, v, kv_ids)
    coming = pass_on(own, ring.ranks)
    out, lse = ring.partial.forward(queries, own, causal=ring.causal)

    def meet(sums: tuple[jax.Array, jax.Array], keys: Keys, number: Any):
        visit = Visit.of(ring, number)
        more = ring.partial.forward(visit.queries(queries), visit.keys(keys), causal=False)
        return visit.add(sums, more)

    def turn(carry, number: jax.Array):
        sums, keys = carry
        coming = pass_on(keys, ring.ranks)
        return (meet(sums, keys, number), coming), None

    carry = (out.astype(jnp.float32), lse), coming
    (sums, keys), _ = jax.lax.scan(turn, carry, jnp.arange(1, ring.ranks - 1))
    out, lse = meet(sums, keys, ring.ranks - 1)
    out, lse = named(out.astype(q.dtype), lse)
    return out, (Queries(q, q_ids, out, lse), own)


def _backward(ring: Ring, saved: tuple[Queries, Keys], d_out: jax.Array):
    queries, own = saved[0]._replace(d_out=d_out), saved[1]

    def gradients(queries: Queries, keys: Keys, *, causal: bool) -> tuple[jax.Array, ...]:
        parts = ring.partial.backward(queries, keys, causal=causal)
        return tuple(part.astype(jnp.float32) for part in parts)

    def meet(d_q: jax.Array, d_k: jax.Array, d_v: jax.Array, keys: Keys, number: Any):
        visit = Visit.of(ring, number)
        more = gradients(visit.queries(queries), visit.keys(keys), causal=False)
        return (
            d_q + visit.of_queries(more[0]),
            d_k + visit.of_keys(more[1]),
            d_v + visit.of_keys(more[2]),
        )

    coming = pass_on(own, ring.ranks)
    d_q, d_k, d_v = gradients(queries, own, causal=ring.causal)

    def turn(carry, number: jax.Array):
        (d_q, *d_kv), keys = carry
        d_k, d_v = pass_on(d_kv, ring.ranks)
        coming = pass_on(keys, ring.ranks)
        return (meet(d_q, d_k, d_v, keys, number), coming), None

    carry = (d_q, d_k, d_v), coming
    ((d_q, *d_kv), keys), _ = jax.lax.scan(turn, carry, jnp.arange(1, ring.ranks - 1))
    d_k, d_v = pass_on(d_kv, ring.ranks)
    d_q, *d_kv = meet(d_q, d_k, d_v, keys, ring.ranks - 1)
    d_k, d_v = pass_on(d_kv, ring.ranks)  # home
    return d_q.astype(queries.q.dtype), d_k.astype(own.k.dtype), d_v.astype(own.v.dtype)


_attention = differentiable(_forward, _backward)


class Visit(NamedTuple):
    """Which of a device's queries meet which of the keys that have come to it.

    earlier: bool[], the keys are from a device before this one, or their order does not matter.
    halves: rows in zig-zag order: each device's early half comes before the early halves of the devices behind it, and
      before all late ones; its late half comes before the late halves of the devices before it. Two pairs of halves
      meet, one behind the other along the batch: late queries with early keys, and both early ones or both late ones.
    """

    earlier: jax.Array
    halves: bool

    @classmethod
    def of(cls, ring: Ring, number: Any) -> "Visit":
        """In round `number`, of 1 to ranks - 1."""
        if not ring.causal:
            return cls(jnp.bool_(True), halves=False)
        return cls(number <= jax.lax.axis_index(AXIS), ring.zigzag)

    def queries(self, queries: Queries) -> Queries:
        """Those that attend."""
        return self._chosen(queries, first=1)

    def keys(self, keys: Keys) -> Keys:
        """Those they attend to."""
        return self._chosen(keys, first=0)

    def _chosen(self, arrays: Any, *, first: int) -> Any:
        def of(x: jax.Array) -> jax.Array:
            early, late = halves = jnp.split(x, 2, axis=1)
            return jnp.concatenate([halves[first], jnp.where(self.earlier, early, late)])

        return jax.tree.map(of, arrays) if self.halves else arrays

    def of_queries(self, gradient: jax.Array) -> jax.Array:
        """The gradient of `queries` as one of all a device's queries."""
        return self._spread(gradient, first=1)

    def of_keys(self, gradient: jax.Array) -> jax.Array:
        """The gradient of `keys` as one of all the keys that have come."""
        return self._spread(gradient, first=0)

    def _spread(self, gradient: jax.Array, *, first: int) -> jax.Array:
        if not self.halves:
            return jnp.where(self.earlier, gradient, 0)
        one, other = jnp.split(gradient, 2)
        halves = [jnp.where(self.earlier, other, 0), jnp.where(self.earlier, 0, other)]
        halves[first] += one
        return jnp.concatenate(halves, axis=1)

    def add(
        self, sums: tuple[jax.Array, jax.Array], more: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Results and logsumexp of a device's queries, with those of the chosen ones added."""
        if not self.halves:
            return _merge(sums, more, self.earlier)
        early, late = zip(*(jnp.split(x, 2, axis=1) for x in sums), strict=True)
        one, other = zip(*(jnp.split(x, 2) for x in more), strict=True)
        early = _merge(early, other, self.earlier)
        late = _merge(_merge(late, one, True), other, ~self.earlier)
        out, lse = (jnp.concatenate(pair, axis=1) for pair in zip(early, late, strict=True))
        return out, lse


def _merge(sums: Any, more: Any, seen: Any) -> tuple[jax.Array, jax.Array]:
    """f32[B, S, N, H] results and f32[B, S, N] logsumexp over the keys of both, or of `sums` alone if not `seen`."""
    (out, lse), (more_out, more_lse) = sums, more
    more_lse = jnp.where(seen, more_lse, -jnp.inf)
    top = jnp.maximum(lse, more_lse)
    weight, more_weight = jnp.exp(lse - top), jnp.exp(more_lse - top)
    total = weight + more_weight
    out = weight[..., None] * out + more_weight[..., None] * more_out.astype(jnp.float32)
    return out / total[..., None], top + jnp.log(total)
