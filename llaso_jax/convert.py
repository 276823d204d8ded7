"""`llaso convert`: weights in from Hugging Face, LLaSO, CTranslate2 and GGUF; Hugging Face folders out."""

import argparse
import contextlib
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llaso_jax.conversion import (
    ExportOptions,
    Weights,
    export_llama,
    export_llaso,
    export_whisper,
    gather_weights,
    inspection_report,
    is_model_folder,
    open_model,
    stream_model,
    verification_report,
)
from llaso_jax.conversion.inspection import inspect_source
from llaso_jax.conversion.loading import Progress as OnTensor
from llaso_jax.conversion.tables import PARTS, slots
from llaso_jax.conversion.tensors import target_dtype
from llaso_jax.conversion.tokenizer_files import fit_tokenizer
from llaso_jax.conversion.verification import verify as verify_weights
from llaso_jax.conversion.writing import check_target
from llaso_jax.errors import LlasoError
from llaso_jax.modeling.frames import AUDIO_MODES
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.rules import ShardingError

EXAMPLES = """\
examples:
  Whisper + Llama + a random projector, the start of stage 1
    llaso convert from-hf whisper-large-v3/ Llama-3.2-3B-Instruct/ --output base/
  a whole LLaSO checkpoint, in bfloat16, sharded over 8 devices
    llaso convert from-hf LLaSO-Base-3.8B-Instruct/ --output llaso/ --dtype bfloat16 --mesh 8x1
  a LLaSO checkpoint without its tower, with another projector
    llaso convert from-hf checkpoint/ --whisper whisper-large-v3/ --projector mm_audio_aligner.bin -o llaso/
  a LLaSO checkpoint with a LoRA adapter of PEFT merged into it
    llaso convert from-hf LLaSO-Base-3.8B-Instruct/ lora-adapter/ --output tuned/
  a CTranslate2 Whisper and a GGUF Llama
    llaso convert from-hf faster-whisper-tiny/ SmolLM2-135M-Instruct.gguf --output small/
  back to a LLaSO folder, and to folders transformers loads
    llaso convert to-hf llaso/ --output hf/ --whisper hf-whisper/ --llama hf-llama/
  what is this, is it whole, and which command converts it
    llaso convert inspect LLaSO-Base-3.8B-Instruct/
  are these the same model
    llaso convert verify llaso/ hf/
"""
VERIFY_EXAMPLES = """\
examples:
  a model folder and what was exported from it
    llaso convert verify llaso/ hf/
    llaso convert verify llaso/ hf-whisper/ hf-llama/
  a bfloat16 copy: within the rounding of bfloat16, or exactly that rounding
    llaso convert verify llaso/ llaso-bf16/
    llaso convert verify llaso/ llaso-bf16/ --dtype bfloat16
  on another clip, with a tolerance of your own
    llaso convert verify llaso/ other/ --audio question.wav --tolerance 1e-3
"""
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Run one conversion; returns the exit code: 0 done, 1 an error of this package, 2 wrong usage."""
    args = _parser().parse_args(argv)
    console = Console(stderr=True, soft_wrap=True)
    try:
        with _logging_to(console):
            return args.run(args, console)
    except (LlasoError, ShardingError) as error:
        console.print(f"error ({type(error).__name__}): {error}", style="red", markup=False)
        return 1


@contextlib.contextmanager
def _logging_to(console: Console) -> Iterator[None]:
    """Show what this package logs, and nothing else, between the progress bars."""
    ours = logging.getLogger("llaso_jax")
    handler = RichHandler(console=console, show_time=False, show_path=False)
    level, propagate = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagate


def from_hf(args: argparse.Namespace, console: Console) -> int:
    """Sources -> a model folder, block by block."""
    target = check_target(args.output, overwrite=args.overwrite)
    mesh = make_mesh(args.mesh) if args.mesh else None  # before anything starts JAX
    with tempfile.TemporaryDirectory() as files:
        weights, tokenizer_files = _open_sources(args, Path(files))
        with _bar(console, "converting", len(weights.pieces)) as progress:
            stream_model(
                target,
                weights,
                mesh=mesh,
                dtype=args.dtype,
                tokenizer_files_from=tokenizer_files,
                overwrite=args.overwrite,
                progress=progress,
            )
    if weights.ignored:
        console.print(
            f"{len(weights.ignored)} tensors of the sources are not part of this model: "
            f"{weights.ignored[0]} ... {weights.ignored[-1]}",
            markup=False,
        )
    _summary(console, weights, args.dtype)
    console.print(f"wrote {target}", markup=False)
    return 0


def _open_sources(args: argparse.Namespace, files: Path) -> tuple[Weights, Path]:
    """The weights of all sources, and the folder of their tokenizer files (made in `files`)."""
    paths = [*args.sources, *filter(None, (args.whisper, args.llama, args.projector))]
    if len(paths) == 1 and is_model_folder(paths[0]):
        return open_model(paths[0]), Path(paths[0])
    weights = gather_weights(
        *paths,
        audio_mode=args.audio_mode,
        projector_type=args.projector_type,
        stack=args.stack,
        seed=args.seed,
    )
    weights = fit_tokenizer(
        weights, files, tokenizer_from=args.tokenizer, multiple_of=args.vocab_multiple_of
    )
    return weights, files


def to_hf(args: argparse.Namespace, console: Console) -> int:
    """A model folder -> Hugging Face folders, tensor by tensor."""
    wanted = [folder for folder in (args.output, args.whisper, args.llama) if folder]
    if not wanted:
        console.print(
            "error: nothing to write: give --output (LLaSO layout), --llama or --whisper."
        )
        return 2
    for folder in wanted:
        check_target(folder, overwrite=args.overwrite)
    needed = {
        part
        for folder, parts in (
            (args.output, PARTS),
            (args.whisper, ("audio_tower",)),
            (args.llama, ("language_model",)),
        )
        if folder
        for part in parts
    }
    weights = open_model(args.model, parts=tuple(part for part in PARTS if part in needed))
    cfg = weights.cfg

    def options(progress: OnTensor) -> ExportOptions:
        return ExportOptions(args.dtype, args.max_shard_size, args.overwrite, progress)

    if args.output:
        tower_name = args.tower_name
        if tower_name is None and args.whisper:
            tower_name = os.path.relpath(args.whisper, args.output)
        with _bar(console, "LLaSO", len(slots(cfg))) as progress:
            export_llaso(
                args.output,
                cfg,
                weights.pieces,
                hf_config=weights.hf_config,
                files_from=args.model,
                with_tower=not args.no_tower,
                tower_name=tower_name,
                options=options(progress),
            )
    if args.llama:
        with _bar(console, "Llama", len(slots(cfg, ("language_model",)))) as progress:
            export_llama(
                args.llama,
                cfg,
                weights.pieces,
                hf_config=weights.hf_config,
                files_from=args.model,
                options=options(progress),
            )
    if args.whisper:
        with _bar(console, "Whisper", len(slots(cfg, ("audio_tower",))) + 4) as progress:
            export_whisper(args.whisper, cfg, weights.pieces, options=options(progress))
    for folder in wanted:
        console.print(f"wrote {folder}", markup=False)
    return 0


def inspect(args: argparse.Namespace, _: Console) -> int:
    """What is at a path; 1 if it is not whole, or damaged."""
    console = Console(soft_wrap=True)
    try:
        found = inspect_source(args.path)
    except LlasoError as error:
        if not args.json:
            raise
        failure = {"type": type(error).__name__, "message": str(error)}
        console.print_json(data={"path": args.path, "whole": False, "error": failure})
        return 1
    if args.json:
        console.print_json(data=inspection_report.as_json(found))
    else:
        inspection_report.print_report(found, console)
    return 0 if found.whole else 1


def verify(args: argparse.Namespace, console: Console) -> int:
    """Two sides against each other; 1 if they are not equal."""
    with console.status("comparing") as status:
        found = verify_weights(
            [args.a],
            args.b,
            clip=args.audio,
            dtype=args.dtype,
            tolerance=args.tolerance,
            outputs=not args.weights_only,
            progress=lambda path, _: status.update(f"compared {path}"),
        )
    verification_report.print_report(found, Console(soft_wrap=True))
    return 0 if found.equal else 1


@contextlib.contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[OnTensor]:
    """A progress bar over tensors."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[gigabytes]:.2f} GB"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, gigabytes=0.0)
        done = 0

        def advance(_: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bar.update(task, advance=1, gigabytes=done / 1e9)

        yield advance


def _summary(console: Console, weights: Weights, dtype: str | None) -> None:
    for part in weights.parts:
        layers = [
            tensor
            for path, tensors in weights.pieces.items()
            if path.split("/")[0] == part
            for tensor in tensors
        ]
        count = sum(math.prod(layer.shape) for layer in layers)
        dtypes = ", ".join(sorted({str(target_dtype(layer, dtype)) for layer in layers}))
        console.print(f"  {part:<15} {count:>14,} parameters, {dtypes}")


def _bytes(text: str) -> int:
    """5GB, 500MB, 1000 -> bytes."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (
        (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    )
    try:
        size = int(float(number) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB") from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least one byte")
    return size


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="llaso convert", description=__doc__, epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="{from-hf,to-hf,inspect,verify}")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: as they are)"
    )
    common.add_argument("--overwrite", action="store_true", help="replace what is in the target")

    read = commands.add_parser(
        "from-hf",
        parents=[common],
        help="weights in: make a model folder",
        description="Make a model folder for training and generation. What each source is, is found out "
        "from its content.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    read.set_defaults(run=from_hf)
    read.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="folders or files: a LLaSO checkpoint; a Whisper; a Llama; a projector file; a LoRA adapter; a model folder",
    )
    read.add_argument("-o", "--output", required=True, help="model folder to write")
    read.add_argument(
        "--whisper", metavar="PATH", help="a Whisper, the same as naming it as SOURCE"
    )
    read.add_argument("--llama", metavar="PATH", help="a Llama, the same as naming it as SOURCE")
    read.add_argument(
        "--projector", metavar="FILE", help="mm_audio_aligner file: replaces any other projector"
    )
    read.add_argument(
        "--projector-type",
        help="of a random projector: linear, mlp2x_gelu (default), mlp3x_gelu, ...",
    )
    read.add_argument(
        "--stack", type=int, help="frames stacked before a random projector (default 1)"
    )
    read.add_argument("--seed", type=int, default=0, help="of a random projector (default 0)")
    read.add_argument(
        "--audio-mode",
        choices=AUDIO_MODES,
        help="what of the audio reaches the language model (default: as the checkpoint says, else padded)",
    )
    read.add_argument(
        "--tokenizer", metavar="PATH", help="folder or tokenizer.json (default: beside the Llama)"
    )
    read.add_argument(
        "--mesh",
        help="mesh whose shards the stored chunks shall fit, such as 8x1; any other mesh can read them too",
    )
    read.add_argument(
        "--vocab-multiple-of",
        type=int,
        default=1,
        help="pad the embeddings so that they split over a mesh; undone by to-hf (default 1)",
    )

    write = commands.add_parser(
        "to-hf",
        parents=[common],
        help="weights out: Hugging Face folders from a model folder",
        description="Write Hugging Face folders from a model folder.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    write.set_defaults(run=to_hf)
    write.add_argument("model", help="model folder")
    write.add_argument("-o", "--output", help="folder in LLaSO layout to write")
    write.add_argument("--llama", metavar="DIR", help="also write a stock LlamaForCausalLM here")
    write.add_argument(
        "--whisper",
        metavar="DIR",
        help="also write a stock WhisperModel (encoder, empty decoder) here",
    )
    write.add_argument(
        "--no-tower", action="store_true", help="leave the audio tower out of the LLaSO folder"
    )
    write.add_argument(
        "--tower-name", help="mm_audio_tower to write: a folder or a hub id (default: as it was)"
    )
    write.add_argument(
        "--max-shard-size", type=_bytes, default=5 * 10**9, help="of each file (default 5GB)"
    )
    _add_inspect(commands)
    _add_verify(commands)
    return parser


def _add_inspect(commands) -> None:
    look = commands.add_parser(
        "inspect",
        help="what is at a path, is it whole, which command converts it",
        description="Say what is at a path, found out from its content: kind, sizes, dtypes, parameters, "
        "missing, unused and misshapen tensors, tokenizer, and the command that converts it. Only headers "
        "are read. Exit code 1 if something is missing or wrong.",
    )
    look.set_defaults(run=inspect)
    look.add_argument("path", help="anything from-hf reads, or a model folder")
    look.add_argument("--json", action="store_true", help="the same as one JSON object")


def _add_verify(commands) -> None:
    compare = commands.add_parser(
        "verify",
        help="are two sets of weights the same model",
        description="Compare two sets of weights, tensor by tensor and by what both make of a clip. Exit "
        "code 1 if they are not equal.",
        epilog=VERIFY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.set_defaults(run=verify)
    compare.add_argument("a", metavar="A", help="a model folder, or a source of from-hf")
    compare.add_argument(
        "b",
        metavar="B",
        nargs="+",
        help="the same; several sources are one side, such as a Whisper, a Llama and a projector file",
    )
    compare.add_argument("--audio", metavar="CLIP", help="recording (default: of the mini corpus)")
    compare.add_argument(
        "--tolerance",
        type=_tolerance,
        help="largest difference, relative to the largest entry (default: bit-equal where dtypes are the "
        "same, else the rounding of the coarser dtype)",
    )
    compare.add_argument("--dtype", choices=DTYPES, help="round both sides to it before")
    compare.add_argument(
        "--weights-only", action="store_true", help="do not run the models, compare tensors only"
    )


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0, such as 1e-3")
    return value


if __name__ == "__main__":
    sys.exit(main())
