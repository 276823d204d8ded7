"""The Whisper encoder, exactly: two convolutions, sinusoidal positions, pre-norm layers, a final LayerNorm.

Source: transformers modeling_whisper.py (WhisperEncoder); the names of modules are the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llaso_jax.modeling.compute import ComputeConfig, scan_layers
from llaso_jax.modeling.frames import CHUNK_MEL_FRAMES, CONV_STRIDE, encoder_frames
from llaso_jax.modeling.kernels.attention import attention
from llaso_jax.modeling.layers import (
    Initializer,
    LayerNorm,
    Linear,
    gelu,
    normal,
    param,
    residual_gain,
    stack_layers,
    use,
)
from llaso_jax.sharding.rules import LogicalAxes, constrain


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Sizes of a Whisper encoder, under the names of transformers' WhisperConfig.

    Defaults are Whisper-large-v3. `init_std` None draws random weights with a standard deviation of
    1/sqrt(fan_in); `conv_gain` multiplies that of the convolutions: trained from scratch, their output has to
    stand out against the position table, whose entries are up to 1.
    Raises ValueError for sizes that do not fit together.
    """

    num_mel_bins: int = 128
    d_model: int = 1280
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    max_source_positions: int = 1500
    init_std: float | None = 0.02
    conv_gain: float = 1.0

    def __post_init__(self) -> None:
        if self.d_model % self.encoder_attention_heads:
            raise ValueError(
                f"encoder d_model={self.d_model} does not split over "
                f"encoder_attention_heads={self.encoder_attention_heads}."
            )
        if self.d_model % 2:
            raise ValueError(
                f"encoder d_model={self.d_model} must be even (sine and cosine halves)."
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.encoder_attention_heads


def sinusoids(length: int, channels: int) -> np.ndarray:
    """Whisper's position table f32[length, channels]: sines, then cosines (openai/whisper model.py)."""
    # Rounded to f32 where torch rounds: an f64 table is 1e-4 from the stored one at position 1500.
    increment = np.float32(np.log(10_000) / (channels // 2 - 1))
    exponents = -increment * np.arange(channels // 2, dtype=np.float32)
    inverse_timescales = np.exp(exponents.astype(np.float64)).astype(np.float32)
    scaled = np.arange(length, dtype=np.float32)[:, None] * inverse_timescales[None, :]
    return np.concatenate([np.sin(scaled), np.cos(scaled)], axis=1)


class Conv1d(nnx.Module):
    """1-d convolution of kernel 3, padding 1, weight f32[out, in, 3] as in torch.nn.Conv1d."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        axis_in: str,
        stride: int,
        init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        self.axes: LogicalAxes = ("embed", axis_in, "kernel")
        self.weight = param(rngs, init, (dim_out, dim_in, 3), self.axes)
        self.bias = param(rngs, jax.nn.initializers.zeros, (dim_out,), ("norm",))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, T, in] -> [B, ceil(T / stride), out]."""
        y = jax.lax.conv_general_dilated(
            x,
            use(self.weight, self.axes, x.dtype),
            window_strides=(self.stride,),
            padding=((1, 1),),
            dimension_numbers=("NHC", "OIH", "NHC"),
        )
        return y + self.bias[...].astype(x.dtype).reshape(1, 1, -1)


def _residual_init(cfg: WhisperConfig, fan_in: int) -> Initializer:
    gain = residual_gain(cfg.init_std, cfg.encoder_layers)
    return normal(cfg.init_std, fan_in, gain=gain)


class WhisperAttention(nnx.Module):
    """Bidirectional self-attention; k_proj has no bias."""

    def __init__(self, cfg: WhisperConfig, compute: ComputeConfig, *, rngs: nnx.Rngs) -> None:
        heads = (cfg.encoder_attention_heads, cfg.head_dim)

        def projection(bias: bool) -> Linear:
            return Linear(
                (cfg.d_model,),
                heads,
                in_axes=("embed",),
                out_axes=("heads", "head_dim"),
                bias=bias,
                init=normal(cfg.init_std, cfg.d_model),
                rngs=rngs,
            )

        self.q_proj = projection(bias=True)
        self.k_proj = projection(bias=False)
        self.v_proj = projection(bias=True)
        self.out_proj = Linear(
            heads,
            (cfg.d_model,),
            in_axes=("heads", "head_dim"),
            out_axes=("embed",),
            bias=True,
            init=_residual_init(cfg, cfg.d_model),
            rngs=rngs,
        )
        self.compute = compute

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """x: [B, T, D], segment_ids: i32[B, T] or None (every frame is real) -> [B, T, D]."""
        out = attention(
            self.q_proj(x),
            self.k_proj(x),
            self.v_proj(x),
            causal=False,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            implementation=self.compute.attention,
        )
        return self.out_proj(out)


class WhisperEncoderLayer(nnx.Module):
    """Pre-norm attention and GELU feed-forward, each with a residual."""

    def __init__(self, cfg: WhisperConfig, compute: ComputeConfig, *, rngs: nnx.Rngs) -> None:
        self.self_attn_layer_norm = LayerNorm(cfg.d_model, eps=1e-5, rngs=rngs)
        self.self_attn = WhisperAttention(cfg, compute, rngs=rngs)
        self.final_layer_norm = LayerNorm(cfg.d_model, eps=1e-5, rngs=rngs)
        self.fc1 = Linear(
            (cfg.d_model,),
            (cfg.encoder_ffn_dim,),
            in_axes=("embed",),
            out_axes=("ffn",),
            bias=True,
            init=normal(cfg.init_std, cfg.d_model),
            rngs=rngs,
        )
        self.fc2 = Linear(
            (cfg.encoder_ffn_dim,),
            (cfg.d_model,),
            in_axes=("ffn",),
            out_axes=("embed",),
            bias=True,
            init=_residual_init(cfg, cfg.encoder_ffn_dim),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """x: [B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), segment_ids)
        hidden = constrain(gelu(self.fc1(self.final_layer_norm(x))), "batch", "sequence", "ffn")
        return constrain(x + self.fc2(hidden), "batch", "sequence", "embed")


class WhisperEncoder(nnx.Module):
    """Log-mel frames to speech features."""

    def __init__(self, cfg: WhisperConfig, compute: ComputeConfig, *, rngs: nnx.Rngs) -> None:
        self.conv1 = Conv1d(
            cfg.num_mel_bins,
            cfg.d_model,
            axis_in="mel",
            stride=1,
            init=normal(cfg.init_std, 3 * cfg.num_mel_bins, gain=cfg.conv_gain),
            rngs=rngs,
        )
        self.conv2 = Conv1d(
            cfg.d_model,
            cfg.d_model,
            axis_in="embed_out",
            stride=CONV_STRIDE,
            init=normal(cfg.init_std, 3 * cfg.d_model, gain=cfg.conv_gain),
            rngs=rngs,
        )
        self.embed_positions = nnx.Dict(
            weight=param(
                rngs,
                lambda _key, shape, dtype: jnp.asarray(sinusoids(*shape), dtype),
                (cfg.max_source_positions, cfg.d_model),
                ("position", "embed"),
            )
        )
        self.layers = stack_layers(
            lambda r: WhisperEncoderLayer(cfg, compute, rngs=r), cfg.encoder_layers, rngs
        )
        self.layer_norm = LayerNorm(cfg.d_model, eps=1e-5, rngs=rngs)
        self.cfg = cfg
        self.compute = compute

    def __call__(
        self, mel: jax.Array, mel_frames: jax.Array | None = None, *, hidden_states: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Encode log-mel chunks.

        Args:
          mel: f32[B, M, F] log-mel features.
          mel_frames: i32[B] valid frames of each chunk: the rest is masked out, so the valid outputs
            are the same whatever F a chunk is padded to. None: every frame counts (Whisper's own
            behaviour, silence included).
          hidden_states: also return the input of every layer and the output of the last, before the final norm.

        Returns:
          [B, ceil(F/2), D] features (frames past the valid ones are zero) and, if asked for,
          [L+1, B, ceil(F/2), D] hidden states.

        Raises:
          ValueError: F longer than the position table.
        """
        frames = encoder_frames(mel.shape[2])
        if frames > self.cfg.max_source_positions:
            raise ValueError(
                f"{mel.shape[2]} mel frames give {frames} positions, but the encoder has "
                f"max_source_positions={self.cfg.max_source_positions}: cut audio into 30 s chunks "
                f"of at most {CHUNK_MEL_FRAMES} frames."
            )
        x = mel.astype(self.compute.jnp_dtype).transpose(0, 2, 1)
        mel_valid = segment_ids = None
        if mel_frames is not None:
            # A convolution sees zeros beyond the last valid frame, as if the chunk ended there.
            mel_valid = (jnp.arange(x.shape[1])[None, :] < mel_frames[:, None])[..., None]
            valid = jnp.arange(frames)[None, :] < -(-mel_frames // CONV_STRIDE)[:, None]
            segment_ids = valid.astype(jnp.int32)
            x = jnp.where(mel_valid, x, 0)
        x = gelu(self.conv1(x))
        if mel_valid is not None:
            x = jnp.where(mel_valid, x, 0)
        x = gelu(self.conv2(x))
        positions = use(self.embed_positions["weight"], ("position", "embed"), x.dtype)
        x = constrain(x + positions[None, :frames], "batch", "sequence", "embed")

        graph, layers = nnx.split(self.layers)

        def body(h: jax.Array, layer: nnx.State) -> tuple[jax.Array, jax.Array | None]:
            y = nnx.merge(graph, layer)(h, segment_ids)
            return y, (h if hidden_states else None)

        last, inputs = scan_layers(body, x, layers, self.compute.remat)
        out = self.layer_norm(last)
        if segment_ids is not None:
            out = jnp.where((segment_ids > 0)[..., None], out, 0)
        states = None if inputs is None else jnp.concatenate([inputs, last[None]])
        return out, states
