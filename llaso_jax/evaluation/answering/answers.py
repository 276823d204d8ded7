"""Answers of a model to the questions of a benchmark."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llaso_jax.data.audio import LoadedAudio, load_audio
from llaso_jax.data.prompt import Turn
from llaso_jax.data.records import Record
from llaso_jax.data.samples import Sample
from llaso_jax.errors import DataError
from llaso_jax.evaluation.answering.journal import Journal
from llaso_jax.evaluation.answering.questions import QuestionFile
from llaso_jax.evaluation.errors import IncompleteRecordError
from llaso_jax.inference.answers import generate_answers
from llaso_jax.inference.model import LLaSOModel
from llaso_jax.inference.processor import LLaSOProcessor

# Longest answers of LLaSO's own evaluation: llaso/evaluation/model_eval.py.
MAX_NEW_TOKENS = {"ASR": 256}
MAX_NEW_TOKENS_OTHERS = 1024
JOINED = frozenset({"ASR"})  # tasks whose answers to parts of a recording make the answer to it
WINDOW = 4  # batches sorted by length together, and the most that a kill loses


@dataclass(frozen=True)
class Answering:
    """How answers are made.

    Attributes:
      batch_rows: questions at a time.
      max_new_tokens: longest answer; None: 256 for ASR and 1024 for others, as published.
      temperature, seed: of sampling; temperature 0 is greedy.
      part_seconds: recordings of ASR that are longer are heard in parts; see `LLaSOProcessor.questions`.
    """

    batch_rows: int = 8
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    part_seconds: float | None = None


Change = Callable[
    [QuestionFile, int, Sequence[Turn], Sequence[LoadedAudio]],
    tuple[Sequence[Turn], Sequence[LoadedAudio]],
]
"""What is done to turns and audios of a question before it is asked."""


def answer_file(
    file: QuestionFile,
    folder: Path,
    model: LLaSOModel,
    processor: LLaSOProcessor,
    settings: Answering,
    *,
    change: Change | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Answer every question of a file that has no answer yet; returns the file of predictions.

    Args:
      folder: of the predictions; answers of a run that was stopped are found there.
      advance: called with the number of questions just answered, or found answered.

    Raises:
      DataError: audio or a record that cannot be used: a question is never skipped over.
    """
    journal = Journal(folder, file.spec.file)
    if journal.is_finished(len(file)):
        advance(len(file))
        return journal.finished
    answers = {n: answer for n, answer in journal.answered().items() if n < len(file)}
    advance(len(answers))
    todo = [number for number in range(len(file)) if number not in answers]
    asked: deque[str] = deque()
    part_seconds = settings.part_seconds if file.spec.task in JOINED else None

    def questions() -> Iterator[list[Sample]]:
        for number in todo:
            prompts, text = _prompts(file, number, processor, change, part_seconds)
            asked.append(text)
            yield prompts

    longest = settings.max_new_tokens or MAX_NEW_TOKENS.get(file.spec.task, MAX_NEW_TOKENS_OTHERS)
    generation = model.generation_config(
        max_new_tokens=longest, temperature=settings.temperature, seed=settings.seed
    )
    generated = generate_answers(
        model,
        processor,
        questions(),
        generation,
        batch_rows=settings.batch_rows,
        window=WINDOW,
    )
    for number, answer in zip(todo, generated, strict=True):
        text, fields = asked.popleft(), dataclasses.asdict(answer)
        answers[number] = {"answer": fields.pop("text"), **fields}
        if change is not None:
            answers[number]["asked"] = text
        journal.add(number, answers[number])
        advance(1)
    journal.finish([{**file[number].fields, **answers[number]} for number in range(len(file))])
    return journal.finished


def _prompts(
    file: QuestionFile,
    number: int,
    processor: LLaSOProcessor,
    change: Change | None,
    part_seconds: float | None,
) -> tuple[list[Sample], str]:
    """The prompts of one question, and the instruction in them."""
    record = file[number]
    turns: Sequence[Turn] = _question(record)
    try:
        audios: Sequence[LoadedAudio] = [
            load_audio(
                voice, max_seconds=processor.max_audio_seconds, policy=processor.audio_policy
            )
            for voice in record.voices
        ]
        if change is not None:
            turns, audios = change(file, number, turns, audios)
        prompts = processor.prompts(
            turns, audios, part_seconds=part_seconds, sample_id=record.sample_id
        )
    except DataError as error:
        raise error.located(sample_id=record.sample_id, position=record.position)  # noqa: B904
    return prompts, turns[0].text


def _question(record: Record) -> tuple[Turn, ...]:
    """The conversation up to its first answer, which is the reference."""
    if len(record.turns) < 2 or record.turns[0].role != "human":
        raise IncompleteRecordError(
            "a question and its reference are needed: conversations of human and gpt",
            sample_id=record.sample_id,
            position=record.position,
        )
    return record.turns[:1]
