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
from llaso_jax.evaluation.answering.questions import QuestionFile, load_questions, write_task_list
from llaso_jax.inference.model import LLaSOModel
from llaso_jax.inference.processor import LLaSOProcessor
from llaso_jax.sharding.mesh import make_mesh


def answer_benchmark(args: argparse.Namespace, console: Console) -> tuple[Path, list[QuestionFile]]:
    """Answer what the arguments ask for; returns the folder of predictions and the questions.

    Raises:
      LlasoError: questions, audio, checkpoint or settings that cannot be used.
    """
    name = args.name or args.checkpoint.resolve().name
    folder = args.output / "predictions" / name
    files = load_questions(
        args.data,
        only=args.tasks,
        further=args.task_list,
        limit=args.limit,
        audio_root=args.audio_root,
        index_dir=args.output / "index",
    )
    check_settings(folder, _identity(args))
    write_task_list(folder, files)
    mesh = make_mesh(args.mesh) if args.mesh else None  # before anything else starts JAX
    processor = LLaSOProcessor.from_pretrained(
        args.checkpoint, max_audio_seconds=args.max_audio_seconds, audio_policy=args.audio_policy
    )
    model = LLaSOModel.from_pretrained(args.checkpoint, mesh=mesh, dtype=args.dtype)
    settings = Answering(args.batch_size, args.max_new_tokens, args.temperature, args.seed)
    with _progress(console) as progress:
        bar = progress.add_task("answering", total=sum(map(len, files)))
        for file in files:
            progress.update(bar, description=file.spec.file)
            answer_file(
                file,
                folder,
                model,
                processor,
                settings,
                mesh=mesh,
                advance=lambda count: progress.update(bar, advance=count),
            )
    return folder, files


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
