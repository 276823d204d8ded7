"""A model's predictions as LLaSO released them: a folder with one file for each of the benchmark's.

Qwen2-Audio/ASR_test.json                                an array, or JSON lines (.jsonl)
Qwen2-Audio/gpt_result/dolly_input_1_test.jsonl          a judge's scores
Qwen2-Audio/abstention/instruction_follow_stats.jsonl    shares of abstentions
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from llaso_jax.evaluation.errors import (
    DuplicateRecordError,
    IncompleteRecordError,
    MalformedFileError,
    NoPredictionsError,
)
from llaso_jax.evaluation.json_records import Format, read_json_file
from llaso_jax.evaluation.metrics.digits import MOST_DIGITS
from llaso_jax.evaluation.metrics.judge_score import parse_score

ANSWER_KEYS = ("answer", "result", "prediction")
SUFFIX = "_test"
JUDGE_FOLDER = "gpt_result"
# Folders of a model that hold files with the endings of predictions and are no model.
INSIDE_A_MODEL = frozenset({JUDGE_FOLDER, "abstention", "partial"})
ABSTENTION_FILE = "abstention/instruction_follow_stats.jsonl"


class Item(NamedTuple):
    """One question with its answer.

    instruction: what the model was told, with `<audio>` place-holders. voices: audio paths, with `/`.
    audio_seconds: audio the model heard, if the file says.
    """

    reference: str
    answer: str
    instruction: str
    voices: tuple[str, ...]
    audio_seconds: float | None

    @property
    def question(self) -> tuple[Any, ...]:
        """What makes two items the same, whoever answers."""
        return self.voices, self.reference, self.instruction


@dataclass(frozen=True)
class Predictions:
    """One file of predictions.

    Attributes:
      path: where it was read from.
      format: a JSON array or JSON lines.
      pred_key: key of the predictions (of the first record).
      items: in file order.
      notes: what had to be repaired.
    """

    path: Path
    format: Format
    pred_key: str
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()

    @property
    def references(self) -> list[str]:
        """The right answers."""
        return [item.reference for item in self.items]

    @property
    def answers(self) -> list[str]:
        """The model's answers."""
        return [item.answer for item in self.items]


