"""Scores of one file: every metric of its task, in both protocols."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llaso_jax.evaluation.errors import UnreadableReferenceError
from llaso_jax.evaluation.metrics import judge_score, labels, numbers, phonemes, pronunciation
from llaso_jax.evaluation.metrics.classification import balanced_accuracy, confusions, macro_f1
from llaso_jax.evaluation.metrics.entities import slot_micro_f1
from llaso_jax.evaluation.metrics.error_rate import characters, error_rate, swapped, words
from llaso_jax.evaluation.metrics.exact_match import exact_match
from llaso_jax.evaluation.metrics.languages import UNSPACED
from llaso_jax.evaluation.metrics.overlap import bleu_tokenizer, rouge_l, sacrebleu_score
from llaso_jax.evaluation.metrics.statistic import Statistic, mean
from llaso_jax.evaluation.metrics.text import (
    Normalizer,
    lower_without_punctuation,
    normalizer_of,
    raw,
)
from llaso_jax.evaluation.predictions import Judgements, Predictions
from llaso_jax.evaluation.tasks import TaskFile
from llaso_jax.evaluation.unit_score import PROTOCOLS, Protocol


@dataclass
class FileScore:
    """Scores of one file of one model.

    Attributes:
      entry: as scores.json holds it.
      statistics: what the scores are made of, by dotted place in `entry` ("corrected.wer").
      confusion: (labels, int[labels, labels + 1]) of a closed task.
      normalizer: of the corrected protocol, where it applies.
    """

    entry: dict[str, Any]
    statistics: dict[str, Statistic] = field(default_factory=dict)
    confusion: tuple[tuple[str, ...], list[list[int]]] | None = None
    normalizer: str | None = None

    def put(self, place: str, score: Statistic) -> None:
        """Note a score at a dotted place; a score that is not defined is None there."""
        *sections, key = place.split(".")
        target = self.entry
        for section in sections:
            target = target.setdefault(section, {})
        value = score.value()
        target[key] = None if np.isnan(value) else value
        if not np.isnan(value):
            self.statistics[place] = score

    def values(self) -> dict[str, float]:
        """The scores by dotted place."""
        return {place: statistic.value() for place, statistic in self.statistics.items()}


def score_file(
    spec: TaskFile,
    predictions: Predictions,
    judgements: Judgements | None = None,
    *,
    protocols: Collection[Protocol] = PROTOCOLS,
    abstention_shipped: float | None = None,
) -> FileScore:
    """Score one file.

    Raises:
      UnreadableReferenceError: a reference that the metric cannot read.
    """
    score = FileScore(
        {
            "n": len(predictions.items),
            "metric": spec.metric,
            "format": predictions.format,
            "pred_key": predictions.pred_key,
            "empty": sum(not answer.strip() for answer in predictions.answers),
            "abstention": None,
        }
    )
    if spec.metric in _SCORERS:
        _SCORERS[spec.metric](score, spec, predictions, protocols)
    elif spec.metric != "GPT" and "corrected" in protocols:
        score.put("corrected", _further(spec, predictions))
        score.normalizer = _further_normalizer(spec)
    if judgements is not None or spec.metric == "GPT":
        _judged(score, spec, judgements, protocols)
    if spec.companion is not None:
        _COMPANIONS[spec.companion](score, predictions.references, predictions.answers)
    if spec.closed and "paper" in protocols:
        score.entry["abstention_shipped"] = abstention_shipped
    return score


Protocols = Collection[Protocol]


def _error_rates(score: FileScore, spec: TaskFile, p: Predictions, protocols: Protocols) -> None:
    corrected = normalizer_of(spec.language)
    score.normalizer = corrected.name
    variants = {
        "raw": Normalizer("raw", raw),
        "lower_nopunct": Normalizer("lower_nopunct", lower_without_punctuation),
        "whisper": corrected,
    }
    spaced = spec.language not in UNSPACED
    for variant, normalizer in variants.items():
        truth = [normalizer.apply(text) for text in p.references]
        heard = [normalizer.apply(text) for text in p.answers]
        for rate, symbols in (("wer", words), ("cer", characters)):
            if rate == "wer" and not spaced:
                continue
            straight = error_rate(truth, heard, symbols)
            score.put(f"variants.{variant}.{rate}", straight)
            score.put(f"variants.{variant}.{rate}_swapped", swapped(straight, heard, symbols))
    sections: tuple[tuple[str, str, str, Protocol], ...] = (
        ("paper", "raw", "_swapped", "paper"),
        ("paper_unswapped", "raw", "", "paper"),
        ("corrected", "whisper", "", "corrected"),
    )
    for section, variant, suffix, protocol in sections:
        for rate in ("wer", "cer")[not spaced :] if protocol in protocols else ():
            place = f"variants.{variant}.{rate}{suffix}"
            if place in score.statistics:
                score.put(f"{section}.{rate}", score.statistics[place])


def _phonemes(score: FileScore, spec: TaskFile, p: Predictions, protocols: Protocols) -> None:
    if "paper" in protocols:
        score.put("paper", phonemes.letter_error_rate(p.answers, p.references))
        score.put("paper_unswapped", phonemes.letter_error_rate(p.references, p.answers))
    if "corrected" in protocols:
        score.put("corrected", phonemes.phoneme_error_rate(p.references, p.answers))


def _accuracy(score: FileScore, spec: TaskFile, p: Predictions, protocols: Protocols) -> None:
    score.put("abstention", labels.abstention(p.references, p.answers, spec.labels))
    if "paper" in protocols:
        score.put("paper", labels.substring_accuracy(p.references, p.answers))
    if "corrected" not in protocols:
        return
    known, find, truth, one = _closed_set(score, spec, p, _right)
    score.entry["balanced_corrected"] = balanced_accuracy(truth, one)
    score.entry["chance"] = 1 / len(known)
    translated = [find(labels.with_synonyms(text, known)) for text in p.answers]
    score.put("corrected_synonyms", _right(truth, labels.exactly_one(translated)))


def _macro_f1(score: FileScore, spec: TaskFile, p: Predictions, protocols: Protocols) -> None:
    score.put("abstention", labels.abstention(p.references, p.answers, spec.labels))
    if "corrected" in protocols:
        _closed_set(score, spec, p, macro_f1)


def _closed_set(
    score: FileScore,
    spec: TaskFile,
    p: Predictions,
    metric: Callable[[Sequence[str], Sequence[str | None]], Statistic],
) -> tuple[tuple[str, ...], labels.LabelFinder, list[str], list[str | None]]:
    """Score answers from a set of labels; returns the labels, their finder, and what is right and what was found."""
    known = labels.label_set(p.references, spec.labels)
    find = labels.LabelFinder(known)
    truth = [labels.label_text(text) for text in p.references]
    one = labels.exactly_one([find(labels.label_text(text)) for text in p.answers])
    score.put("corrected", metric(truth, one))
    score.put("invalid_corrected", mean([label is None for label in one]))
    score.confusion = (known, confusions(truth, one, known))
    return known, find, truth, one


def _right(truth: Sequence[str], found: Sequence[str | None]) -> Statistic:
    return mean([label == answer for label, answer in zip(truth, found, strict=True)])


def _absolute_error(score: FileScore, spec: TaskFile, p: Predictions, protocols: Protocols) -> None:
    assert spec.quantity is not None, "the task list checks this"
    low, high = numbers.RANGES[spec.quantity]
    truth = [numbers.parse(text, spec.quantity) for text in p.references]
    for number, value in enumerate(truth):
        if value is None or not low <= value <= high:
            raise UnreadableReferenceError(
                f"the reference {p.references[number]!r:.60} is no {spec.quantity} in {low}..{high}",
                position=f"record {number} of {p.path}",
            )
    errors = numbers.absolute_errors(
        [value for value in truth if value is not None], p.answers, spec.quantity
    )
    if "paper" in protocols:
        score.put("paper", errors.parsed)
        score.entry["paper_n"] = int(errors.parsed.items[:, 1].sum())
    if "corrected" in protocols:
        score.put("corrected", errors.worst)
        score.put("coverage", errors.coverage)
        score.entry["constant_median_baseline"] = errors.constant


def _further(spec: TaskFile, p: Predictions) -> Statistic:
    match spec.metric:
        case "EM":
            normalizer = normalizer_of(spec.language)
            return exact_match(p.references, p.answers, normalizer.apply)
        case "ROUGE-L":
            return rouge_l(p.references, p.answers, spec.language)
        case "BLEU" | "chrF" | "TER":
            return sacrebleu_score(spec.metric, p.references, p.answers, spec.language)
    raise AssertionError(f"{spec.metric} has no scorer")


def _further_normalizer(spec: TaskFile) -> str | None:
    """What is done to texts before an overlap is counted."""
    if spec.metric == "BLEU":
        return f"sacrebleu {bleu_tokenizer(spec.language)}"
    if spec.metric == "ROUGE-L" and spec.language == "en":
        return "rouge-score, stemmed"
    if spec.metric in ("EM", "ROUGE-L") or (spec.metric == "TER" and spec.language in UNSPACED):
        return normalizer_of(spec.language).name
    return None


def _judged(
    score: FileScore, spec: TaskFile, judgements: Judgements | None, protocols: Protocols
) -> None:
    means = {}
    if judgements is not None:
        means = {
            "paper": judge_score.mean_where_scored(judgements.as_written),
            "corrected": judge_score.mean_missing_lowest(judgements.scores),
        }
    chosen = [protocol for protocol in PROTOCOLS if protocol in protocols]
    for protocol in chosen if spec.metric == "GPT" else ():
        score.entry[protocol] = None
        if protocol in means:
            score.put(protocol, means[protocol])
    if judgements is None:
        return
    for protocol in chosen:
        score.put(f"gpt.{protocol}", means[protocol])
    score.entry["gpt"] |= {
        "n": len(judgements.scores),
        "hist": judge_score.histogram(judgements.scores),
        "broken_lines": judgements.broken_lines,
    }


def _commands(score: FileScore, references: Sequence[str], answers: Sequence[str]) -> None:
    score.put("extra.command_accuracy", exact_match(references, answers))


def _intents(score: FileScore, references: Sequence[str], answers: Sequence[str]) -> None:
    score.put("extra.intent_exact_match", exact_match(references, answers))


def _entities(score: FileScore, references: Sequence[str], answers: Sequence[str]) -> None:
    score.put("extra.slot_micro_f1", slot_micro_f1(references, answers))


def _sentence(score: FileScore, references: Sequence[str], answers: Sequence[str]) -> None:
    agreement = pronunciation.sentence_agreement(references, answers)
    score.entry["extra"] = {"matched": agreement.usable, "n": len(answers)}
    for key in pronunciation.SENTENCE_KEYS:
        score.put(f"extra.upstream_{key}", agreement.of_usable[key])
        score.put(f"extra.all_{key}", agreement.of_all[key])


def _word(score: FileScore, references: Sequence[str], answers: Sequence[str]) -> None:
    usable = pronunciation.sentence_agreement(references, answers).usable
    score.entry["extra"] = {"upstream_matched": usable}
    score.put("extra.word_accuracy_score_exact", pronunciation.word_agreement(references, answers))


_SCORERS: dict[str, Callable[[FileScore, TaskFile, Predictions, Protocols], None]] = {
    "WER/CER": _error_rates,
    "PER": _phonemes,
    "ACC": _accuracy,
    "F1": _macro_f1,
    "MAE": _absolute_error,
}
_COMPANIONS: dict[str, Callable[[FileScore, Sequence[str], Sequence[str]], None]] = {
    "commands": _commands,
    "intents": _intents,
    "entities": _entities,
    "sentence pronunciation": _sentence,
    "word pronunciation": _word,
}
