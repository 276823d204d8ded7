"""The programs as a newcomer meets them: help, a mistyped command, and mistakes in a training command."""

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import pytest

from llaso_jax.cli import COMMANDS, main
from llaso_jax.config import load_config, to_yaml

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )


# --- help -----------------------------------------------------------------------------------------


def module_of(command: str) -> str:
    return command.replace("-", "_")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_usage_and_examples(command: str):
    done = run(sys.executable, "-m", f"llaso_jax.{module_of(command)}", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: llaso {command}")
    assert "examples:" in done.stdout
    assert done.stdout.count(f"llaso {command}") + done.stdout.count(f"llaso_jax.{command}") >= 3
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command",
    ["prepare", "train", "generate", "convert", "evaluate", "ablate", "shard_table", "plan", "fit"],
)
def test_help_and_mistyped_flags_answer_before_jax_is_loaded(command: str):
    program = (
        "import sys\n"
        f"from llaso_jax.{command} import main\n"
        "for arguments in (['--help'], ['--nonsense']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as stopped:\n"
        "        print('code', stopped.code)\n"
        "assert not {'jax', 'transformers', 'grain'} & set(sys.modules)\n"
    )
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == [
        "code 0",
        "code 2",
    ]
    assert "usage: llaso" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_llaso_lists_its_commands(arguments: list[str], capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for name, what in COMMANDS.items():
        assert name in out
        assert what in out


def test_llaso_refuses_an_unknown_command(capsys):
    assert main(["nonsense"]) == 2
    captured = capsys.readouterr()
    assert "there is no command 'nonsense'" in captured.err
    assert captured.out == ""
    for name in COMMANDS:
        assert name in captured.err


def test_llaso_passes_its_arguments_on(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: llaso generate")


def test_the_console_script_is_this_program():
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["scripts"] == {"llaso": "llaso_jax.cli:main"}
    (script,) = entry_points(group="console_scripts", name="llaso")
    assert script.load() is main


def test_every_program_of_the_package_is_a_command():
    """Each module with a `main` at the top of llaso_jax is reachable through `llaso`."""
    programs = {
        path.stem
        for path in (ROOT / "llaso_jax").glob("*.py")
        if path.stem != "cli" and "def main(" in path.read_text(encoding="utf-8")
    }
    assert programs == set(map(module_of, COMMANDS))


# --- mistakes in a training command ---------------------------------------------------------------


class Mistake(NamedTuple):
    """A command and what its one message must say."""

    arguments: list[str]
    told: list[str]


# The first mesh decides how many devices the process simulates.
MISTAKES = {
    "rows do not split over the mesh": Mistake(
        ["--mesh", "32x1", "stages.0.data.rows=16"],
        ["16 rows per micro-batch", "32", "data.rows"],
    ),
    "lanes that do not divide": Mistake(
        ["stages.0.data.rows=16", "stages.0.data.lanes=3"],
        ["16 rows per micro-batch", "data.lanes=3"],
    ),
    "processes incomplete": Mistake(["--processes", "2"], ["--coordinator and --process-id"]),
    "processes that do not exist": Mistake(
        ["--processes", "2", "--process-id", "2", "--coordinator", "localhost:1"],
        ["--process-id 2 of --processes 2", "0 to 1"],
    ),
    "mesh that is no mesh": Mistake(["--mesh", "8 by 1"], ["'8 by 1'", "write 8x1"]),
    "mesh axis unknown": Mistake(["--mesh", "dada=2"], ["'dada'", "data, fsdp, tensor, context"]),
    "mesh axis empty": Mistake(["--mesh", "0x1"], ["size 0"]),
    "recipe unknown": Mistake(["--config", "minni"], ["'minni'", "mini", "llaso_base_align"]),
    "key unknown": Mistake(
        ["stages.0.optimizer.learning_rat=1"], ["did you mean", "stages.0.optimizer.learning_rate"]
    ),
    "value refused": Mistake(["stages.0.max_steps=many"], ["stages.0.max_steps", "'many'"]),
    "no assignment": Mistake(["seed"], ["any.field=value"]),
    "someone else's folder": Mistake(
        ["--output", "FOREIGN"], ["FOREIGN is not empty", "choose another --output"]
    ),
    "someone else's folder, overwritten": Mistake(
        ["--output", "FOREIGN", "--overwrite"], ["FOREIGN is not empty"]
    ),
    "run of other settings": Mistake(
        ["--output", "EARLIER"], ["EARLIER holds a run of other settings", "seed", "--overwrite"]
    ),
    "no weights": Mistake(["--config", "llaso_base_align"], ["models/llaso-base-init"]),
}

PROGRAM = """
import contextlib, io, json, sys
from llaso_jax.train import main
answers = []
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(arguments)
    answers.append([code, out.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and output of every mistaken command, all from one process in an empty folder."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "FOREIGN").mkdir()
    (folder / "FOREIGN" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (folder / "EARLIER").mkdir()
    earlier = dataclasses.replace(load_config("mini"), seed=7)
    (folder / "EARLIER" / "config.yaml").write_text(to_yaml(earlier), encoding="utf-8")
    arguments = json.dumps([mistake.arguments for mistake in MISTAKES.values()])
    # Wide enough that no message is broken up.
    environment = {**os.environ, "COLUMNS": "400", "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "FOREIGN" / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    told = json.loads(done.stdout.splitlines()[-1])
    return {name: tuple(answer) for name, answer in zip(MISTAKES, told, strict=True)}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_words_and_ends_with_code_1(answers, name: str):
    code, output = answers[name]
    assert code == 1
    assert "Traceback" not in output
    assert output.count("error") >= 1
    for part in MISTAKES[name].told:
        assert part in output


def test_a_mistyped_flag_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--mash", "8x1"])
    assert stopped.value.code == 2
    assert "--mash" in capsys.readouterr().err
