"""Folders that are whole or not there: written under another name, renamed when complete."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from llaso_jax.conversion.errors import TargetExistsError
from llaso_jax.data.prompt import PROMPT_FILE
from llaso_jax.errors import ConversionError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    PROMPT_FILE,
)
GENERATION_CONFIG = "generation_config.json"


def check_target(folder: str | Path, *, overwrite: bool, file: bool = False) -> Path:
    """The absolute path of a folder (or `file`) that may be written.

    Raises:
      TargetExistsError: it is there with something in it and `overwrite` is off, or it is a file where
        a folder is to be written, or the other way round.
    """
    folder = Path(folder).absolute()
    if file:
        if folder.is_dir():
            raise TargetExistsError(f"{folder} is a folder; a file is to be written.")
        if folder.exists() and not overwrite:
            raise TargetExistsError(
                f"{folder} is there already. Choose another file, or replace it with --overwrite."
            )
        return folder
    if folder.exists() and not folder.is_dir():
        raise TargetExistsError(f"{folder} is a file; a folder is to be written.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise TargetExistsError(
            f"{folder} is not empty. Choose another folder, or replace it with --overwrite."
        )
    return folder


@contextlib.contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill in, which takes its name when the block ends without an error.

    What an interrupted earlier call left is removed. With several processes all fill in the same
    folder; the first makes and renames it.

    Raises:
      TargetExistsError: see `check_target`.
      ConversionError: the disk is full, or not writable.
    """
    target = check_target(folder, overwrite=overwrite)
    partial = target.with_name(f".{target.name}.incomplete")
    first = jax.process_index() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _barrier("folder made")
        yield partial
        _barrier("folder filled")
        if first:
            _replace(target, partial)
        _barrier("folder renamed")
    except OSError as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise ConversionError(
            f"{target} could not be written ({error}); nothing was left behind."
        ) from error
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A file to write, which takes its name when the block ends without an error.

    Raises:
      TargetExistsError: see `check_target`.
      ConversionError: the disk is full, or not writable.
    """
    target = check_target(path, overwrite=overwrite, file=True)
    partial = target.with_name(f".{target.name}.incomplete")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise ConversionError(
            f"{target} could not be written ({error}); nothing was left behind."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _replace(target: Path, partial: Path) -> None:
    if target.exists():
        old = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as indented JSON, written by the first process."""
    if jax.process_index() == 0:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path | None, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy those of `names` that `source` has and `target` has not; returns the names copied."""
    copied = []
    for name in names:
        if source is not None and (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
            copied.append(name)
    return copied
