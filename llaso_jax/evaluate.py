"""`llaso evaluate`: score any model on LLaSO-Eval, compare models, check the paper's numbers."""

import argparse
import math
import sys
from pathlib import Path

from rich.console import Console

from llaso_jax.errors import user_errors

EXAMPLES = """\
examples:
  score published predictions of one or several models, in both protocols
    llaso evaluate score predictions/ --output report/
    llaso evaluate score predictions/LLaSO-Base my-model/ --output report/ --protocol corrected
  judge free answers with a language model, or without any (agreement is stated)
    llaso evaluate score my-model/ --output report/ --judge openai --base-url http://localhost:8000/v1 \\
        --model Qwen3-8B
    llaso evaluate score my-model/ --output report/ --judge local
  let a checkpoint answer LLaSO-Eval on 8 devices, then score it; again to go on after a stop
    llaso evaluate run --checkpoint models/llaso-base --data LLaSO-Eval/ --output evaluation/ --mesh 8x1
  how much of its scores is left in noise, faster, or asked in other words
    llaso evaluate run --checkpoint models/llaso-base --data LLaSO-Eval/ --output evaluation/ --mesh 8x1 \\
        --perturb noise:snr=0,10,20 speed:0.8,1.2 codec:mp3-16k gain:-20 reword:3 swap:1
  are two models different, task by task, on the same items
    llaso evaluate compare predictions/LLaSO-Base predictions/Qwen2-Audio --output comparison/
  which numbers of the paper do the published predictions give
    llaso evaluate paper predictions/
"""
JUDGES = ("replay", "openai", "local", "none")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 an error of this package, 2 wrong usage."""
    args = _parser().parse_args(argv)
    # Help and mistyped flags are answered before anything heavy is loaded.
    from llaso_jax.evaluation.commands import COMMANDS

    console = Console(stderr=True, soft_wrap=True)
    try:
        return COMMANDS[args.command](args, console)
    except user_errors() as error:
        console.print(f"error ({type(error).__name__}): {error}", style="red", markup=False)
        return 1


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="llaso evaluate", description=__doc__, epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_score(commands, raw)
    _add_run(commands, raw)
    _add_compare(commands, raw)
    _add_paper(commands, raw)
    return parser


def _scoring_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks or files to score (default: all)",
    )
    options.add_argument(
        "--task-list",
        nargs="+",
        type=Path,
        default=[],
        metavar="YAML",
        help="further tasks beside LLaSO-Eval's",
    )
    options.add_argument(
        "--judge",
        choices=JUDGES,
        default="replay",
        help="of free answers. replay: scores published in gpt_result. openai: any OpenAI-compatible "
        "endpoint. local: an offline surrogate, its agreement stated. none (%(default)s)",
    )
    options.add_argument("--base-url", metavar="URL", help="of --judge openai (default: OpenAI's)")
    options.add_argument(
        "--model", metavar="NAME", help="of --judge openai; published: gpt-4o-mini"
    )
    options.add_argument(
        "--judge-cache",
        type=Path,
        metavar="DIR",
        help="what the judge said, so that a re-run is free and offline (default: the user's cache)",
    )
    options.add_argument(
        "--judge-rate",
        type=_number(at_least=0),
        default=120,
        metavar="N",
        help="requests a minute, 0 for no limit (%(default)s, as published)",
    )
    options.add_argument(
        "--judge-workers",
        type=_at_least(1),
        default=4,
        metavar="N",
        help="requests at a time (%(default)s)",
    )
    options.add_argument(
        "--judge-timeout",
        type=_number(above=0),
        default=60,
        metavar="S",
        help="of a request (%(default)s)",
    )
    options.add_argument(
        "--bootstrap", type=_at_least(0), default=1000, metavar="N", help="draws (%(default)s)"
    )
    options.add_argument(
        "--bootstrap-seed",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="of the draws (%(default)s)",
    )
    return options


def _at_least(lowest: int):
    def integer(text: str) -> int:
        if not text.isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {lowest}")
        return int(text)

    return integer


def _number(*, at_least: float = -math.inf, above: float = -math.inf):
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= at_least and value > above):
            bound = f"above {above:g}" if above > at_least else f"of at least {at_least:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is no number {bound}")
        return value

    return number


def _add_score(commands, raw) -> None:
    score = commands.add_parser(
        "score",
        parents=[_scoring_options(), _report_options()],
        help="predictions in; report.html, scores.json and CSV out",
        description="Score predictions in the layout LLaSO released: a folder per model with "
        "<file>_test.json or .jsonl, and gpt_result and abstention beside them where there are.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    score.add_argument(
        "predictions",
        nargs="+",
        type=Path,
        metavar="PREDICTIONS_DIR",
        help="folder of a model, or of several models' folders",
    )
    score.add_argument("-o", "--output", required=True, type=Path, help="folder of the report")


def _report_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--protocol",
        choices=("upstream", "corrected", "both"),
        default="both",
        help="upstream: as LLaSO's own scripts, to compare with the paper (%(default)s)",
    )
    options.add_argument(
        "--examples",
        type=_at_least(0),
        default=12,
        metavar="N",
        help="answers of each file in the report's error browser (%(default)s)",
    )
    options.add_argument(
        "--trained-on",
        type=Path,
        metavar="YAML",
        help="which tasks and languages each model was trained on, for the coverage plots",
    )
    options.add_argument(
        "--audio-root",
        type=Path,
        metavar="DIR",
        help="where audio paths start, for players (of run: default the folder of --data)",
    )
    return options


def _add_run(commands, raw) -> None:
    run = commands.add_parser(
        "run",
        parents=[_scoring_options(), _report_options()],
        help="let a checkpoint answer the benchmark, then score it",
        description="Answer a benchmark in batches and score the answers. The same command goes on after a "
        "run that was stopped; answers that are there are not made again.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    run.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="model folder, output of a training run, or LLaSO checkpoint in Hugging Face layout",
    )
    run.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="LLASO_EVAL_DIR",
        help="folder with <file>_test.json, or one JSON file whose records name their task",
    )
    run.add_argument("-o", "--output", required=True, type=Path, help="of predictions and report")
    run.add_argument(
        "--beside",
        nargs="+",
        type=Path,
        default=[],
        metavar="PREDICTIONS_DIR",
        help="other models' predictions to show beside it, such as the published ones",
    )
    run.add_argument("--name", help="of the model in the report (default: the checkpoint's folder)")
    run.add_argument(
        "--limit", type=_at_least(1), metavar="N", help="questions of each file, the first ones"
    )
    run.add_argument(
        "--perturb",
        nargs="+",
        default=[],
        metavar="KIND:LEVELS",
        help="ask the same items again with noise:snr=-10,0,10 speed:0.8,1.2 codec:mp3-16k gain:-20, or in "
        "other words (reword:3), or with the audio of another item (swap:1)",
    )
    run.add_argument(
        "--noise-files",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="recordings, or folders of them, that noise is taken from (default: white noise)",
    )
    run.add_argument("--mesh", help="devices: FSDPxTENSOR such as 8x1 (default: one device)")
    run.add_argument(
        "--batch-size",
        type=_at_least(1),
        default=8,
        metavar="N",
        help="questions at a time (%(default)s)",
    )
    run.add_argument(
        "--max-new-tokens",
        type=_at_least(1),
        metavar="N",
        help="longest answer (default: 256 for ASR and 1024 for others, as published)",
    )
    run.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)"
    )
    run.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        help="of sampling, noise, rewording and swapping (%(default)s)",
    )
    run.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: float32 on CPU, bfloat16 on accelerators",
    )
    run.add_argument(
        "--max-audio-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="longest audio (%(default)s)",
    )
    run.add_argument(
        "--audio-policy",
        choices=("error", "truncate"),
        default="error",
        help="longer audio: stop, or use the beginning and say so (%(default)s)",
    )
    run.add_argument(
        "--part-seconds",
        type=float,
        metavar="S",
        help="ASR: cut longer recordings at pauses into parts of at most S seconds, answer each, and join the answers "
        "(default: recordings stay whole)",
    )


def _add_compare(commands, raw) -> None:
    compare = commands.add_parser(
        "compare",
        parents=[_scoring_options()],
        help="two models on the same items: differences with intervals, wins and losses",
        description="Paired bootstrap of two models' answers to the same items.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    compare.add_argument("a", type=Path, metavar="A", help="folder of a model's predictions")
    compare.add_argument("b", type=Path, metavar="B", help="the same of another")
    compare.add_argument("-o", "--output", type=Path, help="folder for comparison.json and .html")
    compare.add_argument(
        "--protocol", choices=("upstream", "corrected"), default="corrected", help="(%(default)s)"
    )
    compare.add_argument(
        "--examples",
        type=_at_least(0),
        default=3,
        metavar="N",
        help="wins and losses of each file that are shown (%(default)s)",
    )


def _add_paper(commands, raw) -> None:
    paper = commands.add_parser(
        "paper",
        help="the paper's numbers, recomputed",
        description="Recompute what arXiv 2508.15418 quotes from published predictions: match, rounding or "
        "mismatch, with the reason.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    paper.add_argument("predictions", type=Path, metavar="PREDICTIONS_DIR")
    paper.add_argument("-o", "--output", type=Path, help="file for the same as JSON")


if __name__ == "__main__":
    sys.exit(main())
