"""`llaso evaluate run`: from a checkpoint and questions to predictions and their scores."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llaso_jax.evaluation.answering.answers import Answering, answer_file
from llaso_jax.evaluation.answering.journal import check_settings
from llaso_jax.evaluation.answering.perturbation import Perturber, parse_perturbations
from llaso_jax.evaluation.answering.questions import QuestionFile, load_questions, write_task_list
from llaso_jax.inference.model import LLaSOModel
from llaso_jax.inference.processor import LLaSOProcessor
from llaso_jax.sharding.mesh import make_mesh

AUDIO_ENDINGS = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus"})


def answer_benchmark(
    args: argparse.Namespace, console: Console
) -> tuple[Path, dict[str, Path], list[QuestionFile]]:
    """Answer what the arguments ask for.

    Returns:
      folder of predictions; folders of the same items perturbed, by perturbation; the questions.

    Raises:
      LlasoError: questions, audio, checkpoint or settings that cannot be used.
    """
    name = args.name or args.checkpoint.resolve().name
    folder = args.output / "predictions" / name
    perturbers = {
        one.name: Perturber(one, seed=args.seed, noise_files=_recordings(args.noise_files))
        for one in parse_perturbations(args.perturb)
    }
    perturbed = {one: args.output / "perturbed" / one / name for one in perturbers}
    files = load_questions(
        args.data,
        only=args.tasks,
        further=args.task_list,
        limit=args.limit,
        audio_root=args.audio_root,
        index_dir=args.output / "index",
    )
    check_settings(folder, _identity(args))
    for one in perturbed.values():
        noise = [str(path) for path in args.noise_files]
        check_settings(one, {**_identity(args), "perturb_seed": args.seed, "noise_files": noise})
    write_task_list(folder, files)
    mesh = make_mesh(args.mesh) if args.mesh else None  # before anything else starts JAX
    processor = LLaSOProcessor.from_pretrained(
        args.checkpoint, max_audio_seconds=args.max_audio_seconds, audio_policy=args.audio_policy
    )
    model = LLaSOModel.from_pretrained(args.checkpoint, mesh=mesh, dtype=args.dtype)
    settings = Answering(args.batch_size, args.max_new_tokens, args.temperature, args.seed)
    todo = [(file, folder, None) for file in files]
    for one, perturber in perturbers.items():
        todo += [(file, perturbed[one], perturber) for file in files if perturber.applies(file)]
    with _progress(console) as progress:
        bar = progress.add_task("answering", total=sum(len(file) for file, *_ in todo))
        for file, where, change in todo:
            progress.update(bar, description=f"{where.parent.name}: {file.spec.file}")
            answer_file(
                file,
                where,
                model,
                processor,
                settings,
                mesh=mesh,
                change=change,
                advance=lambda count: progress.update(bar, advance=count),
            )
    answered = {one for one in perturbed if any(where == perturbed[one] for _, where, _ in todo)}
    return folder, {one: perturbed[one] for one in perturbed if one in answered}, files


def _recordings(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths` and in the folders among them."""
    return [
        file
        for path in paths
        for file in (sorted(path.rglob("*.*")) if path.is_dir() else [path])
        if file.suffix.lower() in AUDIO_ENDINGS or file == path
    ]


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the text of answers; mesh and batch size do not."""
    return {
        "checkpoint": str(args.checkpoint.resolve()),
        "data": str(args.data.resolve()),
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed if args.temperature else None,
        "dtype": args.dtype,
        "max_audio_seconds": args.max_audio_seconds,
        "audio_policy": args.audio_policy,
    }


def _progress(console: Console) -> Progress:
    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
