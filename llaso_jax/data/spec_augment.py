"""SpecAugment: masks over mel bins and frames of training samples (arXiv 1904.08779, without time warping).

What is masked follows from the seed and the sample's position in the order of training, which tells its pass
over the data too: a resumed run, and any number of processes, draw the same masks.
"""

from dataclasses import replace

import numpy as np

from llaso_jax.data.config import SpecAugmentConfig
from llaso_jax.data.samples import Sample


def spec_augment(sample: Sample, position: int, *, config: SpecAugmentConfig, seed: int) -> Sample:
    """`sample` with masked features, or itself where its task or its metadata rule that out.

    Args:
        sample: its arrays are not changed.
        position: in the order of training.
        config: number and size of the masks.
        seed: of the masks.
    """
    if not sample.may_be_masked or sample.task in config.except_tasks:
        return sample
    rng = np.random.default_rng((seed, position))
    mels = (
        masked(mel, int(frames), config, rng)
        for mel, frames in zip(sample.mels, sample.mel_frames, strict=True)
    )
    return replace(sample, mels=tuple(mels))


def masked(
    mel: np.ndarray, frames: int, config: SpecAugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """A copy of float32[M, n] log-mel features with masks, filled with the mean, over the first `frames`.

    Source: section 2 of the paper; widths are uniform from 0 to the largest, then places.
    """
    out = mel.copy()
    audio, mean = out[:, :frames], mel[:, :frames].mean()
    for _ in range(config.frequency_masks):
        start, end = _span(len(mel), min(config.frequency_width, len(mel)), rng)
        audio[start:end] = mean
    longest = min(config.time_width, int(config.time_share * frames))
    for _ in range(config.time_masks):
        start, end = _span(frames, longest, rng)
        audio[:, start:end] = mean
    # Whisper's floor, which padding is filled with, is relative to the loudest point of the clip (see `pad_mel`).
    loudest = np.unravel_index(mel.argmax(), mel.shape)
    out[loudest] = mel[loudest]
    return out


def _span(size: int, widest: int, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(widest + 1))
    start = int(rng.integers(size - width + 1))
    return start, start + width
