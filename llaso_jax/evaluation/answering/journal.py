"""Answers on disk as they are made, so that a run that was killed goes on where it stopped."""

import json
import os
from pathlib import Path
from typing import Any

from llaso_jax.errors import ConfigError
from llaso_jax.evaluation.predictions import SUFFIX
from llaso_jax.evaluation.scores_file import write_json

SETTINGS_FILE = "run.json"


class Journal:
    """Answers of one file: lines while it is under way, the released layout when it is done.

    Args:
      folder: of the predictions.
      file: of the benchmark.
    """

    def __init__(self, folder: Path, file: str) -> None:
        self.finished = folder / f"{file}{SUFFIX}.json"
        self._lines = folder / "partial" / f"{file}.jsonl"

    def answered(self) -> dict[int, dict[str, Any]]:
        """Answers by number of the question; a last line that was cut short is dropped."""
        if not self._lines.is_file():
            return {}
        whole, _, torn = self._lines.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self._lines, len(whole) + bool(whole))
        entries = [json.loads(line) for line in whole.splitlines() if line]
        return {entry.pop("number"): entry for entry in entries}

    def add(self, number: int, answer: dict[str, Any]) -> None:
        """Append one answer; it is in the file when this returns."""
        self._lines.parent.mkdir(parents=True, exist_ok=True)
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"number": number, **answer}, ensure_ascii=False) + "\n")

    def finish(self, records: list[dict[str, Any]]) -> None:
        """Write the released layout and drop the lines."""
        write_json(self.finished, records)
        self._lines.unlink(missing_ok=True)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note what the answers in `folder` are made with, or see that it is the same as before.

    Raises:
      ConfigError: answers of other settings, with the first that differs.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key in settings.keys() | before.keys():
        if settings.get(key) != before.get(key):
            raise ConfigError(
                f"{folder} holds answers of other settings: {key} was {before.get(key)!r} and is "
                f"{settings.get(key)!r}. Choose another --output, or delete the folder."
            )
