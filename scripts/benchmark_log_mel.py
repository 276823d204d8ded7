"""Time log-mel extraction against transformers' WhisperFeatureExtractor, outputs checked first.

python scripts/benchmark_log_mel.py [--repeats 20] [--threads 1]

Both sides run in turn in one process on the same clips; times are CPU milliseconds of this process
(median and the middle half), so other load on the machine disturbs them little.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

SECONDS = (1, 3, 9, 15, 30)


def main() -> None:
    """Print one row per clip length."""
    parser = argparse.ArgumentParser(description="Time log-mel extraction.")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mel-bins", type=int, default=128)
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # before numpy and torch make their pools

    import numpy as np
    import torch
    from transformers import WhisperFeatureExtractor

    from llaso_jax.data.log_mel import log_mel, pad_mel

    torch.set_num_threads(args.threads)
    extractor = WhisperFeatureExtractor(feature_size=args.mel_bins)
    rng = np.random.default_rng(0)
    print(
        f"{args.repeats} repeats, {args.threads} thread(s), {args.mel_bins} mels, CPU ms per clip"
    )
    print(f"load average before: {os.getloadavg()[0]:.2f}")
    columns = ["seconds", *(f"{n:20}" for n in ("HF torch", "HF numpy", "llaso_jax"))]
    print(" | ".join([*columns, "x torch", "x np", "max diff"]))
    for seconds in SECONDS:
        clip = (0.1 * rng.standard_normal(16_000 * seconds)).astype(np.float32)

        def hf_torch(clip: np.ndarray = clip) -> np.ndarray:
            return extractor(clip, sampling_rate=16_000, return_tensors="np").input_features[0]

        def hf_numpy(clip: np.ndarray = clip) -> np.ndarray:
            padded = np.pad(clip, (0, 480_000 - len(clip)))
            return extractor._np_extract_fbank_features(padded[None], "cpu")[0]

        def ours(clip: np.ndarray = clip) -> np.ndarray:
            return log_mel(clip, mel_bins=args.mel_bins)

        expected = hf_torch()
        difference = float(np.abs(pad_mel(ours(), 3000) - expected).max())
        if difference > 1e-4 or np.abs(hf_numpy() - expected).max() > 1e-4:
            raise SystemExit(
                f"outputs differ by {difference:.1e} on {seconds} s: nothing to compare"
            )
        times = interleave([hf_torch, hf_numpy, ours], args.repeats)
        medians = [statistics.median(t) for t in times]
        cells = " | ".join(f"{m:6.2f} ({spread(t)})" for m, t in zip(medians, times, strict=True))
        ratios = f"{medians[0] / medians[2]:7.1f} | {medians[1] / medians[2]:4.1f}"
        print(f"{seconds:7d} | {cells} | {ratios} | {difference:.1e}")


def interleave(functions: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """CPU milliseconds of each function, run in turn so that drift hits all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, collected in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            collected.append((time.process_time() - start) * 1e3)
    return times


def spread(times: list[float]) -> str:
    """The middle half: first to third quartile."""
    low, _, high = statistics.quantiles(times, n=4)
    return f"{low:5.2f}-{high:5.2f}"


if __name__ == "__main__":
    main()
