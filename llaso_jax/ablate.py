"""Which mesh, which setting: the same training steps under each, measured side by side.

`llaso ablate sharding` tries every strategy on every mesh of the devices; `--sweep` any field of the recipe. Every
point trains some steps of the recipe's real stage on its real data in a process of its own; a point that fails is a row
with its error. With `--topology` points are planned for devices that need not be there: compiled, never run. The same
command continues a sweep that was interrupted.
"""

import argparse
import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler

from llaso_jax.arguments import at_least
from llaso_jax.errors import EXIT_RESUME, user_errors

if TYPE_CHECKING:
    from llaso_jax.ablation.grid import Point
    from llaso_jax.ablation.sweep import Row, Sweep

EXAMPLES = """examples:
  llaso ablate sharding --config mini --devices 8
      every strategy on every mesh of 8 devices (simulated where the machine has none), ranked by speed
  llaso ablate --config mini --mesh 8x1 --sweep remat=none,dots,layer --sweep stages.0.data.rows=8,16,32
      every combination of two fields; a short name is enough where one field alone ends so
  llaso ablate --sweep audio_mode=true_length,padded 'mel_buckets=[104,160],[3000]' sequence_length=112,800
      fields of one --sweep move together
  llaso ablate sharding --devices 8 --by memory --sweep remat=none,layer --output runs/memory stages.0.accumulation=2
      the least memory; settings at the end hold for all points
  llaso ablate sharding --config llaso_base_align --topology v5e:4x2
      the same, ranked by what a plan predicts for a TPU slice
"""

EXIT_ERROR = 1
SHARDING = "sharding"


def main(argv: list[str] | None = None) -> int:
    """Command line of `llaso ablate`; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    sharding = words[:1] == [SHARDING]
    parser = _parser()
    args = parser.parse_args(words[1:] if sharding else words)
    if sharding and args.devices is None and args.topology is None:
        parser.error("sharding needs --devices or --topology")
    if args.topology is not None and args.by == "loss":
        parser.error("--by loss: nothing is trained with --topology")
    if not sharding and not args.sweep:
        parser.error("nothing to sweep: give --sweep field=value,value, or `llaso ablate sharding`")

    console = Console()
    handler = RichHandler(console=console, show_path=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("llaso_jax.ablation").setLevel(logging.INFO)

    # Imported late: --help and a mistyped flag answer at once.
    import jax

    from llaso_jax.ablation.grid import grid, sharding_axis, swept_axis
    from llaso_jax.ablation.sweep import Sweep
    from llaso_jax.config import load_config
    from llaso_jax.planning.recipe import planned_stage
    from llaso_jax.planning.topology import topology_devices

    # Trials have processes of their own, and would find accelerators taken by this one.
    jax.config.update("jax_platforms", "cpu")
    try:
        cfg = load_config(args.config, args.overrides)
        planned_stage(cfg, args.stage)
        axes = [swept_axis(assignments, cfg, args.stage) for assignments in args.sweep]
        if sharding:
            devices = args.devices or len(topology_devices(str(args.topology)))
            axes.insert(0, sharding_axis(devices))
        points = grid(axes, mesh=args.mesh, topology=args.topology)
        output = args.output or Path("runs") / f"ablate-{cfg.name}"
        return _run(Sweep(cfg, args.stage, args.steps), points, output, args, console)
    except user_errors() as error:
        sys.stderr.write(f"llaso ablate: error: {error}\n")
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llaso ablate",
        usage="llaso ablate [sharding] [options] [field=value ...]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="mini", help="recipe (default: %(default)s)")
    parser.add_argument(
        "--devices",
        type=at_least(1),
        help="of `sharding`: how many to split, all of the machine's",
    )
    parser.add_argument(
        "--topology",
        help="predict for these devices: v5e:4x2, v5p:2x2x1, h100:8 (default: run here)",
    )
    parser.add_argument(
        "--mesh", default="1x1", help="of points whose mesh is not swept (default: %(default)s)"
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="values of a field, of `mesh` or `topology`; several fields move together, several --sweep are combined",
    )
    parser.add_argument(
        "--stage", type=int, default=0, help="whose steps are measured (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=at_least(2),
        default=5,
        help="of every point; the first is not timed (default: %(default)s)",
    )
    parser.add_argument(
        "--by", choices=("speed", "memory", "loss"), default="speed", help="what decides the rank"
    )
    parser.add_argument("--output", type=Path, help="folder (default: runs/ablate-<name>)")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete an earlier sweep in --output"
    )
    parser.add_argument("--retry", action="store_true", help="try failed points of it again")
    parser.add_argument(
        "--timeout", type=float, metavar="S", help="seconds after which a point has failed"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="settings of all points"
    )
    return parser


def _run(
    sweep: "Sweep",
    points: "list[Point]",
    output: Path,
    args: argparse.Namespace,
    console: Console,
) -> int:
    from llaso_jax.ablation import report
    from llaso_jax.ablation.results import rank
    from llaso_jax.ablation.sweep import run_sweep
    from llaso_jax.evaluation.progress import progress_bar

    rows: list[Row] = []
    fields = report.varying(points)
    trials = run_sweep(
        sweep,
        points,
        output,
        overwrite=args.overwrite,
        retry=args.retry,
        timeout=args.timeout,
    )
    with progress_bar(console) as bar, contextlib.suppress(KeyboardInterrupt):
        task = bar.add_task("points", total=len(points))
        for row in trials:
            rows.append(row)
            console.print(report.progress_line(row, fields), markup=False, highlight=False)
            bar.advance(task)
    outcomes = rank(rows, args.by)
    console.print(report.result_table(rows, outcomes))
    for note in report.notes(rows, outcomes):
        console.print(f"- {note}", markup=False, highlight=False)
    report.write_csv(output / "table.csv", rows, outcomes)
    if len(rows) < len(points):
        console.print(
            f"[yellow]stopped[/] after {len(rows)} of {len(points)} points: the same command continues."
        )
        return EXIT_RESUME
    best = report.winner(outcomes)
    if best is None:
        console.print(f"\nNo point worked: {output}/logs has what each said.", highlight=False)
        return EXIT_ERROR
    report.plot(output / "plot.png", rows, outcomes)
    command = report.write_winner(output / "winner.yaml", best, sweep.config)
    console.print(f"\nIn {output}: table.csv, plot.png, winner.yaml. To train the best:")
    console.print(f"  {command}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
