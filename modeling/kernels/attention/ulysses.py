"""DeepSpeed-Ulysses (arXiv 2309.14509): each device attends over the whole sequence for some of the heads.

Queries, keys and values come with all heads of a part of the sequence; an all-to-all makes of them some heads of the
whole, any implementation attends, and a second all-to-all takes the results back. The backward pass is JAX's own: the
transpose of an all-to-all is an all-to-all.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llaso_jax.sharding.context import heads_for_sequence, sequence_for_heads
from llaso_jax.sharding.rules import ShardingError


def ulysses_attention(compute: Callable[..., jax.Array], ranks: int) -> Callable[..., jax.Array]:
    """`compute` of whole sequences as a function of parts of them, inside jax.shard_map.

    It takes q [B, S/ranks, N, H], k and v [B, T/ranks, K, H], and the segment ids of the whole sequences.

    A key/value head is sent to every device that has query heads of its group: where `ranks` does not divide K, each
    is repeated ranks / gcd(K, ranks) times, so that heads can be dealt out evenly. With K < ranks, a multiple of K,
    that is what each device needs and no more.
    """

    def attend(q, k, v, q_ids, kv_ids) -> jax.Array:
        copies = key_copies(k.shape[2], ranks)
        k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
        return sequence_for_heads(compute(*map(heads_for_sequence, (q, k, v)), q_ids, kv_ids))

    return attend


def key_copies(kv_heads: int, ranks: int) -> int:
    """How often Ulysses sends each key/value head of a device: 1 where `ranks` divides their number."""
    return ranks // math.gcd(kv_heads, ranks)


def check_heads(heads: int, ranks: int) -> None:
    """Raise ShardingError unless the query heads of a device can be dealt out to `ranks` devices."""
    if heads % ranks:
        raise ShardingError(
            f"context-ulysses deals out {heads} query heads (of each device of mesh axis tensor) to {ranks} devices of "
            f"mesh axis context, which does not go evenly: choose a context size that divides {heads}, or context-ring "
            f"in sharding.strategy."
        )
