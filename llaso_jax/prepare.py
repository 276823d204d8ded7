"""Make corpora: `llaso prepare mini` of synthetic speech, `asterisk` of held-out human prompts; `wordnet` writes
sentences to speak; `audit` compares two corpora.

`mini` needs no recordings and no network: voices of espeak-ng and Piper speak sentences that ship with the project, an
ASR model listens to every clip, and what it does not understand is left out. The same command goes on after a stop.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from llaso_jax.arguments import at_least
from llaso_jax.errors import user_errors

EXAMPLES = """\
examples:
  a corpus for the two stages of LLaSO, of both engines, checked by Whisper tiny.en
    llaso prepare mini --output corpus/ --clips 5000 --workers 2
  a small one in a minute, with espeak-ng alone and unchecked
    llaso prepare mini --output small/ --clips 200 --engines espeak --no-filter
  the held-out human prompts of two Debian packages (apt-get download names them)
    llaso prepare asterisk asterisk-core-sounds-en*.deb --output held-out/
  sentences of a wide vocabulary from a Debian package (apt-get download wordnet-base), and a corpus that speaks them
    llaso prepare wordnet wordnet-base*.deb --output wordnet.txt
    llaso prepare mini --sentences wordnet.txt --rule-share 0.4 --output corpus/ --workers 2
  does training data hold texts or recordings of evaluation data; exit code 1 if so
    llaso prepare audit --train corpus/align_train.json --eval held-out/eval.json --output audit/
"""
EXIT_ERROR = 1
EXIT_LEAK = 1
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL, as `llaso train`: the same command continues


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 an error or a leak, 2 wrong usage, 75 interrupted."""
    args = _parser().parse_args(argv)
    console = Console(stderr=True, soft_wrap=True)
    try:
        return COMMANDS[args.command](args, console)
    except user_errors() as error:
        console.print(f"llaso prepare: error: {error}", style="red", markup=False)
        return EXIT_ERROR
    except KeyboardInterrupt:
        console.print(
            "llaso prepare: stopped; the same command continues", style="yellow", markup=False
        )
        return EXIT_INTERRUPTED


def _mini(args: argparse.Namespace, console: Console) -> int:
    from llaso_jax.evaluation.progress import progress_bar
    from llaso_jax.preparation.mini import MiniSettings, build
    from llaso_jax.preparation.texts import SENTENCES

    settings = MiniSettings(
        clips=args.clips,
        seed=args.seed,
        engines=tuple(args.engines),
        recognizer=None if args.no_filter else args.recognizer,
        max_wer=args.max_wer,
        sentences=args.sentences or SENTENCES,
        rule_share=args.rule_share,
        held_out=tuple(args.held_out),
    )
    with progress_bar(console) as bar:
        task = bar.add_task("clips", total=args.clips)
        corpus = build(
            args.output,
            settings,
            workers=args.workers,
            advance=lambda done, of: bar.update(task, completed=done, total=of),
        )
    hours = sum(clip.rendered.seconds for clip in corpus.made) / 3600
    dropped = sum(not clip.understood for clip in corpus.made)
    console.print(
        f"{len(corpus.made)} clips, {hours:.2f} hours; {dropped} not understood", highlight=False
    )
    for name, records in corpus.files.items():
        console.print(f"  {name}: {len(records)} records", highlight=False)
    console.print(
        f"{corpus.leaks} leaks; README.md, manifest.csv and audit.json in {args.output}",
        markup=False,
    )
    return EXIT_LEAK if corpus.leaks else 0


def _asterisk(args: argparse.Namespace, console: Console) -> int:
    from llaso_jax.preparation.asterisk import PACKAGES, held_out, read_prompts, write_held_out
    from llaso_jax.preparation.debian import unpack

    with tempfile.TemporaryDirectory() as scratch:
        root = unpack(args.packages, Path(scratch), fetch=PACKAGES)
        prompts = held_out(read_prompts(root))
        path = write_held_out(prompts, args.output)
    words = sum(prompt.words for prompt in prompts)
    console.print(
        f"{len(prompts)} prompts of {words} words in {path}", markup=False, highlight=False
    )
    return 0


def _wordnet(args: argparse.Namespace, console: Console) -> int:
    from llaso_jax.preparation.debian import unpack
    from llaso_jax.preparation.wordnet import PACKAGE, example_sentences, write_sentences

    with tempfile.TemporaryDirectory() as scratch:
        sentences = example_sentences(unpack([args.package], Path(scratch), fetch=PACKAGE))
    write_sentences(sentences, args.output)
    console.print(f"{len(sentences)} sentences in {args.output}", markup=False, highlight=False)
    return 0


