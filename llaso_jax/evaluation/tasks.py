"""Which files make up a benchmark, what task each is of, and how it is scored."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml

from llaso_jax.evaluation.errors import TaskListError
from llaso_jax.evaluation.metrics.languages import language_code
from llaso_jax.evaluation.metrics.numbers import Quantity

LLASO_EVAL = Path(__file__).parent / "llaso_eval.yaml"

Metric = Literal[
    "ACC", "WER/CER", "PER", "MAE", "GPT", "F1", "EM", "BLEU", "chrF", "TER", "ROUGE-L"
]
Modality = Literal["(t,a)", "(a,t)", "(a)"]
Companion = Literal[
    "commands", "intents", "entities", "sentence pronunciation", "word pronunciation"
]
Files = tuple[str, ...] | dict[Modality, tuple[str, ...]]
CLOSED: frozenset[Metric] = frozenset({"ACC", "F1"})


class TaskEntry(pydantic.BaseModel):
    """One entry of a task list, as written."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str = ""
    category: str = "further"
    metric: Metric
    modality: Modality = "(t,a)"
    files: Files
    labels: tuple[str, ...] = ()
    quantity: Quantity | None = None
    companion: Companion | None = None
    language: Annotated[str, pydantic.AfterValidator(language_code)] = "en"

    @pydantic.field_validator("files")
    @classmethod
    def _in_one_folder(cls, files: Files) -> Files:
        for names in files.values() if isinstance(files, dict) else (files,):
            for name in names:
                plain_name(name)
        return files

    @pydantic.model_validator(mode="after")
    def _complete(self) -> "TaskEntry":
        if (self.metric == "MAE") != (self.quantity is not None):
            raise ValueError("MAE, and only MAE, needs a quantity: age or pitch")
        if self.labels and self.metric not in CLOSED:
            raise ValueError(f"labels are for {' and '.join(sorted(CLOSED))}, not {self.metric}")
        return self


@dataclass(frozen=True)
class TaskFile:
    """One file of a benchmark.

    Attributes:
      file: its name without "_test.json".
      task, title, category: see llaso_eval.yaml.
      further: not of LLaSO-Eval: left out of its overall scores.
    """

    file: str
    task: str
    title: str
    category: str
    modality: Modality
    metric: Metric
    labels: tuple[str, ...] = ()
    quantity: Quantity | None = None
    companion: Companion | None = None
    language: str = "en"
    further: bool = False

    @property
    def closed(self) -> bool:
        """Whether the answer is one of a set of labels."""
        return self.metric in CLOSED

    def entry(self) -> dict[str, Any]:
        """As a task list holds it, without what is the default there: `read_task_list` gives the same."""
        defaults = {name: field.default for name, field in TaskEntry.model_fields.items()}
        written = {**dataclasses.asdict(self), "name": self.task, "files": [self.file]}
        written["labels"] = list(self.labels)
        defaults |= {"title": self.task, "labels": []}
        return {key: written[key] for key in defaults if written[key] != defaults[key]}

    def described(self) -> dict[str, str]:
        """As in the `task_map` of scores.json."""
        return {
            "task": self.task,
            "category": self.category,
            "modality": self.modality,
            "ended": "closed" if self.closed else "open",
            "metric": self.metric,
        }


def plain_name(name: str) -> str:
    """The same name, if a file or folder can safely be called so.

    Raises:
      ValueError: it could lead out of its folder, or be hidden.
    """
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise ValueError(f"{name!r} is no name of a file: letters, digits and _ . + - are")
    return name


TaskFiles = dict[str, TaskFile]
"""The files of a benchmark by name, in the order of the task list."""


def load_tasks(further: Iterable[Path] = (), *, only: Sequence[str] = ()) -> TaskFiles:
    """LLaSO-Eval's files and those of `further` task lists.

    Args:
      further: YAML files in the form of llaso_eval.yaml.
      only: names of tasks or files to keep; () for all.

    Raises:
      TaskListError: a list that cannot be read, a file in two tasks, or a name that is in none.
    """
    tasks: TaskFiles = {}
    for path in (LLASO_EVAL, *further):
        for spec in read_task_list(path, further=path != LLASO_EVAL):
            if spec.file in tasks:
                raise TaskListError(f"{path}: the file {spec.file!r} is already in a task.")
            tasks[spec.file] = spec
    return chosen(tasks, only)


@functools.cache
def benchmark_tasks() -> int:
    """How many tasks LLaSO-Eval has."""
    return len({spec.task for spec in load_tasks().values()})


def chosen(tasks: TaskFiles, only: Sequence[str]) -> TaskFiles:
    """Those of some tasks or files; () for all.

    Raises:
      TaskListError: a name that is in none.
    """
    if not only:
        return tasks
    names = {*tasks, *(spec.task for spec in tasks.values())}
    for name in only:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            known = ", ".join(dict.fromkeys(spec.task for spec in tasks.values()))
            raise TaskListError(f"there is no task or file {name!r}{hint} Tasks: {known}.")
    return {f: spec for f, spec in tasks.items() if spec.task in only or f in only}


def read_task_list(path: Path, *, further: bool = True) -> list[TaskFile]:
    """The files of one task list.

    Raises:
      TaskListError: a list that cannot be read, with the entry and the key at fault.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise TaskListError(f"the task list {path} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise TaskListError(f"{path} holds no list of tasks: each starts with `- name: ...`.")
    return [
        spec for number, raw in enumerate(entries) for spec in _files(raw, path, number, further)
    ]


def _files(raw: Any, path: Path, number: int, further: bool) -> list[TaskFile]:
    try:
        entry = TaskEntry.model_validate(raw)
    except pydantic.ValidationError as error:
        raise TaskListError(f"{path}, task {number + 1}: {_told(error)}") from error
    by_modality: dict[Modality, tuple[str, ...]] = (
        entry.files if isinstance(entry.files, dict) else {entry.modality: entry.files}
    )
    return [
        TaskFile(
            file=file,
            task=entry.name,
            title=entry.title or entry.name,
            category=entry.category,
            modality=modality,
            metric=entry.metric,
            labels=entry.labels,
            quantity=entry.quantity,
            companion=entry.companion,
            language=entry.language,
            further=further,
        )
        for modality, files in by_modality.items()
        for file in files
    ]


def _told(error: pydantic.ValidationError) -> str:
    """The first problem in words, with the nearest key or metric where one is mistyped."""
    # A mistyped key is also a missing one: the mistype says more.
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"]) or "entry"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, TaskEntry.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {key!r}{hint} Keys: {', '.join(TaskEntry.model_fields)}."
    if key == "metric":
        return f"unknown metric {problem['input']!r}; metrics: {', '.join(get_args(Metric))}."
    return f"{key}: {problem['msg']}"
