"""The GPU kernels as one differentiable call."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.attention.blocks import pad_ids, relations, spans, whole_blocks
from llaso_jax.modeling.kernels.attention.errors import (
    check_dtypes,
    check_head_dim,
    check_platform,
)
from llaso_jax.modeling.kernels.attention.pallas_gpu.backward import Rows, backward_kv, backward_q
from llaso_jax.modeling.kernels.attention.pallas_gpu.common import Inputs, Static
from llaso_jax.modeling.kernels.attention.pallas_gpu.forward import forward
from llaso_jax.modeling.kernels.attention.pallas_gpu.sizes import BACKWARD, FORWARD, BlockSizes
from llaso_jax.modeling.kernels.attention.partial import Keys, Partial, Queries
from llaso_jax.modeling.kernels.attention.residuals import named
from llaso_jax.sharding.rules import target_device


class Plan(NamedTuple):
    """Everything about a call that is not an array."""

    causal: bool
    forward: BlockSizes
    backward: BlockSizes
    interpret: bool

    def static(self, size: BlockSizes, q: jax.Array, k: jax.Array) -> Static:
        """What a kernel with these blocks is compiled for."""
        return Static(self.causal, size, (q.shape[1], k.shape[1]), self.interpret)


def gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    sizes: BlockSizes | None = None,
) -> jax.Array:
    """See `llaso_jax.modeling.kernels.attention.attention`. Memory: a logsumexp per query.

    Compiled where the program is for a GPU, interpreted on a CPU. `sizes` replaces the block sizes of the table.

    Raises:
      UnsupportedAttentionError: another platform, dtypes other than f32 and bf16, or a head_dim that is not a power
        of 2 from 16 to 256.
    """
    return _attention(q, k, v, q_segment_ids, kv_segment_ids, _plan(q, k, v, causal, sizes))


def _plan(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, sizes: BlockSizes | None = None
) -> Plan:
    platform, _ = target_device()
    check_platform("pallas_gpu", "gpu", platform)
    check_dtypes("pallas_gpu", q, k, v)
    check_head_dim("pallas_gpu", q.shape[-1])
    bytes_each = q.dtype.itemsize
    return Plan(
        causal, sizes or FORWARD[bytes_each], sizes or BACKWARD[bytes_each], platform == "cpu"
    )


Ids = jax.Array | None


def _inputs(
    q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Ids, kv_ids: Ids, size: BlockSizes
) -> Inputs:
    lengths = q.shape[1], k.shape[1]
    padded = whole_blocks(lengths[0], size.q), whole_blocks(lengths[1], size.kv)
    return Inputs(q, k, v, pad_ids(q_ids, kv_ids, lengths, padded))


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
    """[B, S, N, H] results and f32[B, N, S] logsumexp, base 2."""
    size = plan.forward
    inputs = _inputs(q, k, v, q_ids, kv_ids, size)
    relation = relations(inputs.ids, size.q, size.kv, causal=plan.causal)
    return forward(inputs, spans(relation), plan.static(size, q, k))


def _backward(plan: Plan, saved, d_out: jax.Array):
    q, k, v, q_ids, kv_ids, out, lse = saved
    size = plan.backward
    inputs = _inputs(q, k, v, q_ids, kv_ids, size)
    mean = jnp.einsum("BSNH,BSNH->BNS", out, d_out, preferred_element_type=jnp.float32)
    rows = Rows(d_out, lse, mean)
    relation = relations(inputs.ids, size.q, size.kv, causal=plan.causal)
    static = plan.static(size, q, k)
    d_q = backward_q(inputs, rows, spans(relation), static)
    d_k, d_v = backward_kv(inputs, rows, spans(relation.swapaxes(1, 2)), static)
    return d_q, d_k, d_v, None, None


_attention = jax.custom_vjp(_value, nondiff_argnums=(5,))
_attention.defvjp(_forward, _backward)


def _partial_forward(queries: Queries, keys: Keys, *, causal: bool) -> tuple[jax.Array, jax.Array]:
    plan = _plan(queries.q, keys.k, keys.v, causal)
    out, lse = _run(queries.q, keys.k, keys.v, queries.ids, keys.ids, plan)
    return out, lse.swapaxes(1, 2) * math.log(2)


def _partial_backward(queries: Queries, keys: Keys, *, causal: bool) -> tuple[jax.Array, ...]:
    plan = _plan(queries.q, keys.k, keys.v, causal)
    lse = queries.lse.swapaxes(1, 2) / math.log(2)
    saved = queries.q, keys.k, keys.v, queries.ids, keys.ids, queries.out, lse
    return _backward(plan, saved, queries.d_out)[:3]


gpu_partial = Partial(_partial_forward, _partial_backward)
