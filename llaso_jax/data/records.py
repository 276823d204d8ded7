"""LLaSO's records by number: random access to files of any size, checked as they are read."""

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from llaso_jax.data.json_index import load_index
from llaso_jax.data.prompt import Turn
from llaso_jax.errors import DataError


@dataclass(frozen=True)
class Record:
    """One sample as written in the file.

    Attributes:
        sample_id: its "id", or "<file name>:<number>".
        position: where it stands: "record 12 (byte 8812) of train.json".
        voices: audio files in the order of their `<audio>` place-holders.
        turns: the conversation.
        fields: the whole JSON object (metadata, speaker_id, …).
    """

    sample_id: str
    position: str
    voices: tuple[Path, ...]
    turns: tuple[Turn, ...]
    fields: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """Its "metadata" (or "meta-data", as LLaSO's files have it): {} without."""
        found = self.fields.get("metadata") or self.fields.get("meta-data")
        return found if isinstance(found, dict) else {}


class RecordSource:
    """A Grain random-access source over one or more JSON array or JSON-lines files.

    Only offsets are held, memory-mapped; it can be pickled to worker processes and read by many
    threads.

    Args:
        json_files: LLaSO-format files, one after the other.
        data_root: where relative audio paths start; None for the JSON file's own folder.
        index_dir: where offsets are kept; None for the JSON file's own folder.

    Raises:
        DataError: a file that is missing or malformed; `source[i]` for a record that is.
    """

    def __init__(
        self,
        json_files: Sequence[str | Path],
        *,
        data_root: str | Path | None = None,
        index_dir: str | Path | None = None,
    ) -> None:
        if not json_files:
            raise DataError(
                "no data file was given; `train_json`, `mixture` or `eval_json` must name some"
            )
        self._files = [Path(file) for file in json_files]
        self._data_root = None if data_root is None else Path(data_root)
        self._index_dir = None if index_dir is None else Path(index_dir)
        self._open()

    def _open(self) -> None:
        self._indices: list[np.ndarray] = [load_index(f, self._index_dir) for f in self._files]
        self._ends = list(accumulate(len(index) for index in self._indices))

    def __getstate__(self) -> dict[str, Any]:
        """Paths only: the index is mapped again in the other process."""
        return {k: self.__dict__[k] for k in ("_files", "_data_root", "_index_dir")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def file_sizes(self) -> tuple[int, ...]:
        """Records of each file."""
        return tuple(map(len, self._indices))

    def __repr__(self) -> str:
        return f"RecordSource({[str(f) for f in self._files]}, records={len(self)})"

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[which - 1] if which else 0)
        start, end = (int(v) for v in self._indices[which][row])
        file = self._files[which]
        position = f"record {row} (byte {start}) of {file}"
        try:
            fields = json.loads(self._read(which, start, end))
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 text at byte {start + error.start}", position=position
            ) from error
        except json.JSONDecodeError as error:
            place = start + len(error.doc[: error.pos].encode())
            raise DataError(
                f"malformed JSON at byte {place}: {error.msg}", position=position
            ) from error
        return parse_record(
            fields,
            default_id=f"{file.name}:{row}",
            position=position,
            data_root=self._data_root or file.parent,
        )

    def _read(self, which: int, start: int, end: int) -> str:
        # Opened per read: nothing to share between threads, and far below the cost of the audio.
        with self._files[which].open("rb") as file:
            file.seek(start)
            return file.read(end - start).decode("utf-8-sig")


def parse_record(fields: Any, *, default_id: str, position: str, data_root: Path) -> Record:
    """Check one JSON object of LLaSO's format and make a `Record` of it.

    Raises:
        DataError: missing or mistyped keys, with `position`.
    """
    if not isinstance(fields, dict):
        raise DataError(
            f"a {type(fields).__name__} where an object with 'voice' and 'conversations' is needed",
            position=position,
        )
    sample_id = str(fields.get("id", default_id))

    def fail(problem: str) -> DataError:
        return DataError(problem, sample_id=sample_id, position=position)

    missing = [key for key in ("voice", "conversations") if key not in fields]
    if missing:
        raise fail(
            f"no {' nor '.join(map(repr, missing))} among its keys {sorted(fields)}; "
            'text-only samples have "voice": []'
        )
    voices = fields["voice"]
    voices = [voices] if isinstance(voices, str) else voices
    if not isinstance(voices, list) or not all(isinstance(v, str) and v for v in voices):
        raise fail(f"'voice' is {voices!r}; a path or a list of paths is needed")
    messages = fields["conversations"]
    if not isinstance(messages, list):
        raise fail(f"'conversations' is a {type(messages).__name__}; a list is needed")
    turns = []
    for i, message in enumerate(messages):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("from"), str)
            and isinstance(message.get("value"), str)
        ):
            raise fail(f"turn {i} is {message!r}; strings 'from' and 'value' are needed")
        turns.append(Turn(message["from"], message["value"]))
    return Record(
        sample_id=sample_id,
        position=position,
        voices=tuple(data_root / v.replace("\\", "/") for v in voices),
        turns=tuple(turns),
        fields=fields,
    )
