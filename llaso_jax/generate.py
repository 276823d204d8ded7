"""Let a trained model answer about recordings: `python -m llaso_jax.generate --checkpoint DIR --audio a.wav`.

Every file is one prompt, with the same text. Answers come in the order of the files, each with the seconds
of audio the model heard. Greedy unless --temperature is above 0, so the same command gives the same text.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from typing import TYPE_CHECKING

from llaso_jax.errors import ConfigError, user_errors

if TYPE_CHECKING:
    from llaso_jax.inference.answers import Answer

EXAMPLES = """examples:
  llaso generate --checkpoint runs/mini/model --audio question.wav
      no text: the recording itself asks
  llaso generate --checkpoint runs/mini/model --audio a.wav b.flac --text "Transcribe the audio."
      the same instruction for several recordings
  llaso generate --checkpoint models/llaso-base --audio talk.mp3 --text "Who speaks?" --audio-first \\
      --temperature 0.2 --seed 1 --mesh 8x1
      audio before the text, sampling, the model split over 8 devices
"""

EXIT_ERROR = 1


def main(argv: list[str] | None = None) -> int:
    """Command line of `llaso generate`; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warnings about forked workers

    try:
        _generate(args)
    except user_errors() as error:
        sys.stderr.write(f"llaso generate: error: {error}\n")
        return EXIT_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llaso generate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="model folder, output of a training run, or LLaSO checkpoint in Hugging Face layout",
    )
    parser.add_argument(
        "--audio", nargs="+", metavar="FILE", help="recordings: wav, flac, mp3, ogg or opus"
    )
    parser.add_argument(
        "--text",
        help="instruction or question; <audio> in it marks the recording's place "
        "(default: a fixed phrase, for recordings that hold the question)",
    )
    parser.add_argument(
        "--audio-first", action="store_true", help="put the recording before the text"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from tokens of total probability P"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument(
        "--max-audio-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="longest recording taken (%(default)s, what LLaSO was trained on)",
    )
    parser.add_argument(
        "--audio-policy",
        choices=("error", "truncate"),
        default="error",
        help="longer recordings: stop, or use the beginning and say so (%(default)s)",
    )
    parser.add_argument(
        "--part-seconds",
        type=float,
        metavar="S",
        help="to transcribe long recordings: cut them at pauses into parts of at most S seconds, answer each, and join "
        "the answers (default: recordings stay whole)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="prompts at a time (%(default)s)"
    )
    parser.add_argument("--mesh", help="devices: FSDPxTENSOR such as 8x1 (default: one device)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: float32 on CPU, bfloat16 on accelerators",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser


def _generate(args: argparse.Namespace) -> None:
    # Imported late: --help and a mistyped flag answer at once.
    from llaso_jax.inference.answers import generate_answers
    from llaso_jax.inference.model import LLaSOModel
    from llaso_jax.inference.processor import LLaSOProcessor
    from llaso_jax.sharding.mesh import make_mesh

    if not args.audio and args.text is None:
        raise ConfigError("neither --audio nor --text was given; at least one is needed.")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size is {args.batch_size}; at least 1 is needed.")
    mesh = make_mesh(args.mesh) if args.mesh else None  # before anything else starts JAX
    processor = LLaSOProcessor.from_pretrained(
        args.checkpoint, max_audio_seconds=args.max_audio_seconds, audio_policy=args.audio_policy
    )
    # A file that cannot be read is found before gigabytes of weights are.
    questions = processor.questions(
        args.audio, args.text, audio_first=args.audio_first, part_seconds=args.part_seconds
    )
    model = LLaSOModel.from_pretrained(args.checkpoint, mesh=mesh, dtype=args.dtype)
    settings = model.generation_config(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    answers = generate_answers(
        model,
        processor,
        questions,
        settings,
        batch_rows=min(args.batch_size, sum(map(len, questions))),
    )
    line = _as_json if args.json else _as_text
    for name, answer in zip(args.audio or [None], answers, strict=True):
        sys.stdout.write(line(name, answer))
        sys.stdout.flush()


def _as_json(name: str | None, answer: "Answer") -> str:
    return json.dumps({"audio": name, **dataclasses.asdict(answer)}, ensure_ascii=False) + "\n"


def _as_text(name: str | None, answer: "Answer") -> str:
    notes = [f"{answer.audio_seconds:.1f} s of audio"] if name else []
    if answer.audio_seconds_dropped:
        notes.append(f"{answer.audio_seconds_dropped:.1f} s past --max-audio-seconds not used")
    if not answer.ended:
        notes.append(f"cut off at {answer.new_tokens} tokens, see --max-new-tokens")
    heading = " ".join(filter(None, [name, f"({', '.join(notes)})" if notes else ""]))
    return f"{heading}\n{answer.text}\n" if heading else f"{answer.text}\n"


if __name__ == "__main__":
    sys.exit(main())
