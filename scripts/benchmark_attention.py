"""Time and memory of the attention implementations at LLaSO's shapes, outputs checked equal first.

python scripts/benchmark_attention.py [--repeats 5] [--long]

Implementations run in turn in one process, f32, one row. Memory is the compiler's figure for temporaries.
`--long` adds 4,096 positions, which take the plain form 5 GB and minutes on two cores.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Literal

IMPLEMENTATIONS: tuple[Literal["reference", "chunked"], ...] = ("reference", "chunked")
# name, positions, query heads, key/value heads, head width, causal
SHAPES = (
    ("Whisper-large-v3 layer, 30 s", 1500, 20, 20, 64, False),
    ("Llama-3.2-3B layer, 30 s and a prompt", 1560, 24, 8, 128, True),
)
LONG = ("Llama-3.2-3B layer, 4,096", 4096, 24, 8, 128, True)


def main() -> None:
    """Print one row per shape, direction and implementation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()

    import jax
    import numpy as np

    from llaso_jax.modeling.kernels.attention import attention

    print(f"{jax.devices()[0].device_kind}; load average before: {os.getloadavg()[0]:.2f}")
    print("| shape | direction | implementation | ms: median (least to most) | temporaries, MiB |")
    print("|---|---|---|---|---|")
    for name, positions, heads, kv, width, causal in (*SHAPES, *([LONG] if args.long else [])):
        inputs = tuple(
            jax.random.normal(jax.random.key(seed), (1, positions, count, width))
            for seed, count in enumerate((heads, kv, kv))
        )

        def forward(
            implementation: Literal["reference", "chunked"], causal: bool = causal
        ) -> Callable[..., jax.Array]:
            return lambda q, k, v: attention(q, k, v, causal=causal, implementation=implementation)

        def both(
            implementation: Literal["reference", "chunked"],
        ) -> Callable[..., tuple[jax.Array, ...]]:
            compute = forward(implementation)
            return jax.grad(lambda *x: (compute(*x) ** 2).sum(), (0, 1, 2))

        for direction, make in (("forward", forward), ("and back", both)):
            programs = {i: jax.jit(make(i)).lower(*inputs).compile() for i in IMPLEMENTATIONS}
            results = {i: jax.tree.leaves(program(*inputs)) for i, program in programs.items()}
            for ours, expected in zip(results["chunked"], results["reference"], strict=True):
                apart = np.abs(ours - expected).max() / np.abs(expected).max()
                if apart > 1e-5:
                    raise SystemExit(f"{name}: results are {apart:.1e} apart: nothing to compare")
            times: dict[str, list[float]] = {i: [] for i in IMPLEMENTATIONS}
            for _ in range(args.repeats):
                for implementation, program in programs.items():
                    start = time.perf_counter()
                    jax.block_until_ready(program(*inputs))
                    times[implementation].append((time.perf_counter() - start) * 1e3)
            for implementation, spent in times.items():
                analysis = programs[implementation].memory_analysis()
                memory = analysis.temp_size_in_bytes / 2**20 if analysis else float("nan")
                print(
                    f"| {name} | {direction} | {implementation} | {statistics.median(spent):.0f} "
                    f"({min(spent):.0f} to {max(spent):.0f}) | {memory:.0f} |"
                )


if __name__ == "__main__":
    main()
