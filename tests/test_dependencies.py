"""Who may import whom, read from the source: llaso_jax -> modeling -> sharding -> jax."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = {"modeling": "../modeling", "sharding": "../sharding", "configs": "../configs"}

MODELING = sorted((ROOT / "modeling").rglob("*.py"))
SHARDING = sorted((ROOT / "sharding").rglob("*.py"))
APPLICATION = [
    path
    for path in sorted((ROOT / "llaso_jax").rglob("*.py"))
    if path.relative_to(ROOT / "llaso_jax").parts[0] not in LINKS
]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
SOURCES = [*APPLICATION, *MODELING, *SHARDING, *SCRIPTS]

# Standard library of pure code: no files, no processes, no network, no configuration.
PURE_STDLIB = {
    "abc",
    "collections",
    "contextlib",
    "contextvars",
    "dataclasses",
    "difflib",
    "enum",
    "functools",
    "itertools",
    "logging",
    "math",
    "operator",
    "re",
    "types",
    "typing",
    "warnings",
    "zlib",
}
NUMERIC = {"jax", "jaxlib", "numpy", "ml_dtypes"}
# sharding reads what the compiler wrote and describes what it knows; still no files.
MAY_IMPORT = {
    "modeling": PURE_STDLIB
    | NUMERIC
    | {"flax", "tokamax", "llaso_jax.modeling", "llaso_jax.sharding"},
    "sharding": PURE_STDLIB | NUMERIC | {"llaso_jax.sharding"},
}


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(absolute name of what is imported, the statement); relative imports yield their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module in ("llaso_jax", "."):
                for alias in node.names:
                    yield f"{module}.{alias.name}".replace("..", "."), node
            else:
                yield module, node
        elif isinstance(node, ast.Call) and _name(node.func) in (
            "__import__",
            "importlib.import_module",
            "import_module",
        ):
            argument = node.args[0] if node.args else None
            yield (
                (
                    argument.value
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                    else "<computed>"
                ),
                node,
            )


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: not those inside functions or TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and _name(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from at_import_time(node)


def allowed(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"


def test_the_check_sees_the_sources():
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {
        "modeling/llama.py",
        "modeling/kernels/attention/api.py",
        "sharding/rules.py",
        "llaso_jax/errors.py",
    } <= names
    assert not any(name.startswith(("llaso_jax/modeling", "llaso_jax/sharding")) for name in names)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn", {"torch.nn"}),
        ("from torch import nn", {"torch"}),
        ("def f():\n  import torch", {"torch"}),
        ("from llaso_jax import training", {"llaso_jax.training"}),
        ("from .. import data", {".."}),
        ("import importlib\nimportlib.import_module('torch')", {"importlib", "torch"}),
        ("__import__(name)", {"<computed>"}),
    ],
)
def test_the_check_finds_every_form_of_import(source: str, found: set[str]):
    assert {module for module, _ in imports(ast.parse(source))} == found


@pytest.mark.parametrize(("folder", "paths"), [("modeling", MODELING), ("sharding", SHARDING)])
def test_pure_code_imports_only_what_lies_below_it(folder: str, paths: list[Path]):
    wrong = [
        f"{where(path, node)} imports {module}"
        for path in paths
        for module, node in imports(parse(path))
        if not allowed(module, MAY_IMPORT[folder])
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(("folder", "paths"), [("modeling", MODELING), ("sharding", SHARDING)])
def test_pure_code_opens_no_file_and_prints_nothing(folder: str, paths: list[Path]):
    forbidden = {
        *("open", "print", "input", "exec", "eval"),
        *("np.load", "np.save", "np.savez", "np.fromfile", "jnp.load", "jnp.save"),
    }
    wrong = [
        f"{where(path, node)} calls {_name(node.func)}"
        for path in paths
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and _name(node.func) in forbidden
    ]
    assert not wrong, wrong


def test_torch_is_imported_by_tests_only():
    # A benchmark in scripts/ measures us against torch; it is no part of the package.
    wrong = [
        f"{where(path, node)} imports {module}"
        for path in SOURCES
        if not (path.parent.name == "scripts" and path.name.startswith("benchmark_"))
        for module, node in imports(parse(path))
        if allowed(module, {"torch"})
    ]
    assert not wrong, wrong


def test_transformers_is_imported_lazily():
    """It takes seconds and is needed for tokenizers and HF configs only."""
    wrong = [
        f"{where(path, statement)} imports {module}"
        for path in [*APPLICATION, *MODELING, *SHARDING]
        for statement in at_import_time(parse(path))
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for module, _ in imports(statement)
        if allowed(module, {"transformers"})
    ]
    assert not wrong, wrong


def test_modeling_and_sharding_are_imported_under_llaso_jax_only():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    wrong = [
        f"{where(path, node)} imports {module}"
        for path in [*SOURCES, *tests]
        for module, node in imports(parse(path))
        if allowed(module, {"modeling", "sharding", "configs"})
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(("name", "target"), LINKS.items())
def test_links_are_links_on_disk_and_in_git(name: str, target: str):
    link = ROOT / "llaso_jax" / name
    assert link.is_symlink()
    assert str(link.readlink()) == target
    assert link.resolve() == ROOT / name
    if not (ROOT / ".git").exists():
        return  # an unpacked source archive: nothing to ask git about
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "--", f"llaso_jax/{name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert listed.startswith("120000 "), listed


def test_importing_the_model_loads_neither_torch_nor_transformers():
    program = (
        "import sys, llaso_jax.modeling.functional, llaso_jax.sharding.mesh\n"
        "heavy = {'torch', 'transformers', 'librosa', 'grain', 'orbax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)
