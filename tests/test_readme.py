"""What the README and the pages in docs/ tell people to type exists, and is accepted."""

import argparse
import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from llaso_jax.cli import COMMANDS
from llaso_jax.config import load_config
from llaso_jax.sharding.mesh import parse_mesh

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(page.name, language, text) for language, text in found]


def commands(block: Block) -> list[list[str]]:
    """Words of every command; `a && b` are two, a line that ends in a backslash goes on."""
    if block.language not in ("bash", "sh", "console", ""):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split(" && ")]
    if not block.language:  # output, a layout of folders, or a command
        parts = [part for part in parts if part.startswith(("llaso ", "python -m "))]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """(command, arguments) if this starts a program of ours."""
    name, *rest = words
    if name.endswith("llaso"):
        return rest[0], rest[1:]
    if name.endswith(("python", "python3")) and rest[:1] == ["-m"]:
        package, _, command = rest[1].partition(".")
        return (command, rest[2:]) if package == "llaso_jax" else None
    return None


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
OURS = [
    (block.page, *found)
    for block in ALL_BLOCKS
    for words in commands(block)
    if (found := program(words))
]
SETUP = next(block for block in blocks(README) if block.language == "bash")
SETUP_LINES = [
    line for line in SETUP.text.splitlines() if line.strip() and not line.startswith("#")
]


def test_pages_hold_commands_to_check():
    assert len(OURS) > 5
    assert {command for _, command, _ in OURS} >= {"train", "generate", "convert"}


# --- the two set-up commands ----------------------------------------------------------------------


def test_the_first_block_is_the_two_set_up_commands():
    assert blocks(README)[0] == SETUP
    assert SETUP.text.count("&&") == 4
    train, test = SETUP_LINES
    assert train.endswith("-m llaso_jax.train --mesh 8x1")
    assert test.endswith("-m pytest")


@pytest.mark.parametrize("line", SETUP_LINES)
def test_each_set_up_command_works_by_itself_and_twice(line: str):
    make, install, _ = (shlex.split(part) for part in line.split(" && "))
    assert make == ["python3", "-m", "venv", ".venv"]  # makes it, or leaves it as it is
    assert install[:2] == [".venv/bin/pip", "install"]
    assert install[-2] == "-e"


def test_installed_extras_exist():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"])
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = {name for found in re.findall(r"\.\[([\w,]+)\]", text) for name in found.split(",")}
    assert named <= extras
    assert {"test", "dev"} <= named


def test_continuous_integration_runs_the_readmes_tests():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert SETUP_LINES[1].rpartition("/bin/")[2] in script.replace('"', "").replace("$bin/", "")


def test_there_is_a_place_for_the_quickstarts_output():
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- quickstart-output -->") == 1
    assert text.count("<!-- /quickstart-output -->") == 1
    assert text.index("<!-- quickstart-output -->") < text.index("<!-- /quickstart-output -->")


# --- commands -------------------------------------------------------------------------------------


class Parsed(Exception):  # noqa: N818 - carries a result out of main, no error
    """Raised where a program would start to work."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def parse(monkeypatch: pytest.MonkeyPatch, command: str, argv: list[str]) -> argparse.Namespace:
    """What the program makes of its arguments; it is stopped before it acts on them."""
    original = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        raise Parsed(original(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as stopped:
        importlib.import_module(f"llaso_jax.{command.replace('-', '_')}").main(argv)
    return stopped.value.arguments


@pytest.mark.parametrize(
    ("page", "command", "argv"), OURS, ids=[f"{p}:{c}-{i}" for i, (p, c, _) in enumerate(OURS)]
)
def test_a_command_is_accepted_by_its_program(monkeypatch, page, command, argv):
    assert command in COMMANDS, f"{page}: llaso {command}"
    try:
        arguments = parse(monkeypatch, command, argv)
    except SystemExit as stopped:
        assert stopped.code == 0, f"{page}: llaso {command} {shlex.join(argv)}"  # noqa: PT017
        return  # --help
    if getattr(arguments, "mesh", None):
        parse_mesh(arguments.mesh)
    if command in ("train", "shard-table"):
        load_config(arguments.config, arguments.overrides)


def test_a_wrong_flag_on_a_page_would_be_noticed(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(monkeypatch, "train", ["--mish", "8x1"])
    assert stopped.value.code == 2
    assert "--mish" in capsys.readouterr().err


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block",
    [block for block in ALL_BLOCKS if block.language == "python"],
    ids=lambda block: f"{block.page}-{block.text.splitlines()[0][:40]}",
)
def test_python_on_a_page_compiles_and_imports_what_exists(block: Block):
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llaso_jax"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.page}: {node.module}.{alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [t for t in targets if t and not re.match(r"[a-z]+:", t)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_on_a_page_exist(page: Path):
    folders = "llaso_jax|modeling|sharding|configs|scripts|tests|docs"
    named = re.findall(rf"`((?:{folders})/[\w./*-]*)`", page.read_text(encoding="utf-8"))
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/")))]
    assert missing == []


def test_every_page_is_reachable_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_the_readme_names_every_recipe():
    text = README.read_text(encoding="utf-8")
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert f"`configs/{recipe.name}`" in text
