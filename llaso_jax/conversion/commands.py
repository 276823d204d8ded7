"""What the subcommands of `llaso convert` do. They show progress on the console they are given."""

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llaso_jax.conversion import inspection_report, verification_report
from llaso_jax.conversion.errors import UnsupportedConfigError
from llaso_jax.conversion.exporting import (
    ExportOptions,
    export_adapter,
    export_llama,
    export_llaso,
    export_projector,
    export_whisper,
)
from llaso_jax.conversion.inspection import inspect_source
from llaso_jax.conversion.loading import Progress as OnTensor
from llaso_jax.conversion.model_folder import is_model_folder, open_model, stream_model
from llaso_jax.conversion.tables import (
    LLASO,
    PARTS,
    WHISPER,
    Prefixes,
    adapter_slots,
    slots,
)
from llaso_jax.conversion.tensors import target_dtype
from llaso_jax.conversion.tokenizer_files import fit_tokenizer
from llaso_jax.conversion.verification import verify as verify_weights
from llaso_jax.conversion.weights import Weights, gather_weights
from llaso_jax.conversion.whisper_decoder import whisper_decoder
from llaso_jax.conversion.writing import check_target
from llaso_jax.errors import LlasoError
from llaso_jax.modeling.lora import adapted_layer
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.mesh import make_mesh


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
        keep_adapter=args.keep_adapter,
    )
    weights = fit_tokenizer(
        weights, files, tokenizer_from=args.tokenizer, multiple_of=args.vocab_multiple_of
    )
    return weights, files


def to_hf(args: argparse.Namespace, console: Console) -> int:
    """A model folder, or any source -> Hugging Face folders, block by block."""
    base, adapted, prefixes = _adapter_base(args)
    parts_of = {
        args.output: PARTS,
        args.whisper: ("audio_tower",),
        args.llama: ("language_model",),
        args.projector: ("projector",),
        args.adapter: adapted,
    }
    wanted = {path: parts for path, parts in parts_of.items() if path}
    if not wanted:
        console.print(
            "error: nothing to write: give --output (LLaSO layout), --llama, --whisper, --projector or --adapter."
        )
        return 2
    for path in wanted:
        check_target(path, overwrite=args.overwrite, file=path == args.projector)
    needed = {part for parts in wanted.values() for part in parts}
    if is_model_folder(args.model):
        parts = tuple(part for part in PARTS if part in needed)
        weights = open_model(args.model, parts=None if set(wanted) == {args.adapter} else parts)
    else:
        weights = gather_weights(args.model, keep_adapter=bool(args.adapter))
    cfg, files_from = weights.cfg, weights.folder
    # What may still be refused is, before anything is written.
    decoder = whisper_decoder(weights.whisper) if args.whisper and weights.whisper else None

    def options(progress: OnTensor) -> ExportOptions:
        return ExportOptions(
            args.dtype,
            args.max_shard_size,
            args.overwrite,
            progress,
            merge_adapters=not args.adapter,
        )

    if args.adapter:
        parts = tuple(part for part in adapted if part in weights.parts)
        _check_whole(cfg, weights.parts, parts)
        with _bar(console, "adapter", len(adapter_slots(cfg, parts))) as progress:
            export_adapter(
                args.adapter,
                cfg,
                weights.pieces,
                parts=parts,
                prefixes=prefixes,
                base_model=base or weights.hf_config.get("_name_or_path"),
                options=options(progress),
            )

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
                files_from=files_from,
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
                files_from=files_from,
                options=options(progress),
            )
    if args.whisper:
        others = len(decoder.tensors) if decoder else 4
        with _bar(console, "Whisper", len(slots(cfg, ("audio_tower",))) + others) as progress:
            export_whisper(
                args.whisper, cfg, weights.pieces, decoder=decoder, options=options(progress)
            )
    if args.projector:
        with _bar(console, "projector", len(slots(cfg, ("projector",)))) as progress:
            export_projector(args.projector, cfg, weights.pieces, options=options(progress))
    for path in wanted:
        console.print(f"wrote {path}", markup=False)
    return 0


def _check_whole(cfg: SpeechLMConfig, there: tuple[str, ...], written: tuple[str, ...]) -> None:
    """Raise UnsupportedConfigError if adapters of parts that are `there` would be neither `written` nor merged."""
    rest = tuple(part for part in there if part not in written)
    layers = {adapted_layer(slot.path) for slot in adapter_slots(cfg, rest).values()}
    if left := sorted(filter(None, layers)):
        raise UnsupportedConfigError(
            f"the model has adapters in {', '.join(left)} too, which an adapter of "
            f"{' and '.join(written)} would leave out: write the adapter with --output (LLaSO's names cover all "
            "parts), or leave --adapter out to merge them."
        )


def _adapter_base(args: argparse.Namespace) -> tuple[str | None, tuple[str, ...], Prefixes]:
    """What an adapter changes: the folder written beside it, which of its parts, and how it names its tensors."""
    if args.output:
        return args.output, PARTS, LLASO
    if args.llama:
        return args.llama, ("language_model",), LLASO
    if args.whisper:
        return args.whisper, ("audio_tower",), WHISPER
    return None, PARTS, LLASO


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


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int]] = {
    "from-hf": from_hf,
    "to-hf": to_hf,
    "inspect": inspect,
    "verify": verify,
}
"""By name: each returns the exit code."""
