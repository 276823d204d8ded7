"""Which tasks and languages each model was trained on, and its scores on those and on the others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

from llaso_jax.evaluation.aggregates import mean_of_present
from llaso_jax.evaluation.errors import TaskListError
from llaso_jax.evaluation.metrics.languages import language_code
from llaso_jax.evaluation.scoring import ModelScores
from llaso_jax.evaluation.tasks import TaskFiles
from llaso_jax.evaluation.unit_score import Protocol


class Training(pydantic.BaseModel):
    """What a model was trained on: names of tasks, and languages (ISO 639)."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[str, ...]
    languages: tuple[Annotated[str, pydantic.AfterValidator(language_code)], ...] = ("en",)


def load_training(path: Path, tasks: TaskFiles) -> dict[str, Training]:
    """Read a YAML mapping of models to `tasks: [...]` and `languages: [...]`.

    Raises:
      TaskListError: not such a mapping, or a task that is not in the task list.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        declared = pydantic.TypeAdapter(dict[str, Training]).validate_python(tree)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, pydantic.ValidationError) as error:
        raise TaskListError(
            f"{path} does not say what models were trained on, as `<model>: {{tasks: [ASR]}}`: {error}"
        ) from error
    known = {spec.task for spec in tasks.values()}
    for model, training in declared.items():
        if strange := [task for task in training.tasks if task not in known]:
            raise TaskListError(
                f"{path}: {model} was trained on {', '.join(strange)}, which the task list does not know. "
                f"Tasks: {', '.join(sorted(known))}."
            )
    return declared


def seen_and_unseen(
    scored: Sequence[ModelScores],
    tasks: TaskFiles,
    training: Mapping[str, Training],
    protocol: Protocol,
) -> dict[str, dict[str, Any]]:
    """Of each declared model: share of tasks trained on, and means over files (0..1, abstention).

    Files count as seen, of an unseen language, or of an unseen task in a seen language.
    """
    table: dict[str, dict[str, Any]] = {}
    for model in scored:
        if model.name not in training:
            continue
        trained = training[model.name]
        names = {spec.task for spec in tasks.values()}
        groups: dict[str, list[str]] = {"seen": [], "unseen_task": [], "unseen_language": []}
        for file in model.entries:
            spec = tasks[file]
            group = "seen" if spec.task in trained.tasks else "unseen_task"
            groups["unseen_language" if spec.language not in trained.languages else group].append(
                file
            )
        table[model.name] = {
            "coverage": len(names & set(trained.tasks)) / len(names),
            "score": model.aggregates[protocol]["macro_task"],
            "abstention": model.aggregates["abstention_mean"],
            "groups": {
                group: {
                    "files": len(files),
                    "score": mean_of_present(model.units[protocol].get(f) for f in files),
                    "abstention": mean_of_present(model.entries[f]["abstention"] for f in files),
                }
                for group, files in groups.items()
            },
        }
    return table
