"""What can be done to samples: noise added, played faster, made louder, kept to the telephone's band."""

from typing import Literal

import numpy as np
import scipy.fft
import soxr

from llaso_jax.modeling.frames import SAMPLE_RATE

NoiseColor = Literal["white", "pink", "brown"]
TELEPHONE_RATE = 8_000
# Power falls with frequency to this power. Below 50 Hz it is flat: brown noise would be rumble only.
NOISE_EXPONENTS: dict[NoiseColor, float] = {"white": 0.0, "pink": 1.0, "brown": 2.0}
FLAT_BELOW_HZ = 50.0


def with_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """f32[n] samples and noise, the noise scaled so that the ratio of their powers is `snr_db`.

    Silence has no such ratio and stays as it is.
    """
    signal, disturbance = (
        np.mean(samples.astype(np.float64) ** 2),
        np.mean(noise.astype(np.float64) ** 2),
    )
    if not signal or not disturbance:
        return samples
    scale = np.sqrt(signal / disturbance / 10 ** (snr_db / 10))
    return samples + np.float32(scale) * noise


def coloured_noise(length: int, color: NoiseColor, rng: np.random.Generator) -> np.ndarray:
    """f32[length] Gaussian noise: white, pink (-3 dB an octave) or brown (-6 dB an octave)."""
    size = int(scipy.fft.next_fast_len(length, real=True))  # pyright: ignore[reportArgumentType]
    hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    shape = np.maximum(hertz, FLAT_BELOW_HZ) ** (-NOISE_EXPONENTS[color] / 2)
    white = np.asarray(scipy.fft.rfft(rng.standard_normal(size, np.float32)))
    return np.asarray(scipy.fft.irfft(white * shape.astype(np.float32), size))[:length]


def at_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """f32[n / factor]: played `factor` times as fast; the pitch rises with it."""
    return soxr.resample(samples, SAMPLE_RATE * factor, SAMPLE_RATE).astype(np.float32)


def telephone_band(samples: np.ndarray) -> np.ndarray:
    """f32[n] without what lies above 4 kHz: at 8 kHz and back."""
    narrow = soxr.resample(samples, SAMPLE_RATE, TELEPHONE_RATE)
    wide = soxr.resample(narrow, TELEPHONE_RATE, SAMPLE_RATE)[: len(samples)]
    return np.pad(wide, (0, len(samples) - len(wide)))


def amplified(samples: np.ndarray, gain_db: float) -> np.ndarray:
    """f32[n] times a gain in dB."""
    return samples * np.float32(10 ** (gain_db / 20))


def level_db(samples: np.ndarray) -> float:
    """Root mean square of samples that are not all zero, in dB of full scale."""
    return float(10 * np.log10(np.mean(samples.astype(np.float64) ** 2)))
