"""Validation on held-out records: loss of the references, and scores of greedily generated answers."""

import dataclasses
from collections import defaultdict
from typing import Any

import jax

from llaso_jax.data.batch import make_batch
from llaso_jax.data.config import DataConfig
from llaso_jax.data.packing import BatchShape, first_fit
from llaso_jax.data.records import RecordSource
from llaso_jax.data.samples import Sample, SampleLoader
from llaso_jax.evaluation.metrics.error_rate import word_error_rate
from llaso_jax.evaluation.metrics.exact_match import accuracy
from llaso_jax.inference.batched import generate_samples
from llaso_jax.inference.prompts import layout_of
from llaso_jax.inference.sampling import GenerationConfig
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import Params
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.training.state import Layout
from llaso_jax.training.step import make_loss, place_batch


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One held-out sample and how its answer is scored (`metadata`: task, metric, labels)."""

    sample: Sample
    reference: str
    task: str
    metric: str
    num_labels: int | None


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """Score of one task: `metric` is wer (lower is better) or accuracy; chance = 1 / number of labels."""

    metric: str
    score: float
    samples: int
    chance: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """One validation.

    loss: nats per supervised token; wer, accuracy: over all samples of that metric (None: no such
    samples); tasks: by task; answers: (task, reference, generated) in file order.
    """

    loss: float
    wer: float | None
    accuracy: float | None
    tasks: dict[str, TaskScore]
    answers: tuple[tuple[str, str, str], ...]

    def numbers(self) -> dict[str, Any]:
        """Everything but the answers, for the metrics file."""
        tasks = {task: dataclasses.asdict(score) for task, score in self.tasks.items()}
        return {"loss": self.loss, "wer": self.wer, "accuracy": self.accuracy, "tasks": tasks}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Report":
        """Inverse of dataclasses.asdict after a trip through JSON."""
        tasks = {task: TaskScore(**score) for task, score in tree["tasks"].items()}
        answers = tuple((task, said, heard) for task, said, heard in tree["answers"])
        return cls(**{**tree, "tasks": tasks, "answers": answers})


class Validator:
    """Validates parameters of one model on the first `max_samples` records of `data.eval_json`.

    Raises:
      DataError: a record that cannot be used: held-out data is never skipped over.
    """

    def __init__(
        self,
        cfg: SpeechLMConfig,
        compute: ComputeConfig,
        layout: Layout,
        data: DataConfig,
        loader: SampleLoader,
        tokenizer: Any,
        *,
        eos_token_id: tuple[int, ...],
        max_samples: int | None,
        max_new_tokens: int,
        batch_rows: int,
    ) -> None:
        records = RecordSource(data.eval_json, data_root=data.data_root, index_dir=data.index_dir)
        count = len(records) if max_samples is None else min(max_samples, len(records))
        self._held_out = [_held_out(records[i], loader) for i in range(count)]
        self._cfg, self._compute, self._layout = cfg, compute, layout
        self._tokenizer = tokenizer
        self._generation = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, pad_token_id=loader.pad_id
        )
        self._batch_rows = batch_rows
        self._shape = BatchShape.of(data, layout_of(cfg), pad_id=loader.pad_id)
        self._loss = make_loss(cfg, compute, layout)

    def __call__(self, params: Params) -> Report:
        """Validate `params`."""
        hypotheses = self._generate(params)
        groups: dict[str, list[int]] = defaultdict(list)
        for i, item in enumerate(self._held_out):
            groups[item.task].append(i)
        return Report(
            loss=self._mean_loss(params),
            wer=self._score("wer", range(len(hypotheses)), hypotheses),
            accuracy=self._score("accuracy", range(len(hypotheses)), hypotheses),
            tasks={
                task: TaskScore(
                    metric=(metric := self._held_out[members[0]].metric),
                    score=self._score(metric, members, hypotheses) or 0.0,
                    samples=len(members),
                    chance=(labels := self._held_out[members[0]].num_labels) and 1 / labels,
                )
                for task, members in sorted(groups.items())
            },
            answers=tuple(
                (item.task, item.reference, text)
                for item, text in zip(self._held_out, hypotheses, strict=True)
            ),
        )

    def _score(self, metric: str, members: Any, hypotheses: list[str]) -> float | None:
        chosen = [i for i in members if self._held_out[i].metric == metric]
        if not chosen:
            return None
        score = word_error_rate if metric == "wer" else accuracy
        return score([self._held_out[i].reference for i in chosen], [hypotheses[i] for i in chosen])

    def _generate(self, params: Params) -> list[str]:
        answers = generate_samples(
            self._cfg,
            params,
            (item.sample.prompt() for item in self._held_out),
            self._generation,
            batch_rows=self._batch_rows,
            compute=self._compute,
            mesh=self._layout.mesh,
            rules=self._layout.rules.whole_rows,
        )
        return [self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def _mean_loss(self, params: Params) -> float:
        total, tokens = 0.0, 0
        pending = sorted((item.sample for item in self._held_out), key=self._shape.bucket)
        while pending:
            bucket = self._shape.bucket(pending[0])
            same = [sample for sample in pending if self._shape.bucket(sample) == bucket]
            rows, placed = first_fit(same, self._shape)
            batch = make_batch(rows, self._shape, mel_frames=bucket)
            arrays = place_batch(batch.arrays, 1, self._layout)
            loss, count = jax.device_get(
                self._loss(params, {name: array[0] for name, array in arrays.items()})
            )
            total, tokens = total + float(loss), tokens + int(count)
            done = {id(same[i]) for i in placed}
            pending = [sample for sample in pending if id(sample) not in done]
        return total / max(tokens, 1)


def _held_out(record: Any, loader: SampleLoader) -> HeldOut:
    metadata = record.metadata
    labels = metadata.get("labels")
    task = str(metadata.get("task", "ASR"))
    return HeldOut(
        sample=loader.load(record),
        reference=record.turns[-1].text.strip(),
        task=task,
        metric=str(metadata.get("metric", "wer")),
        num_labels=len(labels) if labels else None,
    )
