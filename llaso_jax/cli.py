"""`llaso <command>`: the same programs as `python -m llaso_jax.<command>` (an underscore for each dash)."""

import importlib
import sys

COMMANDS = {
    "prepare": "corpora: synthetic speech, held-out prompts, and an audit for leaks",
    "train": "train a model through the stages of a recipe",
    "convert": "Hugging Face, CTranslate2 or GGUF weights in; Hugging Face weights out",
    "generate": "let a trained model answer about a recording",
    "evaluate": "score predictions on LLaSO-Eval, compare models, check the paper",
    "ablate": "the same steps under other meshes or settings, measured side by side",
    "plan": "memory, speed and traffic of a training step on devices that are not there",
    "fit": "what a card with so much memory can train",
    "shard-table": "where every parameter of a recipe lies on a mesh",
}


def main(argv: list[str] | None = None) -> int:
    """Run the named command with the rest of the arguments; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        module = arguments[0].replace("-", "_")
        return importlib.import_module(f"llaso_jax.{module}").main(arguments[1:])
    width = max(map(len, COMMANDS))
    lines = ["usage: llaso <command> [options]", "", "commands:"]
    lines += [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    lines += ["", "`llaso <command> --help` tells more."]
    asked = not arguments or arguments[0] in ("-h", "--help")
    if not asked:
        lines.insert(0, f"llaso: there is no command {arguments[0]!r}\n")
    (sys.stdout if asked else sys.stderr).write("\n".join(lines) + "\n")
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
