"""What every engine's samples are made to be: 16 kHz, not silent, without silence at the ends."""

import numpy as np

from llaso_jax.modeling.frames import SAMPLE_RATE as SAMPLE_RATE
from llaso_jax.speech.errors import SynthesisError
from llaso_jax.speech.voice import Voice

SILENCE = 0.01  # of the peak
MARGIN_SECONDS = 0.02  # kept at both ends: an f or an h begins below the threshold


def trim(samples: np.ndarray, *, margin: int = 0) -> np.ndarray:
    """float32[n] without what is quieter than 1 % of the peak at both ends, but for `margin` samples."""
    loud = np.flatnonzero(np.abs(samples) > SILENCE * np.abs(samples).max())
    return samples[max(loud[0] - margin, 0) : loud[-1] + 1 + margin]


def spoken(samples: np.ndarray, text: str, voice: Voice) -> np.ndarray:
    """float32[n] of an engine, trimmed.

    Raises:
      SynthesisError: no samples, nothing but silence, or samples that are not finite.
    """
    if not len(samples) or not np.isfinite(samples).all() or not np.any(samples):
        raise SynthesisError(f"{voice.engine} gives no sound for {text!r} in {voice}")
    return trim(samples.astype(np.float32, copy=False), margin=round(MARGIN_SECONDS * SAMPLE_RATE))
