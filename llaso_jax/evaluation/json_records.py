"""Objects of a JSON array or of JSON lines, lines broken in two put together again."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llaso_jax.evaluation.errors import MalformedFileError

Format = Literal["json", "jsonl"]

MOST_PIECES = 16  # physical lines tried for one object; released files have two


class Line(NamedTuple):
    """One JSON object.

    number: of its first physical line, from 1 (in an array: its place, from 1).
    pieces: physical lines it was put together from; 0 if it could not be.
    value: the object; None if it could not be read.
    mended: it held halves of surrogate pairs, which no UTF-8 file can hold: each is U+FFFD now.
    """

    number: int
    pieces: int
    value: dict[str, Any] | None
    mended: bool = False


class JsonFile(NamedTuple):
    """What a file holds, and how it was written."""

    format: Format
    lines: list[Line]


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
      MalformedFileError: it cannot be opened, or is not UTF-8 (with the byte).
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedFileError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}. Save it "
            "as UTF-8."
        ) from error
    except OSError as error:
        raise MalformedFileError(f"{path} cannot be read: {error.strerror}.") from error


def read_json_file(path: Path) -> JsonFile:
    """Read an array of objects or lines of them.

    A line that is no JSON is put together with the lines after it until it is: files were released in
    which a line break had slipped into a string. A line that stays broken is given with value None.

    Raises:
      MalformedFileError: not UTF-8; an array that is broken or holds anything but objects.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        return JsonFile("json", _array(text, path))
    return JsonFile("jsonl", _lines(text, path))


def _array(text: str, path: Path) -> list[Line]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedFileError(
            f"malformed JSON array: {error.msg}", position=f"line {error.lineno} of {path}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise MalformedFileError(f"{path} cannot be read as JSON: {error}") from error
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise MalformedFileError(
                f"{value!r:.60} is no JSON object", position=f"record {number} of {path}"
            )
    return [_line(number + 1, 1, value, path) for number, value in enumerate(values)]


def _line(number: int, pieces: int, value: Any, path: Path) -> Line:
    try:
        whole = without_halves(value)
        return Line(number, pieces, whole, mended=whole != value)
    except RecursionError as error:
        position = f"line or record {number} of {path}"
        raise MalformedFileError("values are nested too deep", position=position) from error


def without_halves(value: Any) -> Any:
    """A JSON value with U+FFFD for every half of a surrogate pair in its texts."""
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {without_halves(key): without_halves(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_halves(inner) for inner in value]
    return value


def _lines(text: str, path: Path) -> list[Line]:
    physical = text.split("\n")  # not splitlines: a string may hold U+2028
    lines, start = [], 0
    while start < len(physical):
        if not physical[start].strip():
            start += 1
            continue
        value, pieces = _whole(physical, start)
        if pieces and not isinstance(value, dict):
            raise MalformedFileError(
                f"{value!r:.60} is no JSON object", position=f"line {start + 1} of {path}"
            )
        lines.append(_line(start + 1, pieces, value, path))
        start += max(pieces, 1)
    return lines


def _whole(physical: list[str], start: int) -> tuple[Any, int]:
    """The object that starts in a line, and of how many lines it is made; (None, 0): of none.

    A line that is an object by itself is never taken into another.
    """
    joined = ""
    for pieces, line in enumerate(physical[start : start + MOST_PIECES], 1):
        if pieces > 1 and _parsed(line) is not None:
            break
        joined += line.rstrip("\r")
        if (value := _parsed(joined)) is not None:
            return value, pieces
    return None, 0


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (
        RecursionError,
        ValueError,
    ):  # no JSON; nested too deep; a number of thousands of digits
        return None
