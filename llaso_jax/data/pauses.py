"""Long recordings in parts, cut where they are quietest: a model transcribes what is as long as what it learnt from."""

import itertools
import math

import numpy as np

from llaso_jax.data.audio import LoadedAudio
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.frames import SAMPLE_RATE

PAUSE_SECONDS = 0.3
"""Energy is averaged over so long: gaps inside a word (closures of stops, 0.05 to 0.15 s) are no pauses."""
SHORTEST_PART_SECONDS = 1.0


def split_at_pauses(audio: LoadedAudio, longest_seconds: float) -> list[LoadedAudio]:
    """`audio` in parts of at most `longest_seconds`, itself where it is no longer; joined they are `audio`.

    Each cut is where the mean energy of 0.3 s is least, between a half and all of the longest part; at the end
    between what leaves no more than one part and leaves it a quarter.

    Returns:
      The parts in order. What was dropped of `audio` counts to the last one.

    Raises:
      ConfigError: parts of less than a second.
    """
    check_part_seconds(longest_seconds)
    longest = int(longest_seconds * SAMPLE_RATE)
    if len(audio.samples) <= longest:
        return [audio]
    energy = _mean_energy(audio.samples)
    cuts, end = [0], len(audio.samples)
    while (left := end - cuts[-1]) > longest:
        first, last = longest // 2, longest
        if left <= 2 * longest:
            first, last = max(left - longest, longest // 4), min(longest, left - longest // 4)
        window = energy[cuts[-1] + first : cuts[-1] + last + 1]
        quietest = len(window) - 1 - int(np.argmin(window[::-1]))  # of equal ones the last
        cuts.append(cuts[-1] + first + quietest)
    edges = [*cuts, end]
    return [
        _part(audio, start, stop, is_last=stop == end) for start, stop in itertools.pairwise(edges)
    ]


def check_part_seconds(seconds: float | None) -> None:
    """Raise ConfigError unless parts are at least a second, or None: recordings stay whole."""
    if seconds is not None and not SHORTEST_PART_SECONDS <= seconds < math.inf:
        raise ConfigError(
            f"part_seconds={seconds:g} is not a number of at least {SHORTEST_PART_SECONDS:g}: choose about the "
            "length of the longest recordings that the model was trained on, or leave it out."
        )


def _mean_energy(samples: np.ndarray) -> np.ndarray:
    """f64[n + 1]: mean square around the place before each sample, and behind the last one."""
    half = int(PAUSE_SECONDS * SAMPLE_RATE / 2)
    sums = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    places = np.arange(len(samples) + 1)
    low, high = np.maximum(places - half, 0), np.minimum(places + half, len(samples))
    return (sums[high] - sums[low]) / np.maximum(high - low, 1)


def _part(audio: LoadedAudio, start: int, stop: int, *, is_last: bool) -> LoadedAudio:
    used = (stop - start) / SAMPLE_RATE
    dropped = audio.seconds_dropped if is_last else 0.0
    return LoadedAudio(audio.samples[start:stop], used + dropped, used, dropped)
