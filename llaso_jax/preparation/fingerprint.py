"""Which recordings are the same sound, also after re-encoding, resampling, a change of level or in a longer file.

Each frame of 0.4 s becomes 32 bits: whether the difference of energy between neighbouring bands grows or shrinks from
frame to frame. Codecs and levels leave most of these signs as they are; other sounds agree in half of them.
Two recordings are one where, laid over each other, fewer bits differ than `most_wrong` allows.

Source: Haitsma and Kalker, A Highly Robust Audio Fingerprinting System, ISMIR 2002; 35 % of 256 frames there.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import soxr

from llaso_jax.modeling.frames import SAMPLE_RATE

RATE = 5_000
WINDOW = 2048  # 0.41 s
HOP = 80  # 16 ms
BANDS = np.geomspace(300, 2000, 34)  # Hz: what every telephone passes on
MOST_WRONG = 0.3  # share of differing bits; codecs stay below 0.2, other recordings are about 0.5
SPREAD = 2.4  # of that 0.5, for one frame: 0.5 - 2.4 / sqrt(256) is the source's 0.35
LEAST_OVERLAP = 0.8  # of the frames of the shorter recording
SILENT = 1e-4  # of the loudest frame's energy
BLOCK = 1024  # frames at a time: 8 MB, whatever the length of the recording
_EDGES = np.round(BANDS / RATE * WINDOW).astype(int)
_HANN = np.hanning(WINDOW).astype(np.float32)
_EMPTY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Fingerprint:
    """words: uint32[F], 32 bits a frame; sounds: bool[F], whether the frame is not silence."""

    words: np.ndarray
    sounds: np.ndarray

    def __len__(self) -> int:
        return len(self.words)


class Match(NamedTuple):
    """A known recording found in another: its name, frames from the other's start, share of differing bits."""

    name: str
    offset: int
    wrong: float


def content_hash(samples: np.ndarray) -> str:
    """SHA-256 of float32[n] at 16 kHz as 16-bit samples: the same for the same sound in any lossless file."""
    pcm = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2")
    return hashlib.sha256(pcm.tobytes()).hexdigest()


def fingerprint(samples: np.ndarray) -> Fingerprint:
    """The frames of float32[n] at 16 kHz; shorter than 0.4 s are padded with silence."""
    sound = soxr.resample(samples.astype(np.float32), SAMPLE_RATE, RATE)
    sound = np.pad(sound, (0, max(0, WINDOW + HOP - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(sound, WINDOW)[::HOP]
    blocks = (frames[i : i + BLOCK] for i in range(0, len(frames), BLOCK))
    energy = np.concatenate([_band_energy(block) for block in blocks])
    slope = energy[:, :-1] - energy[:, 1:]
    bits = slope[1:] > slope[:-1]
    words = np.packbits(bits, axis=1).view("<u4")[:, 0]
    total = energy[1:].sum(1)
    return Fingerprint(words, total > SILENT * total.max())


def most_wrong(frames: int) -> float:
    """Share of bits that may differ where `frames` are compared: less for few, which agree by chance more often.

    Of 1.4 million pairs of other recordings nine agreed in more than 70 % of their bits, all of 19 to 59 frames; the
    nearest differed in 29 % of 59, where 19 % would pass. Below 24 frames (0.8 s) nothing does.
    """
    return min(MOST_WRONG, 0.5 - SPREAD / max(1, frames) ** 0.5)


class FingerprintIndex:
    """Known recordings, to be found in others.

    A frame that differs in at most one bit points to where the two may lie over each other; whether they do is
    decided by all their frames.

    Args:
        known: fingerprints by name.
    """

    def __init__(self, known: Mapping[str, Fingerprint]) -> None:
        self._names = list(known)
        self._known = list(known.values())
        flips = np.concatenate([[0], 1 << np.arange(32, dtype=np.uint64)]).astype(np.uint32)
        words, clips, frames = [np.zeros(0, np.uint32)], [_EMPTY], [_EMPTY]
        for number, print_ in enumerate(self._known):
            at = np.flatnonzero(print_.sounds)
            words.append((print_.words[at, None] ^ flips).reshape(-1))
            clips.append(np.full(len(at) * len(flips), number))
            frames.append(np.repeat(at, len(flips)))
        joined = np.concatenate(words)
        order = np.argsort(joined, kind="stable")
        self._words = joined[order]
        self._clips = np.concatenate(clips)[order]
        self._frames = np.concatenate(frames)[order]

    def find(self, other: Fingerprint) -> list[Match]:
        """Every known recording that is in `other`, or that `other` is a part of; the best place of each."""
        at = np.flatnonzero(other.sounds)
        first = np.searchsorted(self._words, other.words[at], side="left")
        count = np.searchsorted(self._words, other.words[at], side="right") - first
        hits = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        places = np.stack([self._clips[hits], np.repeat(at, count) - self._frames[hits]], axis=1)
        best: dict[str, Match] = {}
        for clip, offset in np.unique(places, axis=0).tolist():
            wrong, frames = _wrong(self._known[clip], other, offset)
            name = self._names[clip]
            if wrong < most_wrong(frames) and (name not in best or wrong < best[name].wrong):
                best[name] = Match(name, offset, wrong)
        return list(best.values())


def _band_energy(frames: np.ndarray) -> np.ndarray:
    """f32[F, 33] of f32[F, WINDOW]."""
    power = np.abs(np.fft.rfft(frames * _HANN)) ** 2
    return np.add.reduceat(power, _EDGES, axis=1)[:, :-1]


def _wrong(known: Fingerprint, other: Fingerprint, offset: int) -> tuple[float, int]:
    """Share of bits that differ where both lie over each other and the known one sounds, and how many frames that are.

    No frames where the overlap is too short.
    """
    start, end = max(0, -offset), min(len(known), len(other) - offset)
    sounds = known.sounds[start:end]
    frames = int(sounds.sum())
    if end - start < LEAST_OVERLAP * min(len(known), len(other)) or not frames:
        return 1.0, 0
    differ = known.words[start:end] ^ other.words[start + offset : end + offset]
    return float(np.bitwise_count(differ[sounds]).mean() / 32), frames
