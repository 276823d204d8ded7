"""Attention to some of a row's keys, as ring attention puts it together: results with the logsumexp of their scores."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Queries(NamedTuple):
    """q [B, S, N, H] and ids, i32[B, S] segments or None.

    For gradients also, over all keys: out and d_out, [B, S, N, H], and f32[B, S, N] lse.
    """

    q: Any
    ids: Any
    out: Any = None
    lse: Any = None
    d_out: Any = None


class Keys(NamedTuple):
    """k and v, [B, T, K, H], and ids, i32[B, T] segments or None."""

    k: Any
    v: Any
    ids: Any


class Partial(NamedTuple):
    """An implementation of attention in two functions of (queries, keys, *, causal).

      forward: results [B, S, N, H], and f32[B, S, N] natural logsumexp of the scores, finite and very low where no key
      is seen.
      backward: the part of the gradients of q, k and v that these keys give, given out, lse and d_out over all keys.

    Raises (when called), as the implementation itself:
      UnsupportedAttentionError: a case that it cannot do.
    """

    forward: Callable[..., tuple[Any, Any]]
    backward: Callable[..., tuple[Any, Any, Any]]
