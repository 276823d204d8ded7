"""The Llama decoder, with grouped-query attention, packed segments and a key/value cache.

Source: transformers modeling_llama.py (LlamaModel); the names of modules are the same.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llaso_jax.modeling.compute import ComputeConfig, scan_layers
from llaso_jax.modeling.kernels.attention import attention, decode_attention, write_cache
from llaso_jax.modeling.layers import (
    Initializer,
    Linear,
    RMSNorm,
    normal,
    param,
    residual_gain,
    stack_layers,
    use,
)
from llaso_jax.modeling.rope import RopeScaling, inverse_frequencies, rotary_table, rotate
from llaso_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama decoder, under the names of transformers' LlamaConfig.

    Defaults are Llama-3.2-3B. `head_dim` None means hidden_size / num_attention_heads.
    `vocab_multiple_of` pads the stored embedding rows so that they split over a mesh; padded rows get
    no probability and are dropped on export. `initializer_range` None draws random matrices with a
    standard deviation of 1/sqrt(fan_in).
    Raises ValueError for sizes that do not fit together.
    """

    vocab_size: int = 128256
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 28
    num_attention_heads: int = 24
    num_key_value_heads: int = 8
    head_dim: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    tie_word_embeddings: bool = True
    initializer_range: float | None = 0.02
    vocab_multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} does not split over "
                    f"num_attention_heads={self.num_attention_heads}: set head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim={self.head_width} must be even for rotary positions.")

    @property
    def head_width(self) -> int:
        """`head_dim`, resolved."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Stored embedding rows: vocab_size rounded up to a multiple of vocab_multiple_of."""
        return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of


class KVCache(NamedTuple):
    """Keys and values of what was read so far.

    k, v: [L, B, K, T, H], as decode_attention reads them; length: i32[B] positions filled in each row.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array


Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, object]]


def _residual_init(cfg: LlamaConfig, fan_in: int) -> Initializer:
    gain = residual_gain(cfg.initializer_range, cfg.num_hidden_layers)
    return normal(cfg.initializer_range, fan_in, gain=gain)


class LlamaAttention(nnx.Module):
    """Projections of grouped-query attention; what is attended to is the caller's `attend`."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        def projection(heads: int, axis: str) -> Linear:
            return Linear(
                (cfg.hidden_size,),
                (heads, cfg.head_width),
                in_axes=("embed",),
                out_axes=(axis, "head_dim"),
                bias=False,
                init=normal(cfg.initializer_range, cfg.hidden_size),
                rngs=rngs,
            )

        self.q_proj = projection(cfg.num_attention_heads, "heads")
        self.k_proj = projection(cfg.num_key_value_heads, "kv_heads")
        self.v_proj = projection(cfg.num_key_value_heads, "kv_heads")
        self.o_proj = Linear(
            (cfg.num_attention_heads, cfg.head_width),
            (cfg.hidden_size,),
            in_axes=("heads", "head_dim"),
            out_axes=("embed",),
            bias=False,
            init=_residual_init(cfg, cfg.num_attention_heads * cfg.head_width),
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, object]:
        """x: [B, S, D] -> [B, S, D] and whatever `attend` keeps (keys and values)."""
        q, k = rotate(self.q_proj(x), rope), rotate(self.k_proj(x), rope)
        out, kept = attend(q, k, self.v_proj(x))
        return self.o_proj(out), kept


class LlamaMLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        def linear(
            dim_in: int, dim_out: int, axis_in: str, axis_out: str, init: Initializer
        ) -> Linear:
            return Linear(
                (dim_in,),
                (dim_out,),
                in_axes=(axis_in,),
                out_axes=(axis_out,),
                bias=False,
                init=init,
                rngs=rngs,
            )

        narrow, wide = cfg.hidden_size, cfg.intermediate_size
        inner = normal(cfg.initializer_range, narrow)
        self.gate_proj = linear(narrow, wide, "embed", "ffn", inner)
        self.up_proj = linear(narrow, wide, "embed", "ffn", inner)
        self.down_proj = linear(wide, narrow, "ffn", "embed", _residual_init(cfg, wide))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, S, D] -> [B, S, D]."""
        hidden = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(hidden, "batch", "sequence", "ffn"))


class LlamaDecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, rngs=rngs)
        self.self_attn = LlamaAttention(cfg, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, rngs=rngs)
        self.mlp = LlamaMLP(cfg, rngs=rngs)

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, object]:
        """x: [B, S, D] -> [B, S, D] and what `attend` keeps."""
        out, kept = self.self_attn(self.input_layernorm(x), rope, attend)
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, "batch", "sequence", "embed"), kept


class LlamaModel(nnx.Module):
    """Embeddings in, hidden states after the final norm out."""

    def __init__(self, cfg: LlamaConfig, compute: ComputeConfig, *, rngs: nnx.Rngs) -> None:
        table = (cfg.padded_vocab_size, cfg.hidden_size)
        # 1/sqrt(hidden_size) gives a tied head logits of unit variance.
        init = normal(cfg.initializer_range, cfg.hidden_size)
        self.embed_tokens = nnx.Dict(weight=param(rngs, init, table, ("vocab", "embed")))
        self.layers = stack_layers(
            lambda r: LlamaDecoderLayer(cfg, rngs=r), cfg.num_hidden_layers, rngs
        )
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, rngs=rngs)
        if not cfg.tie_word_embeddings:
            self.lm_head = nnx.Dict(weight=param(rngs, init, table, ("vocab", "embed")))
        self.cfg = cfg
        self.compute = compute

    def embed(self, tokens: jax.Array) -> jax.Array:
        """i32[B, S] token ids -> [B, S, D] in the compute dtype."""
        weight = use(self.embed_tokens["weight"], ("vocab", "embed"), self.compute.jnp_dtype)
        return constrain(jnp.take(weight, tokens, axis=0), "batch", "sequence", "embed")

    def head(self, dtype: jnp.dtype) -> jax.Array:
        """[padded vocabulary, D] output embeddings: the input's where they are tied."""
        table = self.embed_tokens if self.cfg.tie_word_embeddings else self.lm_head
        return use(table["weight"], ("vocab", "embed"), dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, A, D] -> f32[B, A, padded vocabulary]; padded entries are -1e30."""
        logits = jnp.einsum(
            "BAD,VD->BAV", hidden, self.head(hidden.dtype), preferred_element_type=jnp.float32
        )
        if self.cfg.padded_vocab_size > self.cfg.vocab_size:
            real = jnp.arange(self.cfg.padded_vocab_size) < self.cfg.vocab_size
            logits = jnp.where(real[None, None], logits, -1e30)
        return constrain(logits, "batch", "answers", "vocab")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        zigzag: bool = False,
        hidden_states: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Causal forward pass within segments.

        Args:
          x: [B, S, D] input embeddings.
          positions: i32[B, S] rotary positions.
          segment_ids: i32[B, S] packed samples; attention never crosses them.
          zigzag: all of these, and the results, are in the order of a ring (sharding/context.py).
          hidden_states: also return the input of every layer and the output of the last, before the norm.

        Returns:
          [B, S, D] hidden states after the final norm and, if asked for, [L+1, B, S, D].
        """
        keep = "input" if hidden_states else None
        last, kept = self._scan(x, positions, segment_ids, keep=keep, zigzag=zigzag)
        states = None if kept is None else jnp.concatenate([kept, last[None]])
        return self.norm(last), states

    def prefill(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array, *, max_length: int
    ) -> tuple[jax.Array, KVCache]:
        """Read prompts, right-padded with segment 0, into a new cache of `max_length` positions.

        Returns:
          [B, S, D] hidden states after the final norm, and the cache with each row's length.
        """
        last, kept = self._scan(x, positions, segment_ids, keep="kv")
        assert kept is not None
        room = ((0, 0), (0, 0), (0, 0), (0, max_length - x.shape[1]), (0, 0))
        k, v = (jnp.pad(entry.swapaxes(2, 3), room) for entry in kept)
        return self.norm(last), KVCache(k, v, (segment_ids > 0).sum(-1, dtype=jnp.int32))

    def decode(self, x: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Read one more position per row.

        Args:
          x: [B, 1, D] embeddings, written behind each row's `cache.length` positions.

        Returns:
          [B, 1, D] hidden states after the final norm, and the cache one position longer.
        """
        rope = self._rope(cache.length[:, None])
        graph, layers = nnx.split(self.layers)

        # The cache is carried, not scanned over: XLA then updates it in place.
        def body(carry, scanned):
            h, all_k, all_v = carry
            index, layer = scanned

            def attend(q: jax.Array, k: jax.Array, v: jax.Array):
                new_k = write_cache(all_k, k[:, 0], cache.length, index)
                new_v = write_cache(all_v, v[:, 0], cache.length, index)
                out = decode_attention(
                    q[:, 0],
                    new_k,
                    new_v,
                    cache.length + 1,
                    index,
                    implementation=self.compute.attention,
                )
                return out[:, None], (new_k, new_v)

            h, (new_k, new_v) = nnx.merge(graph, layer)(h, rope, attend)
            return (h, new_k, new_v), None

        indices = jnp.arange(self.cfg.num_hidden_layers)
        (last, k, v), _ = jax.lax.scan(body, (x, cache.k, cache.v), (indices, layers))
        return self.norm(last), KVCache(k, v, cache.length + 1)

    def _rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        frequencies = inverse_frequencies(
            self.cfg.head_width, self.cfg.rope_theta, self.cfg.rope_scaling
        )
        return rotary_table(positions, frequencies)

    def _scan(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        keep: str | None,
        zigzag: bool = False,
    ):
        """Scan the layers; `keep` stacks each layer's "input" or its "kv"."""
        rope = self._rope(positions)
        graph, layers = nnx.split(self.layers)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array):
            out = attention(
                q,
                k,
                v,
                causal=True,
                q_segment_ids=segment_ids,
                kv_segment_ids=segment_ids,
                zigzag=zigzag,
                implementation=self.compute.attention,
            )
            return out, (k, v)

        def body(h: jax.Array, layer: nnx.State):
            y, kv = nnx.merge(graph, layer)(h, rope, attend)
            return y, {"input": h, "kv": kv, None: None}[keep]

        return scan_layers(body, x, layers, self.compute.remat)
