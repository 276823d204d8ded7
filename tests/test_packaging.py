"""The wheel: what is in it, and that an installation of it works away from the sources."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("modeling", "sharding", "configs")


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the sources, built from a copy so that no older build has a part in it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("llaso_jax", *LINKED):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index"]
    pip += ["--no-build-isolation", "--no-deps", "--wheel-dir", "dist", "."]
    run(*pip, cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def files(folder: str, pattern: str = "*") -> set[str]:
    paths = (ROOT / folder).rglob(pattern)
    return {
        str(path.relative_to(ROOT))
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_everything_in_the_wheel_is_under_llaso_jax(names):
    """Nothing as generic as `modeling` or `configs` lands in site-packages."""
    top = {name.partition("/")[0] for name in names}
    assert {part for part in top if not part.endswith(".dist-info")} == {"llaso_jax"}


@pytest.mark.parametrize(
    ("folder", "pattern"), [("modeling", "*.py"), ("sharding", "*.py"), ("configs", "*.yaml")]
)
def test_linked_folders_are_whole_in_the_wheel(names, folder: str, pattern: str):
    sources = files(folder, pattern)
    assert sources
    assert {f"llaso_jax/{name}" for name in sources} <= names


def test_every_module_of_the_application_is_in_the_wheel(names):
    sources = {name for name in files("llaso_jax", "*.py") if name.split("/")[1] not in LINKED}
    assert len(sources) > 20
    assert sources <= names


def test_the_mini_corpus_is_whole_in_the_wheel_with_its_licence(names):
    sources = files("llaso_jax/data/mini")
    assert any(name.endswith(".opus") for name in sources)
    assert sources <= names
    assert "llaso_jax/data/mini/LICENSE.md" in names


def test_no_tests_caches_or_sources_of_others_are_in_the_wheel(names):
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_metadata_name_licences_and_program(wheel: Path, names):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        (programs,) = (n for n in names if n.endswith(".dist-info/entry_points.txt"))
        fields = email.message_from_bytes(archive.read(metadata))
        assert "llaso = llaso_jax.cli:main" in archive.read(programs).decode()
    assert fields["Name"] == "llaso-jax"
    assert fields["License-Expression"] == "Apache-2.0"
    assert set(fields.get_all("License-File") or []) == {
        "LICENSE",
        "llaso_jax/data/mini/LICENSE.md",
    }


PROGRAM = """
import sys
from pathlib import Path

import llaso_jax
from llaso_jax.config import load_config, resolve_path
from llaso_jax.data.records import RecordSource
from llaso_jax.modeling.functional import count_params
from llaso_jax.sharding.mesh import parse_mesh

home = Path(llaso_jax.__file__).parents[1]
assert home == Path(sys.argv[1]), home
cfg = load_config("mini")
assert count_params(cfg.model) > 1e6
assert parse_mesh("8x1")["fsdp"] == 8
data = cfg.stages[0].data
records = RecordSource([resolve_path(f) for f in data.eval_json], index_dir=Path("index"))
first = records[0]
assert first.voices[0].is_file(), first
assert home in first.voices[0].parents
assert (resolve_path(cfg.tokenizer) / "tokenizer.json").is_file()
for name in ("modeling", "sharding", "configs"):
    assert not (home / name).exists(), name
print("works")
"""


def test_an_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index"]
    run(*pip, "--quiet", "--no-deps", "--target", str(site), str(wheel), cwd=elsewhere)
    paths = {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    program = (sys.executable, "-c", PROGRAM, str(site))
    assert run(*program, cwd=elsewhere, **paths).strip() == "works"
    listed = run(sys.executable, "-m", "llaso_jax.cli", "--help", cwd=elsewhere, **paths)
    assert "train" in listed
