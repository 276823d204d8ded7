"""Validation on held-out records: loss of the references, and scores of greedily generated answers."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from llaso_jax.data.batch import make_batch
from llaso_jax.data.config import DataConfig
from llaso_jax.data.packing import BatchShape, Row, first_fit
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


SCORES = ("wer", "accuracy", "token_error_rate")
"""Numbers of a Report over all tasks; None where it has no samples of the kind."""


@dataclasses.dataclass(frozen=True)
class Report:
    """One validation.

    loss: nats per supervised token; wer, accuracy: over all samples of that metric (None: no such
    samples); tasks: by task; answers: (task, reference, generated) in file order.
    token_error_rate, unaligned: of stages with objective ctc: errors over label tokens, and samples without a loss.
    """

    loss: float
    wer: float | None
    accuracy: float | None
    tasks: dict[str, TaskScore]
    answers: tuple[tuple[str, str, str], ...]
    token_error_rate: float | None = None
    unaligned: int | None = None

    def numbers(self) -> dict[str, Any]:
        """Everything but the answers, for the metrics file."""
        tasks = {task: dataclasses.asdict(score) for task, score in self.tasks.items()}
        numbers = {"loss": self.loss, "wer": self.wer, "accuracy": self.accuracy, "tasks": tasks}
        if self.token_error_rate is None:
            return numbers
        reading = {"token_error_rate": self.token_error_rate, "unaligned": self.unaligned}
        return numbers | reading

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Report":
        """Inverse of dataclasses.asdict after a trip through JSON."""
        tasks = {task: TaskScore(**score) for task, score in tree["tasks"].items()}
        answers = tuple((task, said, heard) for task, said, heard in tree["answers"])
        return cls(**{**tree, "tasks": tasks, "answers": answers})


class HeldOutSet:
    """The first `max_samples` records of `data.eval_json`: their samples, packed, and the scores of answers to them.

    whole: references are all answers of a conversation, not its last.

    Raises:
      DataError: a record that cannot be used: held-out data is never skipped over.
    """

    def __init__(
        self,
        cfg: SpeechLMConfig,
        data: DataConfig,
        loader: SampleLoader,
        *,
        max_samples: int | None,
        whole: bool = False,
    ) -> None:
        records = RecordSource(data.eval_json, data_root=data.data_root, index_dir=data.index_dir)
        count = len(records) if max_samples is None else min(max_samples, len(records))
        self.items = [_held_out(records[i], loader, whole=whole) for i in range(count)]
        self._shape = BatchShape.of(data, layout_of(cfg), pad_id=loader.pad_id)

    def batches(self, layout: Layout) -> Iterator[tuple[list[Row], dict[str, jax.Array]]]:
        """Every sample once, packed by mel bucket: rows and their arrays [B, ...] of the batch contract."""
        pending = sorted((item.sample for item in self.items), key=self._shape.bucket)
        while pending:
            bucket = self._shape.bucket(pending[0])
            same = [sample for sample in pending if self._shape.bucket(sample) == bucket]
            rows, placed = first_fit(same, self._shape)
            batch = make_batch(rows, self._shape, mel_frames=bucket)
            arrays = place_batch(batch.arrays, 1, layout)
            yield rows, {name: array[0] for name, array in arrays.items()}
            done = {id(same[i]) for i in placed}
            pending = [sample for sample in pending if id(sample) not in done]

    def report(self, hypotheses: list[str], **numbers: Any) -> Report:
        """Scores of answers, in the order of `items`, beside other `numbers` of the Report."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, item in enumerate(self.items):
            groups[item.task].append(i)
        return Report(
            wer=self._score("wer", range(len(hypotheses)), hypotheses),
            accuracy=self._score("accuracy", range(len(hypotheses)), hypotheses),
            tasks={
                task: TaskScore(
                    metric=(metric := self.items[members[0]].metric),
                    score=self._score(metric, members, hypotheses) or 0.0,
                    samples=len(members),
                    chance=(labels := self.items[members[0]].num_labels) and 1 / labels,
                )
                for task, members in sorted(groups.items())
            },
            answers=tuple(
                (item.task, item.reference, text)
                for item, text in zip(self.items, hypotheses, strict=True)
            ),
            **numbers,
        )

    def _score(self, metric: str, members: Any, hypotheses: list[str]) -> float | None:
        chosen = [i for i in members if self.items[i].metric == metric]
        if not chosen:
            return None
        score = word_error_rate if metric == "wer" else accuracy
        return score([self.items[i].reference for i in chosen], [hypotheses[i] for i in chosen])


class Validator:
    """Validates parameters of one model on a held-out set by what it generates, on CPUs in float32.

    Raises:
      DataError: see `HeldOutSet`.
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
        self._held_out = HeldOutSet(cfg, data, loader, max_samples=max_samples)
        self._cfg, self._layout = cfg, layout
        # XLA:CPU has no fast product of one position in bfloat16: 32 answers took 5 minutes in it.
        self._generate_in = dataclasses.replace(
            compute, dtype="float32" if layout.on_cpu else compute.dtype
        )
        self._tokenizer = tokenizer
        self._generation = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, pad_token_id=loader.pad_id
        )
        self._batch_rows = batch_rows
        self._loss = make_loss(cfg, compute, layout)

    def __call__(self, params: Params) -> Report:
        """Validate `params`."""
        return self._held_out.report(self._generate(params), loss=self._mean_loss(params))

    def _generate(self, params: Params) -> list[str]:
        if self._layout.on_cpu:
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        answers = generate_samples(
            self._cfg,
            params,
            (item.sample.prompt() for item in self._held_out.items),
            self._generation,
            batch_rows=self._batch_rows,
            compute=self._generate_in,
            mesh=self._layout.mesh,
            rules=self._layout.rules.whole_rows,
        )
        return [self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def _mean_loss(self, params: Params) -> float:
        total, tokens = 0.0, 0
        for _, arrays in self._held_out.batches(self._layout):
            loss, count = jax.device_get(self._loss(params, arrays))
            total, tokens = total + float(loss), tokens + int(count)
        return total / max(tokens, 1)


def _held_out(record: Any, loader: SampleLoader, *, whole: bool) -> HeldOut:
    metadata = record.metadata
    labels = metadata.get("labels")
    task = str(metadata.get("task", "ASR"))
    answers = [turn.text.strip() for turn in record.turns if turn.role == "gpt"]
    return HeldOut(
        sample=loader.load(record),
        reference=" ".join(answers) if whole else answers[-1],
        task=task,
        metric=str(metadata.get("metric", "wer")),
        num_labels=len(labels) if labels else None,
    )
