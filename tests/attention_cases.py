"""Inputs of attention tests, and what implementations are compared by: outputs and gradients, f32."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from reference import jit

from llaso_jax.modeling.kernels.attention.chunked import chunked_attention
from llaso_jax.modeling.kernels.attention.pallas_gpu import gpu_attention
from llaso_jax.modeling.kernels.attention.pallas_gpu.sizes import BlockSizes as GpuBlocks
from llaso_jax.modeling.kernels.attention.pallas_tpu import tpu_attention
from llaso_jax.modeling.kernels.attention.pallas_tpu.sizes import BlockSizes as TpuBlocks
from llaso_jax.modeling.kernels.attention.reference import reference_attention
from llaso_jax.modeling.kernels.attention.splash import splash_attention

# With blocks so small that every case has several, and an incomplete one at the end.
SMALL: dict[str, Callable[..., jax.Array]] = {
    "chunked": functools.partial(chunked_attention, chunk=24),
    "pallas_tpu": functools.partial(tpu_attention, sizes=TpuBlocks(128, 128)),
    "pallas_gpu": functools.partial(gpu_attention, sizes=GpuBlocks(32, 64)),
    "splash": functools.partial(splash_attention, sizes=TpuBlocks(128, 128)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Lengths and heads of one call, and how it is masked.

    ids: None, `packed` (three samples and padding), `lengths` (a valid prefix) or `apart` (rows 0 without any key).
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    ids: str | None = None

    def segments(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """i32[2, queries] and i32[2, keys], the two rows unlike."""
        if self.ids is None:
            return None, None
        if self.ids == "apart":
            queries = np.full((2, self.queries), 7, np.int32)
            keys = np.ones((2, self.keys), np.int32)
            keys[1, : self.keys // 3] = 7
            return queries, keys
        cuts = {"packed": (0.3, 0.55, 0.8), "lengths": (0.7,)}[self.ids]

        def of(length: int) -> np.ndarray:
            rows = []
            for shift in (0, 0.1):
                ends = [int((cut + shift) * length) for cut in cuts]
                sizes = np.diff([0, *ends, length])
                rows.append(np.repeat([*range(1, len(cuts) + 1), 0], sizes))
            return np.array(rows, np.int32)

        return of(self.queries), of(self.keys)

    def inputs(self) -> tuple[np.ndarray, ...]:
        """q, k, v, and what outputs are weighed by."""
        return (
            random(2, self.queries, self.heads, self.head_dim, seed=0),
            random(2, self.keys, self.kv_heads, self.head_dim, seed=1),
            random(2, self.keys, self.kv_heads, self.head_dim, seed=2),
            random(2, self.queries, self.heads, self.head_dim, seed=3),
        )


def random(*shape: int, seed: int) -> np.ndarray:
    """Standard normal f32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def program(name: str, case: Case) -> Callable[..., dict[str, jax.Array]]:
    """The output and the gradients of q, k and v of a small-block implementation, compiled."""
    compute = {**SMALL, "reference": reference_attention}[name]
    q_ids, kv_ids = (x if x is None else jnp.asarray(x) for x in case.segments())

    def results(q, k, v, weight):
        def objective(q, k, v):
            out = compute(q, k, v, causal=case.causal, q_segment_ids=q_ids, kv_segment_ids=kv_ids)
            assert out.dtype == q.dtype
            return (out * weight).sum(), out

        gradient = jax.value_and_grad(objective, (0, 1, 2), has_aux=True)
        (_, out), (d_q, d_k, d_v) = gradient(q, k, v)
        return {"out": out, "d_q": d_q, "d_k": d_k, "d_v": d_v}

    return jit(results)


def run(name: str, case: Case, dtype=jnp.float32) -> dict[str, np.ndarray]:
    """Results of an implementation with inputs rounded to `dtype`, as f32."""
    *arrays, weight = case.inputs()
    results = program(name, case)(*(jnp.asarray(x, dtype) for x in arrays), weight)
    return {key: np.asarray(value, np.float32) for key, value in results.items()}


@functools.cache
def expected(case: Case, rounded: bool = False) -> dict[str, np.ndarray]:
    """f32 results of the definition, for inputs rounded to bf16 or not."""
    *arrays, weight = case.inputs()
    if rounded:
        arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in arrays]
    results = program("reference", case)(*arrays, weight)
    return {key: np.asarray(value) for key, value in results.items()}
