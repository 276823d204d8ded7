"""Train a speech-language model: `python -m llaso_jax.train --mesh 8x1`.

With no recipe it trains the quickstart: a small model from random weights, through both LLaSO
stages, on the speech corpus that ships with the package.
"""

import argparse
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler

from llaso_jax.errors import EXIT_RESUME, InterruptedRunError, user_errors

if TYPE_CHECKING:
    from llaso_jax.training.run import RunResult

EXAMPLES = """examples:
  python -m llaso_jax.train --mesh 8x1
      the quickstart, on 8 devices (simulated where the machine has none)
  python -m llaso_jax.train --mesh 8x1 --config llaso_base_align weights=models/llaso-init \\
      stages.0.data.train_json='[align.json]' stages.0.data.data_root=audio
      stage 1 of LLaSO-Base
  python -m llaso_jax.train --mesh data=2,fsdp=2,tensor=2 stages.0.optimizer.learning_rate=5e-4
      named mesh axes; any field of the recipe can be set
  python -m llaso_jax.train --mesh 16x1 --coordinator 10.0.0.1:9876 --processes 2 --process-id 0
      two machines of 8 devices; the second gets --process-id 1 (SLURM, Open MPI and TPU pods need no flags)

A run that was interrupted continues when the same command is given again, on the same or another mesh,
in the same or another number of processes.

exit codes: 0 finished; 1 something cannot be used, the message says what; 2 wrong usage; 75 interrupted
(Ctrl-C, SIGTERM) or another process lost: the same command continues; so it does after 134, with which
JAX ends a process when the first of them is lost
"""

EXIT_ERROR = 1


def main(argv: list[str] | None = None) -> int:
    """Command line of `llaso train`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="llaso train",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--mesh",
        default="1x1",
        help="devices: FSDPxTENSOR such as 8x1, or named, data=2,fsdp=4 (default: %(default)s)",
    )
    parser.add_argument(
        "--config",
        default="mini",
        help="recipe: a YAML file or a name in configs/ (default: %(default)s, the quickstart)",
    )
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/<name>)")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete an earlier run in --output and start over"
    )
    together = parser.add_argument_group(
        "several processes",
        "flags for all of them, or none where SLURM, Open MPI or a TPU pod says",
    )
    together.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0 and a port free there"
    )
    together.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="their number; 1: this one, whatever is around it",
    )
    together.add_argument("--process-id", type=int, metavar="I", help="number of this one, from 0")
    together.add_argument(
        "--peer-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds within which the loss of a process ends the others (default: %(default)g)",
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="settings to change")
    args = parser.parse_args(argv)

    console = Console()
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=console, show_path=False, show_level=False)],
        force=True,
    )
    for noisy in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loading threads tokenize already

    return _train(args, console)


def _train(args: argparse.Namespace, console: Console) -> int:
    # Imported late: --help and a mistyped flag answer at once.
    from llaso_jax.config import load_config
    from llaso_jax.sharding.mesh import parse_mesh
    from llaso_jax.sharding.processes import is_first_process
    from llaso_jax.training.launch import ProcessOptions, start_processes
    from llaso_jax.training.run import train

    started = time.monotonic()
    peers = None
    try:
        cfg = load_config(args.config, args.overrides)
        output = args.output or Path("runs") / cfg.name
        options = ProcessOptions(
            args.coordinator, args.processes, args.process_id, args.peer_timeout
        )
        devices = math.prod(parse_mesh(args.mesh).values())
        with start_processes(options, devices=devices) as peers:
            if peers is not None and not is_first_process():
                console.quiet = True
                logging.getLogger().setLevel(logging.WARNING)
            result = train(
                cfg, mesh=args.mesh, output=output, overwrite=args.overwrite, console=console
            )
        _announce(result, console, minutes=(time.monotonic() - started) / 60)
        code = 0
    except InterruptedRunError as error:
        console.print(f"[yellow]stopped[/]: {error}", highlight=False)
        code = EXIT_RESUME
    except KeyboardInterrupt:
        console.print(
            "[yellow]stopped[/]: run the same command again to continue from the last save."
        )
        code = EXIT_RESUME
    except user_errors() as error:
        sys.stderr.write(f"llaso train: error: {error}\n")
        code = EXIT_ERROR
    if peers is not None:
        peers.end(code)
    return code


def _announce(result: "RunResult", console: Console, *, minutes: float) -> None:
    console.print(f"\nDone in {minutes:.1f} min. In {result.output}:")
    console.print("  metrics.png, metrics.jsonl, tensorboard/   curves and numbers")
    console.print("  model/                                     weights for this project (Orbax)")
    if result.hf is not None:
        console.print(
            "  hf/                                        weights in LLaSO's Hugging Face layout"
        )
    console.print("Next: let it listen to a recording of yours,")
    console.print(f"  llaso generate --checkpoint {result.model} --audio some.wav", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
