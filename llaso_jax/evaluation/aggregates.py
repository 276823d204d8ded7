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
      tasks: mean over the files of each; linguistic, semantic, speaker, content, paralinguistic: mean over
      their tasks; macro_task: over all tasks; macro_cat3, macro_cat4: over categories, None unless each of
      them has a score; modality: mean over files of tasks of each; modality_AQA_gpt, AQA_gpt_micro: judge's scores of
      question answering. Other means skip what is missing.
    """
    by_task = {
        task: _mean(units[f] for f, spec in tasks.items() if spec.task == task and f in units)
        for task in dict.fromkeys(spec.task for spec in tasks.values())
    }
    by_task = {task: score for task, score in by_task.items() if score is not None}
    ours = {spec.task: spec.category for spec in tasks.values() if not spec.further}

    def of(*categories: str) -> Any:
        return _mean(s for task, s in by_task.items() if ours.get(task) in categories)

    aqa = {f: HIGHEST * u for f, u in units.items() if tasks[f].task == "AQA"}
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
        "macro_task": _mean(s for task, s in by_task.items() if task in ours),
        "macro_cat3": _mean_of_all(three),
        "macro_cat4": _mean_of_all(four.values()),
        "modality": {m: _mean(_of_modality(tasks, units, m)) for m in MODALITIES},
        "modality_AQA_gpt": {m: _mean(_of_modality(tasks, aqa, m)) for m in MODALITIES},
        "AQA_gpt_micro": _mean(aqa.values()),
        "macro_15_common_tasks": _mean(
            s for task, s in by_task.items() if task in ours and task not in NOT_COMMON
        ),
    }


def _of_modality(tasks: TaskFiles, units: Mapping[str, Any], modality: str) -> Iterable[Any]:
    return [u for f, u in units.items() if tasks[f].modality == modality and not tasks[f].further]


def _mean(scores: Iterable[Any]) -> Any:
    scores = list(scores)
    return sum(scores) / len(scores) if scores else None


def _mean_of_all(scores: Iterable[Any]) -> Any:
    scores = list(scores)
    return None if any(score is None for score in scores) else _mean(scores)
