"""The TPU kernels as one differentiable call."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.attention.blocks import (
    pad_ids,
    relations,
    schedule,
    score_scale,
    whole_blocks,
)
from llaso_jax.modeling.kernels.attention.errors import check_dtypes, check_platform
from llaso_jax.modeling.kernels.attention.pallas_tpu.backward import Rows, backward_kv, backward_q
from llaso_jax.modeling.kernels.attention.pallas_tpu.common import (
    Inputs,
    Static,
    heads_first,
    heads_last,
)
from llaso_jax.modeling.kernels.attention.pallas_tpu.forward import forward
from llaso_jax.modeling.kernels.attention.pallas_tpu.sizes import BlockSizes, block_sizes
from llaso_jax.modeling.kernels.attention.partial import Keys, Partial, Queries
from llaso_jax.modeling.kernels.attention.residuals import named
from llaso_jax.sharding.rules import target_device


class Plan(NamedTuple):
    """Everything about a call that is not an array."""

    causal: bool
    forward: BlockSizes
    backward: BlockSizes
    interpret: bool


def tpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    sizes: BlockSizes | None = None,
) -> jax.Array:
    """See `llaso_jax.modeling.kernels.attention.attention`. Memory: a logsumexp per query, and padding to blocks.

    Compiled where the program is for a TPU, interpreted on a CPU. `sizes` replaces the block sizes of the table.

    Raises:
      UnsupportedAttentionError: another platform, or dtypes other than f32 and bf16.
    """
    return _attention(q, k, v, q_segment_ids, kv_segment_ids, _plan(q, k, v, causal, sizes))


def _plan(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, sizes: BlockSizes | None = None
) -> Plan:
    platform, kind = target_device()
    check_platform("pallas_tpu", "tpu", platform)
    check_dtypes("pallas_tpu", q, k, v)
    table = functools.partial(
        block_sizes,
        device_kind=kind,
        q_length=q.shape[1],
        kv_length=k.shape[1],
        itemsize=q.dtype.itemsize,
    )
    return Plan(
        causal, sizes or table("forward"), sizes or table("backward"), interpret=platform == "cpu"
    )


Ids = jax.Array | None


def _prepare(
    q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Ids, kv_ids: Ids, size: BlockSizes
) -> Inputs:
    lengths = q.shape[1], k.shape[1]
    padded = whole_blocks(lengths[0], size.q), whole_blocks(lengths[1], size.kv)
    return Inputs(
        heads_first(q, size.q),
        heads_first(k, size.kv),
        heads_first(v, size.kv),
        pad_ids(q_ids, kv_ids, lengths, padded),
    )


def _static(plan: Plan, size: BlockSizes, head_dim: int) -> Static:
    return Static(plan.causal, size, score_scale(head_dim), plan.interpret)


def _value(
    q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Ids, kv_ids: Ids, plan: Plan
) -> jax.Array:
    return _forward(q, k, v, q_ids, kv_ids, plan)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Ids, kv_ids: Ids, plan: Plan):
    out, lse = named(*_run(q, k, v, q_ids, kv_ids, plan))
    return out, (q, k, v, q_ids, kv_ids, out, lse)


def _run(
    q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Ids, kv_ids: Ids, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """[B, S, N, H] results and f32[B, N, 1, S] logsumexp, base 2."""
    size, length = plan.forward, q.shape[1]
    inputs = _prepare(q, k, v, q_ids, kv_ids, size)
    pairs = schedule(
        relations(inputs.ids, *size, causal=plan.causal), *size, causal=plan.causal, by="q"
    )
    out, lse = forward(inputs, pairs, _static(plan, size, q.shape[-1]))
    return heads_last(out, length), lse[..., :length]


def _backward(plan: Plan, saved, d_out: jax.Array):
    q, k, v, q_ids, kv_ids, out, lse = saved
    size = plan.backward
    inputs = _prepare(q, k, v, q_ids, kv_ids, size)
    mean = jnp.einsum("BSNH,BSNH->BNS", out, d_out, preferred_element_type=jnp.float32)
    room = ((0, 0), (0, 0), (0, 0), (0, inputs.q.shape[2] - q.shape[1]))
    rows = Rows(heads_first(d_out, size.q), jnp.pad(lse, room), jnp.pad(mean[:, :, None], room))
    relation = relations(inputs.ids, *size, causal=plan.causal)
    static = _static(plan, size, q.shape[-1])
    by_q, by_kv = (schedule(relation, *size, causal=plan.causal, by=by) for by in ("q", "kv"))
    d_q = backward_q(inputs, rows, by_q, static)
    d_k, d_v = backward_kv(inputs, rows, by_kv, static)
    length = k.shape[1]
    return heads_last(d_q, q.shape[1]), heads_last(d_k, length), heads_last(d_v, length), None, None


_attention = jax.custom_vjp(_value, nondiff_argnums=(5,))
_attention.defvjp(_forward, _backward)


def _partial_forward(queries: Queries, keys: Keys, *, causal: bool) -> tuple[jax.Array, jax.Array]:
    plan = _plan(queries.q, keys.k, keys.v, causal)
    out, lse = _run(queries.q, keys.k, keys.v, queries.ids, keys.ids, plan)
    return out, lse[:, :, 0].swapaxes(1, 2) * math.log(2)


def _partial_backward(queries: Queries, keys: Keys, *, causal: bool) -> tuple[jax.Array, ...]:
    plan = _plan(queries.q, keys.k, keys.v, causal)
    lse = queries.lse.swapaxes(1, 2)[:, :, None] / math.log(2)
    saved = queries.q, keys.k, keys.v, queries.ids, keys.ids, queries.out, lse
    return _backward(plan, saved, queries.d_out)[:3]


tpu_partial = Partial(_partial_forward, _partial_backward)
