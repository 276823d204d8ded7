"""The backward kernels: dQ with queries outside, dK and dV with keys outside (arXiv 2205.14135, algorithm 4).

Scores are computed again from q, k and the saved logsumexp. dK and dV work on transposed blocks [keys, queries]: what
belongs to a query (logsumexp, its id) then lies along lanes, as it does in memory, and no product needs a transpose.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llaso_jax.modeling.kernels.attention.blocks import LANES, Schedule
from llaso_jax.modeling.kernels.attention.pallas_tpu.common import (
    Inputs,
    Program,
    Static,
    column,
    dot,
    edges,
    hide,
    launch,
    row_of,
    visit,
)


class Rows(NamedTuple):
    """Of each query: d_out [B, N, S', H], and f32[B, N, 1, S'] logsumexp and mean, the sum of d_out * out."""

    d_out: jax.Array
    lse: jax.Array
    mean: jax.Array


def backward_q(inputs: Inputs, rows: Rows, pairs: Schedule, static: Static) -> jax.Array:
    """Gradient of q: [B, N, S', H]."""
    block, width = static.size.q, inputs.q.shape[-1]
    program = Program(
        "attention_backward_q",
        _kernel_q,
        by="q",
        out_shape=jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        out_specs=lambda own: own.queries,
        scratch=[
            pltpu.VMEM((block, LANES), jnp.int32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, width), jnp.float32),
        ],
        products=3,
    )
    return launch(program, inputs, rows, pairs, static)


def _kernel_q(static: Static, outer: Any, inner: Any, kind: Any, *refs: Any) -> None:
    q_ids, kv_ids, q, k, v, d_out, lse, mean, d_q, own_ids, own_lse, own_mean, sums = refs
    row, pair = row_of(pl.program_id(0), kind), pl.program_id(2)
    first, last = edges(outer, pair)

    @pl.when(first)
    def _start() -> None:
        own_ids[...] = column(q_ids[0])
        own_lse[...] = column(lse[0, 0])
        own_mean[...] = column(mean[0, 0])
        sums[...] = jnp.zeros_like(sums)

    def add(*, masked: bool) -> None:
        scores = dot(q[0, 0], k[0, 0], (1, 1)) * static.scale
        if masked:
            ids = own_ids[:, :1], kv_ids[0]
            scores = hide(static, scores, ids, (outer[pair], inner[row, pair]), 0)
        weights = jnp.exp2(scores - own_lse[:, :1])
        d_weights = dot(d_out[0, 0], v[0, 0], (1, 1))
        d_scores = weights * (d_weights - own_mean[:, :1])
        sums[...] += dot(d_scores.astype(k.dtype), k[0, 0], (1, 0))

    visit(kind[row, pair], add)

    @pl.when(last)
    def _finish() -> None:
        d_q[0, 0] = (sums[...] * q.shape[-1] ** -0.5).astype(d_q.dtype)


def backward_kv(
    inputs: Inputs, rows: Rows, pairs: Schedule, static: Static
) -> tuple[jax.Array, jax.Array]:
    """Gradients of k and v: [B, K, T', H], summed over the query heads of each."""
    block, width = static.size.kv, inputs.k.shape[-1]
    shape = jax.ShapeDtypeStruct(inputs.k.shape, inputs.k.dtype)
    program = Program(
        "attention_backward_kv",
        _kernel_kv,
        by="kv",
        out_shape=(shape, shape),
        out_specs=lambda own: [own.keys, own.keys],
        scratch=[
            pltpu.VMEM((block, LANES), jnp.int32),
            pltpu.VMEM((block, width), jnp.float32),
            pltpu.VMEM((block, width), jnp.float32),
        ],
        products=4,
    )
    return launch(program, inputs, rows, pairs, static)


def _kernel_kv(static: Static, outer: Any, inner: Any, kind: Any, *refs: Any) -> None:
    q_ids, kv_ids, q, k, v, d_out, lse, mean, d_k, d_v, own_ids, k_sums, v_sums = refs
    row = row_of(pl.program_id(0), kind)
    pair, member = pl.program_id(2), pl.program_id(3)
    first, last = edges(outer, pair)

    @pl.when(first & (member == 0))
    def _start() -> None:
        own_ids[...] = column(kv_ids[0])
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    def add(*, masked: bool) -> None:
        scores = dot(k[0, 0], q[0, 0], (1, 1)) * static.scale
        if masked:
            ids = own_ids[:, :1], q_ids[0]
            scores = hide(static, scores, ids, (inner[row, pair], outer[pair]), 1)
        weights = jnp.exp2(scores - lse[0, 0])
        v_sums[...] += dot(weights.astype(d_out.dtype), d_out[0, 0], (1, 0))
        d_weights = dot(v[0, 0], d_out[0, 0], (1, 1))
        d_scores = weights * (d_weights - mean[0, 0])
        k_sums[...] += dot(d_scores.astype(q.dtype), q[0, 0], (1, 0))

    visit(kind[row, pair], add)

    @pl.when(last & (member == pl.num_programs(3) - 1))
    def _finish() -> None:
        d_k[0, 0] = (k_sums[...] * q.shape[-1] ** -0.5).astype(d_k.dtype)
        d_v[0, 0] = v_sums[...].astype(d_v.dtype)
