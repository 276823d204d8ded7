"""A sequence that lies on several devices: the collectives of its attention, and the order of its positions.

Source: DeepSpeed-Ulysses (arXiv 2309.14509, section 3.2) for the exchange of sequence and heads, Ring Attention
(arXiv 2310.01889, section 3.2) for what goes round, Striped Attention (arXiv 2311.09431) for why the order matters.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from llaso_jax.sharding.rules import Context, ShardingError, active_rules

AXIS = "context"
"""The mesh axis that splits sequences."""


class ContextPlan(NamedTuple):
    """kind: how attention works; ranks: how many devices hold a part of each sequence."""

    kind: Context
    ranks: int


def context_plan() -> ContextPlan | None:
    """What the active rules say about a sequence; None where every device holds all of it."""
    found = active_rules()
    if found is None or found[1].context is None or found[0].shape[AXIS] == 1:
        return None
    mesh, rules = found
    return ContextPlan(rules.context, mesh.shape[AXIS])


# --- collectives, inside jax.shard_map --------------------------------------------------------------


def heads_for_sequence(x: jax.Array) -> jax.Array:
    """[B, S/R, N, H], all heads of a part -> [B, S, N/R, H], some heads of the whole sequence (all-to-all)."""
    return jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True)


def sequence_for_heads(x: jax.Array) -> jax.Array:
    """[B, S, N/R, H] -> [B, S/R, N, H]: the inverse of `heads_for_sequence`."""
    return jax.lax.all_to_all(x, AXIS, split_axis=1, concat_axis=2, tiled=True)


def pass_on(tree: Any, ranks: int) -> Any:
    """Every array to the next device of the ring, the last one's to the first (collective-permute)."""
    ring = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)


# --- order ------------------------------------------------------------------------------------------


def zigzag_order(length: int, ranks: int) -> np.ndarray:
    """i32[length] positions in the order that gives each device of a ring as many causal pairs as any other.

    The sequence is cut into 2 x ranks pieces; device r holds pieces r and 2 x ranks - 1 - r, an early and a late one.

    Example:
      zigzag_order(8, 2) is [0, 1, 6, 7, 2, 3, 4, 5]: device 0 has 0 1 6 7, device 1 has 2 3 4 5.

    Raises:
      ShardingError: a length that is no multiple of 2 x ranks.
    """
    check_length(length, 2 * ranks)
    pieces = np.arange(length, dtype=np.int32).reshape(2 * ranks, -1)
    first = np.arange(ranks)
    return pieces[np.stack([first, 2 * ranks - 1 - first], axis=1)].reshape(-1)


def check_length(length: int, parts: int) -> None:
    """Raise ShardingError unless a sequence of `length` positions can be cut into `parts` equal parts."""
    if length % parts:
        raise ShardingError(
            f"a sequence of {length} positions does not split into {parts} equal parts, 1 for each device of mesh "
            f"axis {AXIS} (2 where they form a ring): choose data.sequence_length as a multiple of {parts}, or a "
            f"smaller {AXIS} axis."
        )
