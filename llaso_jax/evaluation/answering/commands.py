"""`llaso evaluate run`: from a checkpoint and questions to predictions."""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llaso_jax.data.audio import load_audio
from llaso_jax.data.pauses import check_part_seconds
from llaso_jax.errors import ConfigError
from llaso_jax.evaluation.answering.answers import Answering, answer_file
from llaso_jax.evaluation.answering.identity import file_identity, folder_identity
from llaso_jax.evaluation.answering.journal import check_settings, note_settings
from llaso_jax.evaluation.answering.perturbation import Perturber, parse_perturbations
from llaso_jax.evaluation.answering.questions import QuestionFile, load_questions, write_task_list
from llaso_jax.evaluation.progress import progress_bar
from llaso_jax.evaluation.tasks import plain_name
from llaso_jax.inference.model import LLaSOModel
from llaso_jax.inference.pretrained import find_model
from llaso_jax.inference.processor import LLaSOProcessor
from llaso_jax.sharding.mesh import make_mesh

AUDIO_ENDINGS = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus"})


@dataclass(frozen=True)
class Plan:
    """What will be asked, and where the answers go.

    Attributes:
      files: the questions.
      folder: of the predictions.
      perturbers: by perturbation ("noise=-10").
      perturbed: folders of the same items perturbed, of perturbations that apply to any file.
    """

    files: list[QuestionFile]
    folder: Path
    perturbers: dict[str, Perturber]
    perturbed: dict[str, Path]


def plan(args: argparse.Namespace) -> Plan:
    """Read the questions and check everything that needs no model.

    Raises:
      LlasoError: arguments or questions that cannot be used.
    """
    try:
        name = plain_name(args.name or args.checkpoint.resolve().name)
    except ValueError as error:
        raise ConfigError(
            f"the model's name names a folder: {error}. Give another --name."
        ) from error
    check_part_seconds(args.part_seconds)
    noise = _recordings(args.noise_files)
    read = functools.partial(
        load_audio, max_seconds=args.max_audio_seconds, policy=args.audio_policy
    )
    perturbers = {
        one.name: Perturber(one, seed=args.seed, noise_files=noise, read=read)
        for one in parse_perturbations(args.perturb)
    }
    files = load_questions(
        args.data,
        only=args.tasks,
        further=args.task_list,
        limit=args.limit,
        audio_root=args.audio_root,
        index_dir=args.output / "index",
    )
    perturbed = {
        one: args.output / "perturbed" / one / name
        for one, perturber in perturbers.items()
        if any(map(perturber.applies, files))
    }
    return Plan(files, args.output / "predictions" / name, perturbers, perturbed)


def answer_benchmark(args: argparse.Namespace, planned: Plan, console: Console) -> None:
    """Answer what is planned; what was answered before is not asked again.

    Raises:
      LlasoError: audio, checkpoint or settings that cannot be used.
    """
    settings = _identity(args)
    asked = {file.path.name: file_identity(file.path) for file in planned.files}
    noise = [str(path) for path in args.noise_files]
    perturbed = {**settings, "perturb_seed": args.seed, "noise_files": noise}
    kept = {planned.folder: settings} | dict.fromkeys(planned.perturbed.values(), perturbed)
    for folder, made_with in kept.items():
        check_settings(folder, made_with, asked)
    mesh = make_mesh(args.mesh) if args.mesh else None  # before anything else starts JAX
    processor = LLaSOProcessor.from_pretrained(
        args.checkpoint, max_audio_seconds=args.max_audio_seconds, audio_policy=args.audio_policy
    )
    model = LLaSOModel.from_pretrained(args.checkpoint, mesh=mesh, dtype=args.dtype)
    for folder, made_with in kept.items():  # not before the checkpoint is known to open
        note_settings(folder, made_with, asked)
    write_task_list(planned.folder, planned.files)
    answering = Answering(
        args.batch_size, args.max_new_tokens, args.temperature, args.seed, args.part_seconds
    )
    todo = [(file, planned.folder, None) for file in planned.files]
    for one, folder in planned.perturbed.items():
        perturber = planned.perturbers[one]
        todo += [(file, folder, perturber) for file in planned.files if perturber.applies(file)]
    with progress_bar(console) as progress:
        bar = progress.add_task("answering", total=sum(len(file) for file, *_ in todo))
        for file, where, change in todo:
            progress.update(bar, description=f"{where.parent.name}: {file.spec.file}")
            answer_file(
                file,
                where,
                model,
                processor,
                answering,
                change=change,
                advance=lambda count: progress.update(bar, advance=count),
            )


def _recordings(paths: Sequence[Path]) -> list[Path]:
    """The recordings among `paths` and in the folders among them.

    Raises:
      ConfigError: a path that is not there, or a folder without a recording.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            there = (p for p in path.rglob("*") if p.is_file())
            inside = sorted(p for p in there if p.suffix.lower() in AUDIO_ENDINGS)
            if not inside:
                endings = ", ".join(sorted(AUDIO_ENDINGS))
                raise ConfigError(f"--noise-files {path} holds no recording ({endings}).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(f"--noise-files {path} is not there.")
    return found


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the text of answers; mesh and batch size do not."""
    model = find_model(args.checkpoint)
    return {
        "checkpoint": str(args.checkpoint.resolve()),
        "checkpoint_files": folder_identity(model, but=args.output),
        "data": str(args.data.resolve()),
        "audio_root": str(args.audio_root.resolve()),
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed if args.temperature else None,
        "dtype": args.dtype,
        "max_audio_seconds": args.max_audio_seconds,
        "audio_policy": args.audio_policy,
        "part_seconds": args.part_seconds,
    }
