"""`llaso convert`: weights in from Hugging Face, LLaSO, CTranslate2 and GGUF; Hugging Face folders out."""

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.logging import RichHandler

from llaso_jax.errors import user_errors
from llaso_jax.modeling.frames import AUDIO_MODES

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
  the same adapter kept apart, to train it further; and written for PEFT again, with a Llama it was trained on
    llaso convert from-hf LLaSO-Base-3.8B-Instruct/ lora-adapter/ --keep-adapter --output tuned/
    llaso convert to-hf tuned/ --adapter lora-adapter/ --llama hf-llama/
  a CTranslate2 Whisper and a GGUF Llama
    llaso convert from-hf faster-whisper-tiny/ SmolLM2-135M-Instruct.gguf --output small/
  back to a LLaSO folder, and to folders transformers loads
    llaso convert to-hf llaso/ --output hf/ --whisper hf-whisper/ --llama hf-llama/
  a CTranslate2 Whisper as a folder transformers transcribes with
    llaso convert to-hf faster-whisper-tiny/ --whisper hf-whisper/
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
    # Help and mistyped flags are answered before JAX is loaded.
    from llaso_jax.conversion.commands import COMMANDS

    console = Console(stderr=True, soft_wrap=True)
    try:
        with _logging_to(console):
            return COMMANDS[args.command](args, console)
    except user_errors() as error:
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
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{from-hf,to-hf,inspect,verify}"
    )

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
    read.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="folders or files: a LLaSO checkpoint; a Whisper; a Llama; a projector file; a LoRA adapter; "
        "a model folder",
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
        "--keep-adapter",
        action="store_true",
        help="keep a LoRA adapter apart from the weights (default: merge it into them)",
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
    write.add_argument("model", help="model folder, or any source that from-hf reads")
    write.add_argument("-o", "--output", help="folder in LLaSO layout to write")
    write.add_argument("--llama", metavar="DIR", help="also write a stock LlamaForCausalLM here")
    write.add_argument(
        "--whisper",
        metavar="DIR",
        help="also write a stock Whisper here: with its decoder if MODEL is a Whisper that has one, else a "
        "WhisperModel with an empty decoder",
    )
    write.add_argument(
        "--projector", metavar="FILE", help="also write the projector alone here (.bin)"
    )
    write.add_argument(
        "--adapter",
        metavar="DIR",
        help="also write the model's LoRA adapters here, in PEFT's layout; what else is written is then without "
        "them (default: they are merged)",
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
