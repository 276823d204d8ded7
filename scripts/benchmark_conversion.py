"""Time and memory of conversion on a random checkpoint of LLaSO-Base's size, against transformers.

python scripts/benchmark_conversion.py --work DIR [--repeats 3] [--size base] [--mesh 8x1] [--tasks load shards ...]

Makes a checkpoint in LLaSO layout (bfloat16; `base`: 3.8 B parameters, 7.7 GB) and the same weights as stock Llama
and Whisper folders, if DIR has none yet. Then, each in a process of its own and all in turn:

  mapped         from_pretrained of the Llama and the Whisper folder with torch: views of the mapped files, whose
                 pages are touched
  transformers   the same, every weight then copied to memory of its own, as training and devices need it
  resaved        the same two models loaded and written again by torch (`save_pretrained`): what import and export
                 do, reading and writing, beside
  load           the LLaSO folder onto one device (`load_params`): as many copies as transformers makes
  shards         the same onto the devices of the mesh: every row of a matrix goes to several arrays
  import         the LLaSO folder into a model folder (`llaso convert from-hf`)
  export         that model folder into a LLaSO folder (`llaso convert to-hf`)

At the end the exported files are compared with the first ones, byte by byte. Memory is the peak of resident memory
above what the process held once its libraries were imported. DIR needs five times the checkpoint's size.
Warm: all other files are dropped from the page cache and the task's own are read just before it; cold: those too are
dropped (as far as the kernel can).
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SIZES = ("base", "tiny")
SOURCES_OF = {
    "mapped": ("llama", "whisper"),
    "transformers": ("llama", "whisper"),
    "resaved": ("llama", "whisper"),
    "load": ("llaso",),
    "shards": ("llaso",),
    "import": ("llaso",),
    "export": ("model",),
}
TASKS = tuple(SOURCES_OF)


def main() -> None:
    """Make the checkpoint, run every task, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--mesh", default="8x1")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--cold", action="store_true", help="drop the sources from the page cache")
    parser.add_argument("--task", choices=("make", *TASKS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(run_task(args)))
        return
    if not (args.work / "llaso" / "config.json").is_file():
        child(args, "make")
    rows: dict[str, list[dict[str, float]]] = {task: [] for task in args.tasks}
    for _ in range(args.repeats):
        for task, results in rows.items():
            results.append(child(args, task))
    compared = "export" in args.tasks
    differing = compare(args.work / "llaso", args.work / "exported") if compared else []
    print(
        f"size {args.size}, mesh {args.mesh}, {'cold' if args.cold else 'warm'} cache, bfloat16, "
    )
    print(f"{args.repeats} repeats; load average now {os.getloadavg()[0]:.1f}")
    if compared:
        print(f"exported files that differ from the first: {differing or 'none'}")
    print(
        "| task | seconds: median (least to most) | x transformers | peak memory above base, GB |"
    )
    print("|---|---|---|---|")
    reference = None
    if "transformers" in rows:
        reference = statistics.median(row["seconds"] for row in rows["transformers"])
    for task, results in rows.items():
        seconds = [row["seconds"] for row in results]
        median = statistics.median(seconds)
        memory = max(row["gigabytes"] for row in results)
        factor = f"{median / reference:.2f}" if reference else ""
        print(
            f"| {task} | {median:.1f} ({min(seconds):.1f} to {max(seconds):.1f}) "
            f"| {factor} | {memory:.2f} |"
        )
    if differing:
        raise SystemExit(1)


def child(args: argparse.Namespace, task: str) -> dict[str, float]:
    """Run one task in a fresh process; its last line is its result."""
    if task != "make":
        drop_from_cache(args.work)
        if not args.cold:
            for folder in SOURCES_OF[task]:
                read(args.work / folder)
    command = [sys.executable, __file__, "--work", str(args.work), "--task", task]
    done = subprocess.run(
        [*command, "--size", args.size, "--mesh", args.mesh],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{task} failed with code {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{task}: {result}", file=sys.stderr, flush=True)
    return result


def run_task(args: argparse.Namespace) -> dict[str, float]:
    """Seconds and gigabytes of one task in this process."""
    prepare = {
        "make": make_checkpoint,
        "mapped": load_with_transformers,
        "transformers": load_with_transformers,
        "resaved": save_with_transformers,
        "load": functools.partial(load_onto_devices, "1x1"),
        "shards": functools.partial(load_onto_devices, args.mesh),
        "import": import_to_orbax,
        "export": export_to_llaso,
    }[args.task]
    work = prepare(args)
    base = memory("VmRSS")
    start = time.perf_counter()
    work()
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "gigabytes": round(memory("VmHWM") - base, 3),
    }


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process, in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e9
    raise SystemExit(f"/proc/self/status has no {field}: this script needs Linux")


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the contents of all files below `folder`."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """Bring all files below `folder` into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


# --- the tasks: each imports what it needs, then returns what is timed ---------------------------


def make_checkpoint(args: argparse.Namespace) -> Callable[[], None]:
    """Random weights in three layouts; the same for the same size."""
    import ml_dtypes
    import numpy as np

    from llaso_jax.conversion import export_llama, export_llaso, export_whisper
    from llaso_jax.conversion.tensors import ComputedTensor
    from llaso_jax.modeling.functional import abstract_params
    from llaso_jax.modeling.llama import LlamaConfig
    from llaso_jax.modeling.speech_lm import SpeechLMConfig
    from llaso_jax.modeling.whisper import WhisperConfig

    cfg = SpeechLMConfig()
    if args.size == "tiny":
        cfg = SpeechLMConfig(
            audio=WhisperConfig(encoder_layers=2, d_model=128, encoder_attention_heads=2),
            text=LlamaConfig(
                vocab_size=512,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
        )
    dtype = np.dtype(ml_dtypes.bfloat16)

    def tensor(name: str, shape: tuple[int, ...]) -> ComputedTensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

        def values() -> np.ndarray:
            return (0.02 * np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(
                dtype
            )

        return ComputedTensor(shape, dtype, values)

    pieces = {}
    for path, info in abstract_params(cfg).items():
        shapes = [info.shape[1:]] * info.shape[0] if info.stacked else [info.shape]
        pieces[path] = [tensor(f"{path}/{i}", shape) for i, shape in enumerate(shapes)]

    def make() -> None:
        export_llama(args.work / "llama", cfg, pieces)
        export_whisper(args.work / "whisper", cfg, pieces)
        export_llaso(args.work / "llaso", cfg, pieces)

    return make


def load_with_transformers(args: argparse.Namespace) -> Callable[[], None]:
    """The Llama and the Whisper folder as torch modules; task `transformers`: in memory of their own."""
    import torch
    from transformers import LlamaForCausalLM, WhisperModel

    def load() -> None:
        llama = LlamaForCausalLM.from_pretrained(args.work / "llama", dtype=torch.bfloat16)
        whisper = WhisperModel.from_pretrained(args.work / "whisper", dtype=torch.bfloat16)
        for model in (llama, whisper):
            for parameter in model.parameters():
                if args.task == "transformers":
                    parameter.data = parameter.data.clone()
                else:
                    parameter.data.flatten()[::2048].float().sum()

    return load


def save_with_transformers(args: argparse.Namespace) -> Callable[[], None]:
    """The Llama and the Whisper folder loaded and written as such folders again."""
    import torch
    from transformers import LlamaForCausalLM, WhisperModel

    target = args.work / "resaved"
    shutil.rmtree(target, ignore_errors=True)

    def save() -> None:
        for name, kind in (("llama", LlamaForCausalLM), ("whisper", WhisperModel)):
            model = kind.from_pretrained(args.work / name, dtype=torch.bfloat16)
            model.save_pretrained(target / name)

    return save


def load_onto_devices(mesh_text: str, args: argparse.Namespace) -> Callable[[], None]:
    """The LLaSO folder as arrays on a mesh."""
    from llaso_jax.conversion import gather_weights, load_params
    from llaso_jax.modeling.functional import param_shardings
    from llaso_jax.sharding.mesh import make_mesh

    mesh = make_mesh(mesh_text)

    def load() -> None:
        weights = gather_weights(args.work / "llaso")
        load_params(weights, param_shardings(weights.cfg, mesh))

    return load


def import_to_orbax(args: argparse.Namespace) -> Callable[[], None]:
    """The LLaSO folder as a model folder."""
    from llaso_jax.conversion import gather_weights, stream_model
    from llaso_jax.sharding.mesh import make_mesh

    mesh = make_mesh(args.mesh)
    target = args.work / "model"
    shutil.rmtree(target, ignore_errors=True)

    def convert() -> None:
        stream_model(target, gather_weights(args.work / "llaso"), mesh=mesh)

    return convert


def export_to_llaso(args: argparse.Namespace) -> Callable[[], None]:
    """The model folder as a LLaSO folder."""
    from llaso_jax.conversion import export_llaso, open_model

    target = args.work / "exported"
    shutil.rmtree(target, ignore_errors=True)

    def convert() -> None:
        weights = open_model(args.work / "model")
        export_llaso(target, weights.cfg, weights.pieces, hf_config=weights.hf_config)

    return convert


def compare(first: Path, second: Path) -> list[str]:
    """Names of weight files that are not the same bytes in both folders."""
    names = sorted(path.name for path in first.iterdir() if path.suffix in (".safetensors", ".bin"))
    return [name for name in names if digest(first / name) != digest(second / name)]


def digest(path: Path) -> str:
    """SHA-256 of a file, "" if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
