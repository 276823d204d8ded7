"""The questions of a benchmark: LLaSO-Eval's folder of files, or one file whose records name their task."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llaso_jax.data.records import Record, RecordSource
from llaso_jax.evaluation.errors import IncompleteRecordError, NoPredictionsError
from llaso_jax.evaluation.predictions import SUFFIX
from llaso_jax.evaluation.tasks import Metric, TaskFile, TaskFiles, load_tasks

# `metadata.metric` of records that name their task: the mini corpus writes these.
RECORD_METRICS: dict[str, Metric] = {"wer": "WER/CER", "accuracy": "ACC"}
TASK_LIST = "tasks.yaml"


@dataclass(frozen=True)
class QuestionFile:
    """Questions of one file of predictions.

    Attributes:
      spec: its task.
      source, rows: records, and which of them.
    """

    spec: TaskFile
    source: RecordSource
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Record:
        return self.source[self.rows[number]]


def load_questions(
    data: Path,
    *,
    only: Sequence[str] = (),
    further: Sequence[Path] = (),
    limit: int | None = None,
    audio_root: Path | None = None,
    index_dir: Path | None = None,
) -> list[QuestionFile]:
    """Questions of a folder with files named `<file>_test.json`, or of one JSON file.

    Args:
      only: tasks or files to keep; () for all.
      further: task lists beside LLaSO-Eval's (of a folder).
      limit: most questions of each file, the first ones.
      audio_root: where audio paths start; None for the folder of the data.
      index_dir: where offsets of records are kept.

    Raises:
      NoPredictionsError: no file of the task list is there.
      TaskListError: an unknown task. IncompleteRecordError: a record of one file without task.
    """
    if data.is_dir():
        tasks = load_tasks(further, only=only)
        found = [(spec, path) for spec in tasks.values() if (path := _file(data, spec.file))]
        if not found:
            raise NoPredictionsError(
                f"{data} holds none of the benchmark's files: files such as ASR{SUFFIX}.json are needed."
            )
        sources = [(spec, _source([path], audio_root, index_dir)) for spec, path in found]
        files = [(spec, source, tuple(range(len(source)))) for spec, source in sources]
    else:
        source = _source([data], audio_root, index_dir)
        files = _by_task(data, source)
        if only:
            files = [(s, source, rows) for s, _, rows in files if s.task in only or s.file in only]
    return [QuestionFile(spec, source, rows[:limit]) for spec, source, rows in files]


def _file(data: Path, name: str) -> Path | None:
    paths = (data / f"{name}{SUFFIX}{ending}" for ending in (".json", ".jsonl"))
    return next((path for path in paths if path.is_file()), None)


def _source(files: Sequence[Path], audio_root: Path | None, index_dir: Path | None) -> RecordSource:
    return RecordSource(files, data_root=audio_root, index_dir=index_dir)


def _by_task(
    data: Path, source: RecordSource
) -> list[tuple[TaskFile, RecordSource, tuple[int, ...]]]:
    """One file for each task that the records' metadata names, in alphabetical order."""
    rows: dict[str, list[int]] = defaultdict(list)
    facts: dict[str, dict[str, Any]] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for row in range(len(source)):
        record = source[row]
        metadata = record.fields.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        if metadata.get("metric") not in RECORD_METRICS or "task" not in metadata:
            raise IncompleteRecordError(
                "metadata must name task and metric (wer or accuracy) where one file holds all tasks",
                sample_id=record.sample_id,
                position=record.position,
            )
        rows[metadata["task"]].append(row)
        facts[metadata["task"]] = metadata
        labels[metadata["task"]].update(metadata.get("labels", ()))
    return [
        (
            TaskFile(
                file=f"{data.stem}_{task}",
                task=task,
                title=task,
                category="further",
                modality="(t,a)",
                metric=RECORD_METRICS[facts[task]["metric"]],
                # Labels of question answering differ by record: those of all would be no closed set.
                labels=tuple(sorted(labels[task])) if task != "AQA" else (),
                further=True,
            ),
            source,
            tuple(rows[task]),
        )
        for task in sorted(rows)
    ]


def write_task_list(folder: Path, files: Sequence[QuestionFile]) -> None:
    """Note further tasks beside their predictions, so that `llaso evaluate score` can be given them."""
    entries = [
        {
            "name": file.spec.task,
            "metric": file.spec.metric,
            "files": [file.spec.file],
            **({"labels": list(file.spec.labels)} if file.spec.labels else {}),
        }
        for file in files
        if file.spec.further
    ]
    if entries:
        text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
        (folder / TASK_LIST).write_text(text, encoding="utf-8")


def tasks_of(files: Sequence[QuestionFile]) -> TaskFiles:
    """The task list that the predictions of `files` are scored with."""
    return {file.spec.file: file.spec for file in files}
