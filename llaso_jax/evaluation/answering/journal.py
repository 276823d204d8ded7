"""Answers on disk as they are made, so that a run that was killed goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from llaso_jax.errors import ConfigError
from llaso_jax.evaluation.errors import MalformedFileError
from llaso_jax.evaluation.json_records import read_json_file
from llaso_jax.evaluation.predictions import SUFFIX
from llaso_jax.evaluation.scores_file import write_json
from llaso_jax.json_lines import drop_torn_line

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
        drop_torn_line(self._lines)
        answers: dict[int, dict[str, Any]] = {}
        for place, line in enumerate(self._lines.read_bytes().split(b"\n"), 1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                number = int(entry.pop("number"))
                answers[number] = {**entry, "answer": str(entry["answer"])}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise MalformedFileError(
                    "this is no answer that was kept; delete the file to have its questions asked again",
                    position=f"line {place} of {self._lines}",
                ) from error
        return answers

    def is_finished(self, questions: int) -> bool:
        """Whether every one of `questions` is answered.

        Raises:
          ConfigError: the finished file holds answers to another number of questions.
        """
        if not self.finished.is_file():
            return False
        found = len(read_json_file(self.finished).lines)
        if found != questions:
            raise ConfigError(
                f"{self.finished} holds {found} answers to {questions} questions. Choose another --output, or "
                "delete the file."
            )
        return True

    def add(self, number: int, answer: dict[str, Any]) -> None:
        """Append one answer; it is in the file when this returns."""
        self._lines.parent.mkdir(parents=True, exist_ok=True)
        # What UTF-8 cannot hold, half a surrogate pair, is written as JSON escapes it.
        with self._lines.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({"number": number, **answer}, ensure_ascii=False) + "\n")

    def finish(self, records: list[dict[str, Any]]) -> None:
        """Write the released layout and drop the lines."""
        write_json(self.finished, records)
        self._lines.unlink(missing_ok=True)


def check_settings(folder: Path, settings: dict[str, Any], files: dict[str, Any]) -> None:
    """See that answers in `folder`, if there are any, are of the same settings and questions.

    Args:
      settings: what decides the text of answers.
      files: by name, what tells a file of questions from another of that name.

    Raises:
      ConfigError: answers of others, with the first that differs.
    """
    before, known = _noted(folder)
    differing = [(key, before.get(key), settings.get(key)) for key in sorted(settings | before)]
    differing = differing if before else []
    differing += [(name, known[name], files[name]) for name in files if name in known]
    for name, was, given in differing:
        if was != given:
            raise ConfigError(
                f"{folder} holds answers of other settings: {name} was {was!r} and is {given!r}. Choose "
                "another --output, or delete the folder."
            )


def note_settings(folder: Path, settings: dict[str, Any], files: dict[str, Any]) -> None:
    """Note what the answers in `folder` are made with, beside the files that were asked before."""
    _, known = _noted(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS_FILE, {"settings": settings, "files": known | files})


def _noted(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}, {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return tree["settings"], tree["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not say what the answers beside it were made with ({error}). Choose another "
            "--output, or delete the folder."
        ) from error
