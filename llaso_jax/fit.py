"""What a card with so much memory can train: `llaso fit --hbm 24`.

For every recipe, stage and rematerialization policy: how many rows fit, or from how many such cards on one does.
Nothing is compiled: stored arrays and what the backward pass keeps are counted (docs/plan.md says how close that
comes); `llaso plan` compiles the step.
"""

import argparse
import sys

EXAMPLES = """examples:
  llaso fit --hbm 24
  llaso fit --hbm 80 --config llaso_base_instruct
  llaso fit --hbm 16 --devices 8 --config llaso_base_instruct
"""

EXIT_ERROR = 1


def main(argv: list[str] | None = None) -> int:
    """Command line of `llaso fit`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="llaso fit",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hbm", type=float, required=True, help="memory of a device, GiB")
    parser.add_argument(
        "--devices", type=int, default=1, help="devices the weights are split over (default: 1)"
    )
    parser.add_argument("--config", help="recipe (default: all in configs/)")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="settings to change")
    args = parser.parse_args(argv)
    if args.hbm <= 0 or args.devices < 1:
        parser.error(f"--hbm {args.hbm:g} --devices {args.devices}: both must be positive")

    from llaso_jax.config import RECIPES, load_config
    from llaso_jax.errors import user_errors
    from llaso_jax.planning.fit import fit_text, fits

    names = [args.config] if args.config else sorted(path.stem for path in RECIPES.glob("*.yaml"))
    try:
        found = [
            fit
            for name in names
            for fit in fits(load_config(name, args.overrides), args.hbm, devices=args.devices)
        ]
    except user_errors() as error:
        sys.stderr.write(f"llaso fit: error: {error}\n")
        return EXIT_ERROR
    sys.stdout.write(fit_text(found, args.hbm, args.devices))
    return 0


if __name__ == "__main__":
    sys.exit(main())
