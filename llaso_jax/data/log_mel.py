"""Whisper's log-mel features, computed on the true length of the audio only.

Whisper pads a clip to 30 s before its STFT. All frames past the audio are then one constant, so
they need not be computed: `log_mel` gives the frames that audio touches, `pad_mel` the rest.
"""

import math
from functools import lru_cache

import numpy as np
import scipy.fft
import scipy.sparse

from llaso_jax.modeling.frames import CHUNK_MEL_FRAMES, CHUNK_SAMPLES, HOP_LENGTH, SAMPLE_RATE

N_FFT = 400  # 25 ms
N_FREQS = N_FFT // 2 + 1
HALF_WINDOW = N_FFT // 2
BLOCK_FRAMES = 160  # frames per FFT call: samples, spectrum and power together stay in L2 cache


def mel_frames(samples: int) -> int:
    """Valid mel frames of `samples` samples: ceil(samples / 160)."""
    return -(-samples // HOP_LENGTH)


def touched_frames(samples: int) -> int:
    """Frames whose window holds any audio: `mel_frames` and up to two more, at most 3000.

    Frame t reads samples 160t-199 … 160t+199 (the Hann window is 0 at its first point).
    """
    return min((samples + HALF_WINDOW - 2) // HOP_LENGTH + 1, CHUNK_MEL_FRAMES)


def log_mel(samples: np.ndarray, *, mel_bins: int) -> np.ndarray:
    """Log-mel features of one chunk, equal to WhisperFeatureExtractor's within 1e-4.

    Args:
        samples: float32[n] at 16 kHz, 1 <= n <= 480000.
        mel_bins: M, 80 or 128 for released Whisper models.

    Returns:
        float32[M, touched_frames(n)]. The first `mel_frames(n)` are the clip's own; later ones
        see its last samples through the window, and `pad_mel` needs them to be exact.

    Source: arXiv 2212.04356 section 2.2; transformers WhisperFeatureExtractor.
    """
    n = len(samples)
    if not 1 <= n <= CHUNK_SAMPLES:
        raise ValueError(f"{n} samples given; a chunk has 1 to {CHUNK_SAMPLES} (see chunk_audio)")
    frames = touched_frames(n)
    windows = np.lib.stride_tricks.sliding_window_view(_centred(samples, frames), N_FFT)
    windows = windows[::HOP_LENGTH]
    window, filters = _hann_window(), mel_filters(mel_bins)
    mel = np.empty((mel_bins, frames), np.float32)
    for start in range(0, frames, BLOCK_FRAMES):
        # [400, frames]: with frames innermost, the sparse filters work on contiguous rows
        block = windows[start : start + BLOCK_FRAMES].T * window
        spectrum = np.asarray(scipy.fft.rfft(block, axis=0, overwrite_x=True))
        squares = spectrum.view(np.float32)  # real and imaginary parts take turns
        squares *= squares
        mel[:, start : start + BLOCK_FRAMES] = filters @ (squares[:, ::2] + squares[:, 1::2])
    np.maximum(mel, 1e-10, out=mel)
    np.log10(mel, out=mel)
    # Frames past the audio are log10(1e-10) = -10, never the maximum.
    np.maximum(mel, mel.max() - 8.0, out=mel)
    mel += 4.0
    mel *= 0.25
    return mel


def pad_mel(mel: np.ndarray, frames: int, *, out: np.ndarray | None = None) -> np.ndarray:
    """Extend or cut float32[M, n] of `log_mel` to [M, frames] as if its audio had been zero-padded.

    Frames past the audio hold Whisper's floor (max(-10, max - 8) + 4) / 4. `out` receives the
    result when given.
    """
    if out is None:
        out = np.empty((mel.shape[0], frames), np.float32)
    n = min(mel.shape[1], frames)
    out[:, :n] = mel[:, :n]
    out[:, n:] = max(-1.5, float(mel.max()) - 2.0)
    return out


@lru_cache
def mel_filters(mel_bins: int) -> scipy.sparse.csr_matrix:
    """Slaney-scaled, Slaney-normalised triangular filters, sparse float32[M, 201].

    Two filters overlap at most, so 97 % of the dense matrix is zero.
    Source: librosa.filters.mel(sr=16000, n_fft=400, n_mels=M), formulae of the Auditory Toolbox.
    """
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(SAMPLE_RATE / 2), mel_bins + 2))
    freqs = np.linspace(0.0, SAMPLE_RATE / 2, N_FREQS)
    widths = np.diff(edges)
    ramps = edges[:, None] - freqs
    rising = -ramps[:-2] / widths[:-1, None]
    falling = ramps[2:] / widths[1:, None]
    weights = np.maximum(0.0, np.minimum(rising, falling))
    weights *= (2.0 / (edges[2:] - edges[:-2]))[:, None]  # equal area per filter
    return scipy.sparse.csr_matrix(weights.astype(np.float32))


# Slaney's scale: linear to 1000 Hz (15 mels), then 27 mels per factor 6.4.
_LINEAR_HZ_PER_MEL = 200.0 / 3
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = math.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    """`hz` >= 1000 only: all this module needs is the top of the scale."""
    return _BREAK_MEL + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(
        mel < _BREAK_MEL,
        mel * _LINEAR_HZ_PER_MEL,
        _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL)),
    )


@lru_cache
def _hann_window() -> np.ndarray:
    """Periodic Hann window, float32[400, 1]."""
    phase = 2.0 * np.pi * np.arange(N_FFT) / N_FFT
    return (0.5 - 0.5 * np.cos(phase)).astype(np.float32)[:, None]


def _centred(samples: np.ndarray, frames: int) -> np.ndarray:
    """What `frames` centred windows read of the clip padded to 30 s: its index 0 is sample -200."""
    n = len(samples)
    signal = np.zeros((frames - 1) * HOP_LENGTH + N_FFT, np.float32)
    head = samples[1 : HALF_WINDOW + 1]
    signal[HALF_WINDOW - len(head) : HALF_WINDOW] = head[::-1]
    body = min(n, len(signal) - HALF_WINDOW)
    signal[HALF_WINDOW : HALF_WINDOW + body] = samples[:body]
    # Past 30 s the padded clip is reflected: only a chunk that ends within 200 samples of it shows.
    past = len(signal) - HALF_WINDOW - CHUNK_SAMPLES
    if past > 0:
        mirrored = np.zeros(past, np.float32)
        tail = samples[CHUNK_SAMPLES - 1 - past : CHUNK_SAMPLES - 1]
        mirrored[: len(tail)] = tail
        signal[-past:] = mirrored[::-1]
    return signal