@dataclass(frozen=True)
class Judgements:
    """A judge's scores of one file.

    Attributes:
      scores: for each item, None where there is none.
      as_written: the same, of physical lines only that are JSON by themselves.
      explanations: what the judge wrote.
      broken_lines: objects that were spread over several lines or could not be read.
      notes: what was repaired, is missing or does not belong.
    """

    scores: tuple[float | None, ...]
    as_written: tuple[float | None, ...]
    explanations: tuple[str, ...]
    broken_lines: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFolder:
    """Where a model's predictions are.

    Attributes:
      name: of the model: its folder's.
      files: by the benchmark's file name.
      missing: files of the benchmark that are not there.
      strangers: prediction files that no task names.
      skipped: folders beside it, or in it, that were looked into and hold no predictions of its own.
    """

    name: str
    path: Path
    files: dict[str, Path]
    missing: tuple[str, ...]
    strangers: tuple[str, ...]
    skipped: tuple[Path, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What is there and not scored."""
        return [
            *(f"{name}: no task names this file" for name in self.strangers),
            *(f"the folder {folder} is not scored" for folder in self.skipped),
        ]


def find_models(folders: Iterable[Path], files: Sequence[str]) -> list[ModelFolder]:
    """The models in `folders`, each of which is a model's folder or holds several.

    Other folders in there are noted with the first model.

    Raises:
      NoPredictionsError: nothing there. DuplicateRecordError: two models of one name.
    """
    models: dict[str, ModelFolder] = {}
    for folder in folders:
        if not folder.is_dir():
            raise NoPredictionsError(
                f"{folder} is no folder: one with files such as ASR_test.json is needed, or one that "
                "holds such folders."
            )
        inner = [
            sub
            for sub in sorted(folder.iterdir())
            if sub.is_dir() and sub.name not in INSIDE_A_MODEL
        ]
        alone = bool(_prediction_files(folder))
        found = [folder] if alone else [sub for sub in inner if _prediction_files(sub)]
        if not found:
            raise NoPredictionsError(
                f"{folder} holds no predictions: files named <file>{SUFFIX}.json or .jsonl, such as "
                f"ASR{SUFFIX}.json, are needed in it or in folders of it."
            )
        for number, path in enumerate(found):
            skipped = () if number else tuple(sub for sub in inner if sub not in found)
            model = replace(_model_folder(path, files), skipped=skipped)
            if model.name in models:
                raise DuplicateRecordError(
                    f"two models are called {model.name!r}: {models[model.name].path} and {path}. "
                    "Rename a folder."
                )
            models[model.name] = model
    return list(models.values())


def _prediction_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jsonl") and _is_test(p))


def _is_test(path: Path) -> bool:
    return path.is_file() and path.stem.endswith(SUFFIX)


def _model_folder(path: Path, files: Sequence[str]) -> ModelFolder:
    there: dict[str, Path] = {}
    for file in _prediction_files(path):
        name = file.stem.removesuffix(SUFFIX)
        if name in there:
            raise DuplicateRecordError(
                f"{there[name]} and {file.name} are both there: leave the one to be scored."
            )
        there[name] = file
    return ModelFolder(
        name=path.resolve().name,
        path=path,
        files={name: there[name] for name in files if name in there},
        missing=tuple(name for name in files if name not in there),
        strangers=tuple(name for name in there if name not in files),
    )


def read_predictions(path: Path) -> Predictions:
    """Read one file.

    Raises:
      MalformedFileError: not UTF-8, not JSON, or without a record.
      IncompleteRecordError: a record without reference or prediction.
      DuplicateRecordError: two records with one id.
    """
    content = read_json_file(path)
    if not content.lines:
        raise MalformedFileError(f"{path} holds no record.")
    seen: dict[tuple[str, str], int] = {}
    items, notes, pred_key, several = [], [], "", 0
    for number, line in enumerate(content.lines):
        position = f"record {number} (line {line.number}) of {path}"
        if content.format == "json":
            position = f"record {number} of {path}"
        if line.value is None:
            raise MalformedFileError("no JSON, not even with the lines after it", position=position)
        if line.pieces > 1:
            notes.append(f"{path.name}: record {number} was broken over {line.pieces} lines")
        if line.mended:
            notes.append(f"{path.name}: record {number} held half a character, read as U+FFFD")
        _check_unique(line.value, number, seen, position)
        key, item = _item(line.value, position)
        pred_key = pred_key or key
        several += len({str(line.value[k]) for k in ANSWER_KEYS if k in line.value}) > 1
        items.append(item)
    if several:
        notes.append(
            f"{path.name}: {several} records hold different texts under {', '.join(ANSWER_KEYS)}: the first of "
            "these that is there is scored"
        )
    return Predictions(path, content.format, pred_key, tuple(items), tuple(notes))


def _check_unique(
    record: dict[str, Any], number: int, seen: dict[tuple[str, str], int], position: str
) -> None:
    for key in ("id", "index"):
        if (value := record.get(key)) is None:
            continue
        first = seen.setdefault((key, str(value)), number)
        if first != number:
            raise DuplicateRecordError(
                f"{key} {value!r} is that of record {first} too: every answer counts once",
                position=position,
            )


def _item(record: dict[str, Any], position: str) -> tuple[str, Item]:
    turns = record.get("conversations")
    texts = (
        [t.get("value") for t in turns if isinstance(t, dict)] if isinstance(turns, list) else []
    )
    if len(texts) < 2 or not isinstance(texts[1], str):
        raise IncompleteRecordError(
            "no reference: conversations[1].value must be a text", position=position
        )
    keys = [key for key in ANSWER_KEYS if key in record]
    if not keys or not isinstance(record[keys[0]], str):
        given = f"{keys[0]} is {record[keys[0]]!r:.40}" if keys else "none of them is there"
        raise IncompleteRecordError(
            f"no prediction: a text under {', '.join(ANSWER_KEYS[:-1])} or {ANSWER_KEYS[-1]} is "
            f"needed, and {given}. An empty answer is an empty text.",
            position=position,
        )
    voices = record.get("voice") or []
    voices = [voices] if isinstance(voices, str) else voices
    if not isinstance(voices, list) or not all(isinstance(voice, str) for voice in voices):
        raise IncompleteRecordError(
            f"no audio: voice must be a path or a list of paths, and is {voices!r:.40}",
            position=position,
        )
    return keys[0], Item(
        reference=texts[1],
        answer=record[keys[0]],
        instruction=str(texts[0]),
        voices=tuple(voice.replace("\\", "/") for voice in voices),
        audio_seconds=_seconds(record.get("audio_seconds")),
    )


def _seconds(value: Any) -> float | None:
    """A number that is one, and not a whole one past what f64 holds."""
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        return None
    return float(value) if isinstance(value, int | float) else None


def read_judgements(path: Path, items: Sequence[Item]) -> Judgements:
    """Read a file of `gpt_result`: objects with the index of an item and the judge's evaluation.

    An evaluation of another answer or reference than the item's is not used.

    Raises:
      MalformedFileError: not UTF-8, or lines that are no objects.
    """
    scores: list[float | None] = [None] * len(items)
    written: list[float | None] = [None] * len(items)
    told = [""] * len(items)
    notes, broken, others = [], 0, []
    for line in read_json_file(path).lines:
        if line.pieces != 1:
            broken += 1
            outcome = f"put together from {line.pieces}" if line.pieces else "it stays unreadable"
            notes.append(f"{path.name}: line {line.number} is broken: {outcome}")
        if line.value is None:
            continue
        index = line.value.get("index")
        if not isinstance(index, int) or not 0 <= index < len(items):
            notes.append(
                f"{path.name}: line {line.number} has index {index!r:.20} of {len(items)} items"
            )
            continue
        if told[index]:
            raise DuplicateRecordError(
                f"index {index} is judged twice", position=f"line {line.number} of {path}"
            )
        told[index] = str(line.value.get("evaluation", ""))
        if not _is_of(line.value, items[index]):
            others.append(index)
            continue
        scores[index] = parse_score(told[index])
        if line.pieces == 1:
            written[index] = scores[index]
        if scores[index] is None:
            notes.append(f"{path.name}: line {line.number} states no score")
    if absent := sum(not text for text in told):
        notes.append(f"{path.name}: {absent} of {len(items)} items are not judged")
    if others:
        notes.append(
            f"{path.name}: {len(others)} scores are of another answer or reference than the item's and are not "
            f"used; the first is of item {others[0]}"
        )
        for index in others:
            told[index] = ""
    return Judgements(tuple(scores), tuple(written), tuple(told), broken, tuple(notes))


def _is_of(judgement: dict[str, Any], item: Item) -> bool:
    """Whether what was judged, where it is told, is this answer to this item."""
    judged = (
        (judgement.get("predicted"), item.answer),
        (judgement.get("reference"), item.reference),
    )
    return all(told is None or str(told).strip() == text.strip() for told, text in judged)


def read_abstentions(folder: Path) -> dict[str, float]:
    """Published shares of abstentions, 0 to 1, by file name; {} where there are none."""
    path = folder / ABSTENTION_FILE
    if not path.is_file():
        return {}
    rows = [line.value for line in read_json_file(path).lines if line.value]
    return {
        str(row["file"]).rpartition(".")[0].removesuffix(SUFFIX): row["abstention_rate"] / 100
        for row in rows
        if "file" in row and isinstance(row.get("abstention_rate"), int | float)
    }
