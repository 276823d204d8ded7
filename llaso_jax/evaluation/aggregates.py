"""Scores of tasks, categories and modalities from those of files, and the overall ones."""

from collections.abc import Iterable, Mapping
from typing import Any

from llaso_jax.evaluation.metrics.judge_score import HIGHEST
from llaso_jax.evaluation.tasks import TaskFiles

SPEAKER, CONTENT = "paralinguistic/speaker", "paralinguistic/content"
MODALITIES = ("(t,a)", "(a,t)", "(a)")
# Tasks whose score rests on a judge or on text alone, which not every model was given.
NOT_COMMON = frozenset({"ASR", "IP", "EE", "PSWL", "PSSL"})


def aggregate(tasks: TaskFiles, units: Mapping[str, Any]) -> dict[str, Any]:
    """Aggregates of one protocol.

    Args:
      tasks: the files of the benchmark.
      units: `unit_score` of each file that has one: numbers, or arrays of bootstrap draws.

    Returns:
      tasks: mean over LLaSO-Eval's files of each, and over further files of a task without any of these; the
      rest is of LLaSO-Eval's files only. linguistic, semantic, speaker, content, paralinguistic: mean over
      their tasks; macro_task: over all tasks; macro_cat3, macro_cat4: over categories, None unless each of
      them has a score; modality: mean over files of each; modality_AQA_gpt, AQA_gpt_micro: judge's scores of
      question answering. Other means skip what is missing.
    """
    units_of_ours = {f: unit for f, unit in units.items() if not tasks[f].further}
    ours, all_tasks = _by_task(tasks, units_of_ours), _by_task(tasks, units)
    by_task = {task: ours.get(task, score) for task, score in all_tasks.items()}
    categories = {spec.task: spec.category for spec in tasks.values() if not spec.further}

    def of(*chosen: str) -> Any:
        return mean_of_present(score for task, score in ours.items() if categories[task] in chosen)

    aqa = {
        f: HIGHEST * unit
        for f, unit in units_of_ours.items()
        if tasks[f].task == "AQA" and tasks[f].metric == "GPT"
    }
    four = {
        "linguistic": of("linguistic"),
        "semantic": of("semantic"),
        "speaker": of(SPEAKER),
        "content": of(CONTENT),
    }
    paralinguistic = of(SPEAKER, CONTENT)
    three = (four["linguistic"], four["semantic"], paralinguistic)
    return {
        "tasks": by_task,
        **four,
        "paralinguistic": paralinguistic,
        "macro_task": mean_of_present(ours.values()),
        "macro_cat3": _mean_of_all(three),
        "macro_cat4": _mean_of_all(four.values()),
        "modality": {m: mean_of_present(_of_modality(tasks, units_of_ours, m)) for m in MODALITIES},
        "modality_AQA_gpt": {m: mean_of_present(_of_modality(tasks, aqa, m)) for m in MODALITIES},
        "AQA_gpt_micro": mean_of_present(aqa.values()),
        "macro_15_common_tasks": mean_of_present(
            score for task, score in ours.items() if task not in NOT_COMMON
        ),
    }


def _by_task(tasks: TaskFiles, units: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the files of each task that has a score, in the order of the task list."""
    scores: dict[str, list[Any]] = {}
    for file, spec in tasks.items():
        if file in units:
            scores.setdefault(spec.task, []).append(units[file])
    return {task: mean_of_present(of) for task, of in scores.items()}


def _of_modality(tasks: TaskFiles, units: Mapping[str, Any], modality: str) -> Iterable[Any]:
    return [unit for file, unit in units.items() if tasks[file].modality == modality]


def mean_of_present(scores: Iterable[Any]) -> Any:
    """The mean of numbers, or of arrays of draws, that are there; None of none."""
    present = [score for score in scores if score is not None]
    return sum(present) / len(present) if present else None


def _mean_of_all(scores: Iterable[Any]) -> Any:
    scores = list(scores)
    return None if any(score is None for score in scores) else mean_of_present(scores)
