"""Attention of one new query per row to a key/value cache: the step that generation repeats."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.attention.api import (
    Implementation,
    check_implementation,
    first_possible,
    on_mesh,
)
from llaso_jax.modeling.kernels.attention.blocks import FLOOR, LANES
from llaso_jax.modeling.kernels.attention.pallas_gpu.decode import gpu_decode_attention
from llaso_jax.modeling.kernels.attention.pallas_tpu.decode import tpu_decode_attention
from llaso_jax.modeling.kernels.attention.reference import reference_attention
from llaso_jax.sharding.rules import constrain, target_device

BLOCK = 256
"""Keys that the plain form reads at a time."""

QUERY = ("batch", "heads", "head_dim")
ENTRY = ("batch", "kv_heads", "head_dim")
CACHE = (None, "batch", "kv_heads", "sequence", "head_dim")


def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    layer: jax.Array | int = 0,
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Attention of one query per row to the filled part of one layer's cache, which is read where it lies.

    Args:
      q: [B, N, H] queries.
      k_cache: [L, B, K, T, H] keys of all layers, N a multiple of K.
      v_cache: [L, B, K, T, H] values.
      lengths: i32[B] positions to attend to, the first ones (at most all T); a row of length 0 gets zeros.
      layer: i32[] the layer to read.
      implementation: `reference` slices the layer out; `chunked` loops over the filled blocks in XLA; `pallas_tpu`
        and `pallas_gpu` are kernels that do. `auto`, and `splash` and `cudnn`, which know no such step: the
        platform's kernel (on TPU for a head_dim that is a multiple of 128), else `chunked`.

    Returns:
      [B, N, H] in the dtype of q. Softmax runs in f32.

    Raises:
      ValueError: heads that do not split over key/value heads, or an unknown implementation.
      UnsupportedAttentionError: the named implementation cannot do this case.
    """
    check_implementation(implementation)
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(
            f"{q.shape[1]} query heads do not split over {k_cache.shape[2]} key/value heads evenly."
        )
    names: tuple[str, ...] = (implementation,)
    if implementation not in DECODERS:
        names = *_kernels(k_cache.shape[-1]), "chunked"
    q = constrain(q, *QUERY)
    lengths = jnp.minimum(lengths, k_cache.shape[3])
    arguments = q, k_cache, v_cache, lengths, jnp.asarray(layer, jnp.int32)

    def attempt(name: str) -> jax.Array:
        inputs = QUERY, CACHE, CACHE, ("batch",), ()
        return on_mesh(name, DECODERS[name], inputs, QUERY)(*arguments)

    out = first_possible([partial(attempt, name) for name in names])
    return constrain(out, *QUERY)


def write_cache(
    cache: jax.Array, new: jax.Array, position: jax.Array, layer: jax.Array | int
) -> jax.Array:
    """The cache with one more entry per row, written in place where the cache is donated or carried by a loop.

    Args:
      cache: [L, B, K, T, H] keys or values of all layers.
      new: [B, K, H] what is written; nothing for a position beyond the cache.
      position: i32[B] where in each row.
      layer: i32[] the layer to write.
    """
    arguments = cache, new, position, jnp.asarray(layer, jnp.int32)
    return on_mesh("chunked", _write, (CACHE, ENTRY, ("batch",), ()), CACHE)(*arguments)


def _write(cache: jax.Array, new: jax.Array, position: jax.Array, layer: jax.Array) -> jax.Array:
    # An index per row and head: for whole windows [K, H] XLA:TPU would turn the cache over, and back for the kernel.
    rows, heads = jnp.indices(new.shape[:2])
    return cache.at[layer, rows, heads, position[:, None]].set(new)


def _kernels(head_dim: int) -> tuple[str, ...]:
    """Kernels that `auto` tries before plain XLA."""
    platform, _ = target_device()
    if platform == "tpu" and head_dim % LANES:
        return ()  # XLA lays out caches of narrow heads another way: the kernel would cost a copy
    return {"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",)}.get(platform, ())


def _whole_layer(
    q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, lengths: jax.Array, layer: jax.Array
) -> jax.Array:
    """The definition: attention to a layer's cache, what is not filled masked out."""
    k, v = (cache[layer].swapaxes(1, 2) for cache in (k_cache, v_cache))
    filled = jnp.arange(k.shape[1])[None, :] < lengths[:, None]
    ones = jnp.ones((len(q), 1), jnp.int32)
    out = reference_attention(
        q[:, None],
        k,
        v,
        causal=False,
        q_segment_ids=ones,
        kv_segment_ids=filled.astype(jnp.int32),
    )
    return out[:, 0]


def _blocks_in_turn(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    *,
    block: int = BLOCK,
) -> jax.Array:
    """A loop over as many blocks as the longest row fills; no copy of a layer's cache is made."""
    _, batch, heads, room, width = k_cache.shape
    block = min(block, room)
    grouped = q.reshape(batch, heads, -1, width)

    def read(cache: jax.Array, start: jax.Array) -> jax.Array:
        at = (layer, jnp.int32(0), jnp.int32(0), start, jnp.int32(0))
        return jax.lax.dynamic_slice(cache, at, (1, batch, heads, block, width))[0]

    def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sums, top, total = carry
        # The last block ends with the cache: what it has in common with the one before counts once.
        start = jnp.minimum(i * block, room - block)
        index = start + jnp.arange(block)
        seen = (index[None] >= i * block) & (index[None] < lengths[:, None])
        scores = jnp.einsum(
            "BKGH,BKTH->BKGT", grouped, read(k_cache, start), preferred_element_type=jnp.float32
        )
        scores = jnp.where(seen[:, None, None], scores * width**-0.5, -jnp.inf)
        highest = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - highest[..., None])
        shrink = jnp.exp(top - highest)
        sums = shrink[..., None] * sums + jnp.einsum(
            "BKGT,BKTH->BKGH",
            weights.astype(v_cache.dtype),
            read(v_cache, start),
            preferred_element_type=jnp.float32,
        )
        return sums, highest, shrink * total + weights.sum(-1)

    empty = (
        jnp.zeros(grouped.shape, jnp.float32),
        jnp.full(grouped.shape[:3], FLOOR, jnp.float32),
        jnp.zeros(grouped.shape[:3], jnp.float32),
    )
    sums, _, total = jax.lax.fori_loop(0, -(-lengths.max() // block), add, empty)
    out = sums / jnp.where(total == 0, 1, total)[..., None]
    return out.astype(q.dtype).reshape(q.shape)


DECODERS: dict[str, Callable[..., jax.Array]] = {
    "reference": _whole_layer,
    "chunked": _blocks_in_turn,
    "pallas_tpu": tpu_decode_attention,
    "pallas_gpu": gpu_decode_attention,
}
