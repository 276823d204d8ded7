"""Rotary position embedding in the half-rotated convention of transformers, with "llama3" scaling."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """ "llama3" frequency scaling (transformers modeling_rope_utils._compute_llama3_parameters).

    Defaults are Llama-3.2's.
    """

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling: high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}."
            )


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each of the head_dim/2 planes, f32 (as transformers computes it)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power in f64, rounded once: NumPy's f32 power is off by an ulp in one plane of five, which is
    # 5e-3 rad at position 131071. Scalars over arrays are reciprocal, then product, as in torch.
    powers = np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.reciprocal(powers)
    if scaling is None:
        return frequencies
    wavelengths = np.reciprocal(frequencies) * np.float32(2 * math.pi)
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    # 0 for wavelengths past `low` (slowed by the factor), 1 below `high` (kept), linear between.
    periods = np.reciprocal(wavelengths) * np.float32(scaling.original_max_position_embeddings)
    smooth = (periods - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = np.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    between = (wavelengths <= low) & (wavelengths >= high)
    return np.where(between, blended, scaled).astype(np.float32)


def rotary_table(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines f32[B, S, 1, H/2] of i32[B, S] positions."""
    # f32 always: bf16 rounds position 257 to 256, a whole radian in the fastest plane.
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies).reshape(1, 1, -1)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate x [B, S, N, H]: plane i is the pair (i, i + H/2). Computed in f32, returned in x.dtype."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
