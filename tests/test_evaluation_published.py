"""The published predictions of three models give exactly the values that a correct scorer gets.

They are not part of this repository: LLASO_EVAL_PUBLISHED, or ../shared/eval, holds expected.json and predictions/.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llaso_jax.evaluation.bootstrap import Bootstrap
from llaso_jax.evaluation.judge.replay import ReplayJudge
from llaso_jax.evaluation.predictions import find_models
from llaso_jax.evaluation.scores_file import scores_tree
from llaso_jax.evaluation.scoring import Settings, score_model
from llaso_jax.evaluation.tasks import TaskFiles, load_tasks

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path(os.environ.get("LLASO_EVAL_PUBLISHED", ROOT.parent / "shared" / "eval"))
TOLERANCE = 1e-9

pytestmark = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is not on this machine: it is not shipped"
)


def differences(actual: Any, expected: Any, place: str = "") -> Iterator[str]:
    """Places at which two trees are not the same, keys included."""
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or set(actual) != set(expected):
            yield f"{place}: keys {sorted(set(actual or ()) ^ set(expected))}"
        else:
            for key in expected:
                yield from differences(actual[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, float):
        if actual is None or not abs(actual - expected) <= TOLERANCE:
            yield f"{place}: {actual} instead of {expected}"
    elif actual != expected:
        yield f"{place}: {actual} instead of {expected}"


def models() -> list[str]:
    folder = PUBLISHED / "predictions"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((PUBLISHED / "expected.json").read_text(encoding="utf-8"))


def tree(model: str, tasks: TaskFiles) -> dict[str, Any]:
    (folder,) = find_models([PUBLISHED / "predictions" / model], list(tasks))
    settings = Settings(bootstrap=Bootstrap(samples=0), examples=0)
    scored = score_model(folder, tasks, ReplayJudge(), settings)
    return scores_tree([scored], tasks, settings, {})


def test_the_task_map_is_the_published_one(expected):
    tasks = load_tasks()
    assert list(tasks) == list(expected["task_map"])
    assert {f: spec.described() for f, spec in tasks.items()} == expected["task_map"]


@pytest.mark.parametrize("model", models())
def test_every_file_but_the_largest_has_the_published_scores(model, expected):
    tasks = {file: spec for file, spec in load_tasks().items() if file != "ASR"}
    files = tree(model, tasks)["models"][model]["files"]
    assert len(files) == 43
    assert not [*differences(files, {f: expected["models"][model]["files"][f] for f in files})]


@pytest.mark.slow
@pytest.mark.parametrize("model", models())
def test_every_number_is_the_published_one(model, expected):
    assert not [*differences(tree(model, load_tasks())["models"][model], expected["models"][model])]
