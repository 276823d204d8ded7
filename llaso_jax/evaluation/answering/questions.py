"""The questions of a benchmark: LLaSO-Eval's folder of files, or one file whose records name their task."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from llaso_jax.data.records import Record, RecordSource
from llaso_jax.evaluation.errors import IncompleteRecordError, NoPredictionsError
from llaso_jax.evaluation.predictions import SUFFIX
from llaso_jax.evaluation.tasks import (
    Metric,
    TaskFile,
    TaskFiles,
    chosen,
    load_tasks,
    plain_name,
    read_task_list,
)

# `metadata.metric` of records that name their task: the mini corpus writes these.
RECORD_METRICS: dict[str, Metric] = {"wer": "WER/CER", "accuracy": "ACC"}
TASK_LIST = "tasks.yaml"


@dataclass(frozen=True)
class QuestionFile:
    """Questions of one file of predictions.

    Attributes:
      spec: its task.
      path: where the questions are.
      source, rows: records, and which of them.
    """

    spec: TaskFile
    path: Path
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
      further: task lists beside LLaSO-Eval's; of one file, those that name `<its name>_<task>`.
      limit: most questions of each file, the first ones.
      audio_root: where audio paths start; None for the folder of the data.
      index_dir: where offsets of records are kept.

    Raises:
      NoPredictionsError: no file of the task list is there, or one without a question.
      TaskListError: an unknown task. IncompleteRecordError: a record of one file without task or metric.
    """
    if data.is_dir():
        tasks = load_tasks(further, only=only)
        found = [(spec, path) for spec in tasks.values() if (path := _file(data, spec.file))]
        if not found:
            raise NoPredictionsError(
                f"{data} holds none of the benchmark's files: files such as ASR{SUFFIX}.json are needed."
            )
        sources = [(spec, path, _source(path, audio_root, index_dir)) for spec, path in found]
        files = [QuestionFile(s, path, src, tuple(range(len(src)))) for s, path, src in sources]
    else:
        source = _source(data, audio_root, index_dir)
        declared = {spec.file: spec for path in further for spec in read_task_list(path)}
        files = _by_task(data, source, declared)
        kept = chosen({file.spec.file: file.spec for file in files}, only)
        files = [file for file in files if file.spec.file in kept]
    for file in files:
        if not len(file):
            raise NoPredictionsError(f"{file.path} holds no question.")
    return [replace(file, rows=file.rows[:limit]) for file in files]


def _file(data: Path, name: str) -> Path | None:
    paths = (data / f"{name}{SUFFIX}{ending}" for ending in (".json", ".jsonl"))
    return next((path for path in paths if path.is_file()), None)


def _source(file: Path, audio_root: Path | None, index_dir: Path | None) -> RecordSource:
    return RecordSource([file], data_root=audio_root, index_dir=index_dir)


def _by_task(data: Path, source: RecordSource, declared: TaskFiles) -> list[QuestionFile]:
    """One file for each task that the records' metadata names, in alphabetical order.

    How a file is scored stands in `declared`, or else in the metadata.
    """
    if not len(source):
        raise NoPredictionsError(f"{data} holds no question.")
    rows: dict[str, list[int]] = defaultdict(list)
    metrics: dict[str, Any] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for row in range(len(source)):
        record = source[row]
        metadata = record.metadata
        task: Any = metadata.get("task")
        metric = metadata.get("metric")
        problem = _problem(data, task, metric, declared)
        if not problem and metrics.setdefault(task, metric) != metric:
            problem = f"the metric of {task} is {metric!r}, and was {metrics[task]!r} before"
        named = metadata.get("labels") or []
        if not isinstance(named, list) or not all(isinstance(label, str) for label in named):
            problem = f"metadata.labels must be a list of texts, and is {named!r:.40}"
        if problem:
            raise IncompleteRecordError(
                problem, sample_id=record.sample_id, position=record.position
            )
        rows[task].append(row)
        labels[task].update(named)
    files = []
    for task in sorted(rows):
        name = f"{data.stem}_{task}"
        spec = declared.get(name) or _spec(name, task, metrics[task], labels[task])
        files.append(QuestionFile(spec, data, source, tuple(rows[task])))
    return files


def _problem(data: Path, task: Any, metric: Any, declared: TaskFiles) -> str:
    """What is wrong with the metadata of a record; "" for nothing."""
    if not isinstance(task, str):
        return f"metadata.task must name a task where one file holds all, and is {task!r:.40}"
    try:
        name = plain_name(f"{data.stem}_{task}")
    except ValueError as error:
        return f"metadata.task {task!r:.40}: {error}"
    if name not in declared and not (isinstance(metric, str) and metric in RECORD_METRICS):
        return (
            f"metadata.metric must be {' or '.join(RECORD_METRICS)}, and is {metric!r:.40}; other metrics need an "
            f"entry with the file {name} in a --task-list"
        )
    return ""


def _spec(file: str, task: str, metric: str, labels: set[str]) -> TaskFile:
    return TaskFile(
        file=file,
        task=task,
        title=task,
        category="further",
        modality="(t,a)",
        metric=RECORD_METRICS[metric],
        # Labels of question answering differ by record: those of all would be no closed set.
        labels=tuple(sorted(labels)) if task != "AQA" else (),
        further=True,
    )


def write_task_list(folder: Path, files: Sequence[QuestionFile]) -> None:
    """Note further tasks beside their predictions, so that `llaso evaluate score` can be given them.

    Tasks that an earlier run has noted there stay.

    Raises:
      TaskListError: the list that is there cannot be read.
    """
    path = folder / TASK_LIST
    noted = {spec.file: spec for spec in (read_task_list(path) if path.is_file() else ())}
    noted |= {file.spec.file: file.spec for file in files if file.spec.further}
    if noted:
        entries = [spec.entry() for spec in noted.values()]
        text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


def tasks_of(files: Sequence[QuestionFile]) -> TaskFiles:
    """The task list that the predictions of `files` are scored with."""
    return {file.spec.file: file.spec for file in files}
