"""Optional packages that hold an engine or its files."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from llaso_jax.speech.errors import MissingEngineError


def optional_module(name: str, *, use: str, extra: str) -> ModuleType:
    """The module `name`.

    Raises:
      MissingEngineError: it is not installed; says that `use` needs it, and which extra brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(name, use, extra) from error


def package_folder(name: str, *, use: str, extra: str) -> Path:
    """Where the files of the package `name` lie; the package is not imported.

    Raises:
      MissingEngineError: as of `optional_module`.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise _missing(name, use, extra)
    return Path(spec.origin).parent


def _missing(name: str, use: str, extra: str) -> MissingEngineError:
    return MissingEngineError(
        f"{use} needs the module {name}, which is not installed: pip install 'llaso-jax[{extra}]'"
    )
