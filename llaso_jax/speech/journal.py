"""Which clips of a folder are finished, kept as they are made, so that rendering goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llaso_jax.json_lines import drop_torn_line
from llaso_jax.speech.errors import RenderError, SpeechError

JOURNAL_FILE = "rendered.jsonl"


@dataclass(frozen=True)
class RenderedClip:
    """A file that was made.

    Attributes:
      path: relative to the folder.
      seconds: length.
      sha256: of the file's bytes, hexadecimal.
      wer: errors of the recognizer over words of the text; None without a recognizer.
      heard: what the recognizer understood.
    """

    path: str
    seconds: float
    sha256: str
    wer: float | None = None
    heard: str | None = None


@dataclass(frozen=True)
class Entry:
    """A line of the journal: a clip, the digest of its description, the recognizer that heard it."""

    digest: str
    recognizer: str | None
    clip: RenderedClip


class Journal:
    """JSON lines in the folder; of several lines about one path the last counts.

    Args:
      folder: of the clips.

    Raises:
      RenderError: a line that is none of a journal.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / JOURNAL_FILE
        self._entries = {entry.clip.path: entry for entry in self._read()}

    def finished(self, path: str, digest: str, recognizer: str | None) -> RenderedClip | None:
        """The clip at `path`, if it was made of the same description, heard, and has not changed since."""
        entry = self._entries.get(path)
        if entry is None or entry.digest != digest:
            return None
        if recognizer is not None and entry.recognizer != recognizer:
            return None
        try:
            data = (self._folder / path).read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != entry.clip.sha256:
            return None
        return entry.clip

    def add(self, outcomes: Iterable[Entry | SpeechError]) -> None:
        """Note the clips among `outcomes`; they are in the file when this returns."""
        entries = [outcome for outcome in outcomes if isinstance(outcome, Entry)]
        self._entries |= {entry.clip.path: entry for entry in entries}
        with self._file.open("a", encoding="utf-8") as file:
            for entry in entries:
                file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")

    def _read(self) -> list[Entry]:
        if not self._file.is_file():
            return []
        drop_torn_line(self._file)  # the next line must not be written behind it
        entries = []
        for place, line in enumerate(self._file.read_bytes().splitlines(), 1):
            try:
                entries.append(_entry(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise RenderError(
                    f"line {place} of {self._file} is none of a journal ({error}); delete the file to have "
                    "every clip made again"
                ) from error
        return entries


def _entry(tree: dict[str, Any]) -> Entry:
    return Entry(tree["digest"], tree["recognizer"], RenderedClip(**tree["clip"]))
