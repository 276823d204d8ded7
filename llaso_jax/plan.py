"""What a training step takes on a TPU slice or a GPU node that is not there: `llaso plan --config F --topology T`.

The real step is compiled for those devices and never run. Told and saved as plan.json, plan.html and plan.png:
memory of a device by owner, FLOPs, bytes between devices, which of compute, memory and links binds, and what that means
for the time. TPUs need libtpu (pip install 'llaso-jax[tpu]'), GPUs XLA's CUDA plugin (docs/plan.md).
"""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  llaso plan --config llaso_base_align --topology v5e:4x2 --mesh 8x1
  llaso plan --config llaso_base_instruct --topology h100:8 --mesh all --batch 1
  llaso plan --config llaso_base_align --topology v5e:2x2 --mesh 1x1 --batch auto precision.remat=dots
"""

EXIT_ERROR = 1


def main(argv: list[str] | None = None) -> int:
    """Command line of `llaso plan`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="llaso plan",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", default="llaso_base_instruct", help="recipe (default: %(default)s)"
    )
    parser.add_argument(
        "--topology", required=True, help="TPU slice or GPUs of a node: v5e:4x2, v5p:2x2x1, h100:8"
    )
    parser.add_argument(
        "--mesh",
        help="as for llaso train, over all devices of the topology or the first of them; all: every way to split "
        "them over a batch axis and a tensor axis (default: all devices on fsdp)",
    )
    parser.add_argument(
        "--stage", type=int, default=0, help="number of the stage (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        help="rows that a device (a part of the mesh's batch axes) has at a time; auto: as many as take 92%% of the "
        "memory (default: the recipe's)",
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the report (default: runs/plan/RECIPE_TOPOLOGY)"
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="settings to change")
    args = parser.parse_args(argv)
    if args.batch not in (None, "auto") and not args.batch.isdecimal():
        parser.error(f"--batch {args.batch}: a number of rows, or auto")

    from llaso_jax.config import load_config
    from llaso_jax.errors import user_errors
    from llaso_jax.planning.report import comparison_text, plan_text, write_report
    from llaso_jax.planning.search import plan_meshes

    try:
        recipe = load_config(args.config, args.overrides)
        plans, refusals = plan_meshes(
            recipe, topology=args.topology, mesh=args.mesh, stage=args.stage, batch=args.batch
        )
        if not plans:
            sys.stdout.write("".join(f"{mesh}: {why}\n" for mesh, why in refusals.items()))
            return EXIT_ERROR
        sys.stdout.write(plan_text(plans[0]))
        if len(plans) + len(refusals) > 1:
            sys.stdout.write("\n" + comparison_text(plans, refusals))
        folder = args.output or Path("runs/plan") / f"{recipe.name}_{args.topology}".replace(
            ":", "_"
        )
        write_report(folder, plans, refusals)
        sys.stdout.write(f"report: {folder / 'plan.html'}\n")
    except (*user_errors(), OSError) as error:
        sys.stderr.write(f"llaso plan: error: {error}\n")
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
