"""Seconds per training step with and without a cache of encoder outputs, on this machine.

python scripts/benchmark_encoder_cache.py [--steps 12] [--clips 48] [--mode true_length]

Trains the projector between Whisper tiny.en and SmolLM2-135M: their sizes, random weights, noise of 2 to 8 s as speech.
Times are whole steps, from a packed batch to updated weights: medians without the first, in which programs are
compiled, and of `filling` the steps with the encoder only. CPU seconds count all threads and tell more than the
clock on a busy machine. Losses of all three ways must be equal.
"""

import argparse
import contextlib
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from rich.console import Console

from llaso_jax.config import RunConfig, parse_config, resolve_path
from llaso_jax.data.tokenizer import load_tokenizer
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.training.loop import StageRun, Workplace
from llaso_jax.training.metrics import MetricsWriter
from llaso_jax.training.optimizer import learning_rate_at
from llaso_jax.training.run import initial_params, model_config
from llaso_jax.training.state import Layout

SECONDS = (2, 8)
WIDTH = 384
SIZES = {
    "audio": {
        "num_mel_bins": 80,
        "d_model": WIDTH,
        "encoder_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
    },
    "projector": {"stack": 4},
    "text": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    """Print a line per way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--mode", choices=("true_length", "trimmed"), default="true_length")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audio = write_clips(folder, args.clips)
        cache = folder / "cache"
        found = {
            "without": losses_and_seconds(recipe(folder, args.mode, None), folder, args.steps),
            "filling": losses_and_seconds(
                recipe(folder, args.mode, cache), folder, args.steps, filling=True
            ),
            "reading": losses_and_seconds(recipe(folder, args.mode, cache), folder, args.steps),
        }
        size = sum(path.stat().st_size for path in cache.glob("*/*/*"))
        kept = len(list(cache.glob("*/*/*")))
    for way, (losses, times) in found.items():
        same = "equal" if losses == found["without"][0] else "NOT EQUAL"
        wall, busy = (statistics.median(time) for time in zip(*times, strict=True))
        print(f"{way:8} {wall:.3f} s, {busy:.3f} CPU s a step; losses {same}", flush=True)
    print(
        f"{kept} of {args.clips} clips kept, {size / (audio * kept / args.clips):.0f} bytes per second"
    )


def write_clips(folder: Path, count: int) -> float:
    """Records and their audio; returns seconds of it."""
    rng = np.random.default_rng(0)
    records, total = [], 0
    for i in range(count):
        samples = int(16_000 * rng.uniform(*SECONDS))
        sf.write(folder / f"{i}.wav", 0.1 * rng.normal(size=samples), 16_000)
        turns = [
            {"from": "human", "value": "Write down what is said.<audio>"},
            {"from": "gpt", "value": "turn on the garden fan and close the bedroom door"},
        ]
        records.append({"voice": [f"{i}.wav"], "id": f"{i}", "conversations": turns})
        total += samples
    (folder / "train.json").write_text(json.dumps(records))
    return total / 16_000


def recipe(folder: Path, mode: str, cache: Path | None) -> RunConfig:
    """One stage that trains the projector."""
    data = {
        "train_json": [str(folder / "train.json")],
        "sequence_length": 384,
        "rows": 4,
        "chunks_per_row": 3,
        "answers_per_row": 96,
        "mel_buckets": [800] if mode == "true_length" else [3000],
        "epochs": None,
        "feature_cache_mb": 200,
        "encoder_cache": cache and str(cache),
    }
    stage = {
        "name": "align",
        "data": data,
        "max_steps": 10**6,
        "parameters": [
            {"pattern": "projector/.*"},
            {"pattern": ".*", "learning_rate_scale": None},
        ],
    }
    tree: dict[str, Any] = {
        "name": "benchmark",
        "tokenizer": "package:data/mini/tokenizer",
        "model": {"audio_mode": mode, **SIZES},
        "prompt": {"system_prompt": ""},
        "stages": [stage],
    }
    return parse_config(RunConfig, tree)


def losses_and_seconds(
    cfg: RunConfig, folder: Path, steps: int, *, filling: bool = False
) -> tuple[list[float], list[tuple[float, float]]]:
    """Losses of all steps; clock and CPU seconds from the second on, if `filling` of those that encode."""
    stage, model = cfg.stages[0], model_config(cfg)
    layout = Layout.of(model, make_mesh("1x1"), cfg.sharding.rules())
    params, _ = initial_params(cfg, model, layout)
    losses, times = [], []
    with MetricsWriter(None, tensorboard=False) as metrics:
        place = Workplace(
            model=model,
            layout=layout,
            tokenizer=load_tokenizer(resolve_path(cfg.tokenizer)),
            prompt=cfg.prompt,
            precision=cfg.precision,
            checkpoint=cfg.checkpoint,
            logging=cfg.logging,
            seed=cfg.seed,
            output=folder,
            metrics=metrics,
            console=Console(quiet=True),
        )
        run = StageRun(place, stage, params)
        with contextlib.closing(run.data):
            feed = run.data.feed(lambda: None)
            for number in range(steps):
                batch = feed.take()
                assert batch is not None
                started = time.perf_counter(), time.process_time()
                rate = np.float32(learning_rate_at(number / steps, stage.optimizer))
                run.state, result = run.train_step(
                    run.state, run.frozen, run.place_batch(batch), rate
                )
                losses.append(float(result.loss))
                if number and (batch.stats.chunks_to_encode or not filling):
                    wall, busy = time.perf_counter() - started[0], time.process_time() - started[1]
                    times.append((wall, busy))
                    logging.info("step %d: %.2f s, %.2f CPU s", number, wall, busy)
        if run.encoder is not None:
            run.encoder.keep()
    return losses, times


if __name__ == "__main__":
    main()