def _audit(args: argparse.Namespace, console: Console) -> int:
    from llaso_jax.evaluation.progress import progress_bar
    from llaso_jax.preparation.audit import audit

    with progress_bar(console) as bar:
        task = bar.add_task("recordings", total=None)
        found = audit(
            args.train,
            args.eval,
            run=args.run,
            audio=not args.no_audio,
            data_root=args.data_root,
            workers=args.workers,
            advance=lambda: bar.advance(task),
        )
    text = "\n".join(found.lines()) + "\n"
    sys.stdout.write(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "audit.txt").write_text(text, encoding="utf-8")
        tree = json.dumps(found.tree(), indent=2) + "\n"
        (args.output / "audit.json").write_text(tree, encoding="utf-8")
    return EXIT_LEAK if found.leaks else 0


COMMANDS = {"mini": _mini, "asterisk": _asterisk, "wordnet": _wordnet, "audit": _audit}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="llaso prepare", description=__doc__, epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True)

    mini = commands.add_parser(
        "mini", help="a corpus of synthetic speech", epilog=EXAMPLES, formatter_class=raw
    )
    mini.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the corpus"
    )
    mini.add_argument(
        "--clips", type=at_least(1), default=5000, metavar="N", help="of all splits (%(default)s)"
    )
    mini.add_argument(
        "--seed", type=at_least(0), default=0, help="of every random choice (%(default)s)"
    )
    mini.add_argument(
        "--workers",
        type=at_least(0),
        default=1,
        metavar="N",
        help="processes; 0: this one (%(default)s)",
    )
    mini.add_argument(
        "--engines", nargs="+", choices=("espeak", "piper"), default=["espeak", "piper"],
        help="that speak (both); espeak needs the extra tts, piper the extra piper",
    )  # fmt: skip
    mini.add_argument(
        "--no-filter", action="store_true", help="keep clips that an ASR model does not understand"
    )
    mini.add_argument(
        "--recognizer", default="whisper-tiny.en", metavar="NAME",
        help="that listens: %(default)s (extra asr), or a folder with a CTranslate2 Whisper",
    )  # fmt: skip
    mini.add_argument(
        "--max-wer", type=float, default=0.3, metavar="SHARE",
        help="word errors up to which a clip is understood (%(default)s)",
    )  # fmt: skip
    mini.add_argument(
        "--sentences", type=Path, metavar="FILE",
        help="texts to speak, one a line (those of the package); `llaso prepare wordnet` makes such a file",
    )  # fmt: skip
    mini.add_argument(
        "--rule-share", type=float, default=0.7, metavar="SHARE",
        help="of what is transcribed, texts made by rule instead of sentences (%(default)s)",
    )  # fmt: skip
    mini.add_argument(
        "--held-out", nargs="+", type=Path, default=[], metavar="JSON",
        help="further evaluation files that training may not share texts with",
    )  # fmt: skip

    asterisk = commands.add_parser(
        "asterisk",
        help="the held-out human prompts as an evaluation set",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    asterisk.add_argument(
        "packages", nargs="+", type=Path, metavar="FOLDER_OR_DEB",
        help="the two packages: .deb files, or one folder that holds both unpacked",
    )  # fmt: skip
    asterisk.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the set"
    )

    wordnet = commands.add_parser(
        "wordnet",
        help="a file of sentences of a wide vocabulary",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    wordnet.add_argument(
        "package", type=Path, metavar="FOLDER_OR_DEB",
        help="the package wordnet-base: the .deb file, or a folder that holds it unpacked",
    )  # fmt: skip
    wordnet.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="of the sentences"
    )

    audit = commands.add_parser(
        "audit",
        help="what evaluation data is in training data",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    audit.add_argument(
        "--train", nargs="+", type=Path, required=True, metavar="JSON", help="LLaSO-format files"
    )
    audit.add_argument(
        "--eval", nargs="+", type=Path, required=True, metavar="JSON", help="LLaSO-format files"
    )
    audit.add_argument(
        "--data-root", type=Path, metavar="DIR", help="where paths start (each file's folder)"
    )
    audit.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for audit.json and audit.txt"
    )
    audit.add_argument(
        "--run", type=at_least(0), default=5, metavar="N",
        help="words in a row that no two texts may share; 0: only equal texts are sought (%(default)s)",
    )  # fmt: skip
    audit.add_argument("--no-audio", action="store_true", help="compare texts only")
    audit.add_argument(
        "--workers", type=at_least(1), default=1, metavar="N", help="processes (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
