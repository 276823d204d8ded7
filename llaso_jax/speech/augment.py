"""Recorded conditions put on clean speech: telephone band, noise, level, speed. Deterministic."""

from dataclasses import dataclass
from typing import get_args

import numpy as np

from llaso_jax.data.sound import (
    NoiseColor,
    amplified,
    at_speed,
    coloured_noise,
    telephone_band,
    with_noise,
)
from llaso_jax.errors import ConfigError

HIGHEST_PEAK = 0.97  # of full scale: a codec may overshoot by some 2 %
LIMITS = {"snr_db": (-20.0, 100.0), "gain_db": (-60.0, 60.0), "speed": (0.5, 2.0)}


@dataclass(frozen=True)
class Augmentation:
    """What happens to a clip, in this order; the default is nothing.

    Attributes:
      speed: times as fast, 0.5 to 2; the pitch changes with it.
      narrow_band: keep to the telephone's band, up to 4 kHz; noise too.
      snr_db: power of speech over power of noise, both of the whole clip, -20 to 100; None for no noise.
      noise_color: how the noise's power falls with frequency.
      gain_db: louder or softer, -60 to 60; less gain where the clip would be clipped.

    Raises:
      ConfigError: a value outside its range.
    """

    speed: float = 1.0
    narrow_band: bool = False
    snr_db: float | None = None
    noise_color: NoiseColor = "pink"
    gain_db: float = 0.0

    def __post_init__(self) -> None:
        for field, (low, high) in LIMITS.items():
            value = getattr(self, field)
            if value is not None and not low <= value <= high:  # NaN is in no range
                raise ConfigError(
                    f"augmentation.{field} is {value}; {low:g} to {high:g} is allowed"
                )
        if self.noise_color not in get_args(NoiseColor):
            raise ConfigError(
                f"augmentation.noise_color is {self.noise_color!r}; one of "
                f"{', '.join(get_args(NoiseColor))} is needed"
            )


def augment(samples: np.ndarray, augmentation: Augmentation, *, seed: int) -> np.ndarray:
    """Change float32[n] at 16 kHz; float32[n / speed] with no peak above 0.97.

    Args:
      seed: of the noise.
    """
    if augmentation.speed != 1.0:
        samples = at_speed(samples, augmentation.speed)
    if augmentation.narrow_band:
        samples = telephone_band(samples)
    if augmentation.snr_db is not None:
        rng = np.random.default_rng(seed)
        noise = coloured_noise(len(samples), augmentation.noise_color, rng)
        if augmentation.narrow_band:
            noise = telephone_band(noise)
        samples = with_noise(samples, noise, augmentation.snr_db)
    return without_clipping(amplified(samples, augmentation.gain_db))


def without_clipping(samples: np.ndarray) -> np.ndarray:
    """float32[n], softer as a whole if its peak is above 0.97."""
    peak = np.abs(samples).max()
    return samples if peak <= HIGHEST_PEAK else samples * np.float32(HIGHEST_PEAK / peak)
