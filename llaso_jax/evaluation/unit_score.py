"""Every metric on one scale, 0 (worst) to 1 (best), so that tasks can be averaged."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from llaso_jax.evaluation.metrics.judge_score import HIGHEST
from llaso_jax.evaluation.metrics.numbers import RANGES
from llaso_jax.evaluation.tasks import Metric, TaskFile

Protocol = Literal["paper", "corrected"]
"""`paper` is the upstream protocol: expected values of published predictions call it so."""

PROTOCOLS: tuple[Protocol, ...] = ("paper", "corrected")
LOWER_IS_BETTER: frozenset[Metric] = frozenset({"WER/CER", "PER", "MAE", "TER"})

Values = Mapping[str, Any]
"""Scores of one file by their dotted place in scores.json: numbers, or arrays of bootstrap draws."""


def main_score(spec: TaskFile, protocol: Protocol, values: Values) -> str:
    """The place of the score that a file is judged by: "corrected.wer", "paper", …"""
    if spec.metric == "WER/CER":
        section = "paper_unswapped" if protocol == "paper" else "corrected"
        rate = "wer" if f"{section}.wer" in values else "cer"
        return f"{section}.{rate}"
    if spec.metric == "PER" and protocol == "paper":
        return "paper_unswapped"
    return protocol


def unit_score(spec: TaskFile, protocol: Protocol, values: Values) -> Any:
    """The file's score on 0..1, of numbers or of arrays of draws; None where it has none.

    Accuracy, F1, exact match and ROUGE-L as they are; WER/CER the mean of both 1 - x, clipped; PER 1 - x,
    clipped; MAE 1 - MAE / range, clipped; a judge's score / 5; BLEU and chrF / 100; TER 1 - x / 100,
    clipped. In the upstream protocol error rates are the unswapped ones.
    """
    place = main_score(spec, protocol, values)
    score = values.get(place)
    if score is None:
        return None
    if spec.metric == "WER/CER":
        section = place.partition(".")[0]
        rates = [values[f"{section}.{r}"] for r in ("wer", "cer") if f"{section}.{r}" in values]
        return sum(_clip(1 - rate) for rate in rates) / len(rates)
    if spec.metric == "PER":
        return _clip(1 - score)
    if spec.metric == "MAE":
        assert spec.quantity is not None, "the task list checks this"
        low, high = RANGES[spec.quantity]
        return _clip(1 - score / (high - low))
    if spec.metric == "GPT":
        return score / HIGHEST
    if spec.metric in ("BLEU", "chrF"):
        return score / 100
    return _clip(1 - score / 100) if spec.metric == "TER" else score


def _clip(score: Any) -> Any:
    return np.clip(score, 0.0, 1.0)
