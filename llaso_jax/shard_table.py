"""Where every parameter of a recipe lies on a mesh: `llaso shard-table --config F --mesh M`.

No device, weight or data is needed. Trained parameters are stored in float32, frozen ones as `precision.frozen` says
for an accelerator; the optimizer's two moments are laid out as the parameters they belong to.
"""

import argparse
import sys
from pathlib import Path

from llaso_jax.errors import user_errors

EXAMPLES = """examples:
  llaso shard-table --config llaso_base_instruct --mesh 8x1
  llaso shard-table --config llaso_base_align --mesh data=4,fsdp=2,tensor=8 --output table.txt
  llaso shard-table --config mini --mesh 4x2 --stage 1
"""

EXIT_ERROR = 1


def main(argv: list[str] | None = None) -> int:
    """Command line of `llaso shard-table`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="llaso shard-table",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="mini", help="recipe (default: %(default)s)")
    parser.add_argument("--mesh", default="8x1", help="devices (default: %(default)s)")
    parser.add_argument(
        "--stage", type=int, default=0, help="whose trained parameters (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="file to write instead of the terminal")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="settings to change")
    args = parser.parse_args(argv)

    from llaso_jax.config import load_config
    from llaso_jax.planning.shards import recipe_shards

    try:
        text = recipe_shards(load_config(args.config, args.overrides), args.mesh, stage=args.stage)
        if args.output is None:
            sys.stdout.write(text)
        else:
            args.output.write_text(text, encoding="utf-8")
    except (*user_errors(), OSError) as error:
        sys.stderr.write(f"llaso shard-table: error: {error}\n")
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
