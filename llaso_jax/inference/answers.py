"""Answers to questions about recordings, each recording whole or in parts."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llaso_jax.data.samples import Sample
from llaso_jax.inference.batched import WINDOW, generate_samples
from llaso_jax.inference.model import LLaSOModel
from llaso_jax.inference.processor import LLaSOProcessor
from llaso_jax.inference.sampling import GenerationConfig


@dataclass(frozen=True)
class Answer:
    """What a model said to one question.

    Attributes:
      text: the answer; of a recording in parts, those to the parts joined by blanks.
      audio_seconds, audio_seconds_dropped: heard, and past the longest recording taken.
      new_tokens: generated, of all parts, ends included.
      ended: the model ended the answer (every part's) itself.
    """

    text: str
    audio_seconds: float
    audio_seconds_dropped: float
    new_tokens: int
    ended: bool


def generate_answers(
    model: LLaSOModel,
    processor: LLaSOProcessor,
    questions: Iterable[Sequence[Sample]],
    generation: GenerationConfig,
    *,
    batch_rows: int,
    window: int = WINDOW,
) -> Iterator[Answer]:
    """The answer to every question, in order.

    Args:
      questions: each the prompts it is asked in: one, or one for every part of its recording. Read as they are
        needed.
      batch_rows, window: see `generate_samples`.
    """
    asked: deque[Sequence[Sample]] = deque()

    def prompts() -> Iterator[Sample]:
        for parts in questions:
            asked.append(parts)
            yield from parts

    said: list[list[int]] = []
    generated = generate_samples(
        model.config,
        model.params,
        prompts(),
        generation,
        batch_rows=batch_rows,
        window=window,
        compute=model.compute,
        mesh=model.mesh,
    )
    for ids in generated:
        said.append(ids)
        if len(said) == len(asked[0]):
            yield _answer(asked.popleft(), said, processor, generation.eos_token_id)
            said = []


def _answer(
    parts: Sequence[Sample],
    said: list[list[int]],
    processor: LLaSOProcessor,
    eos_token_id: tuple[int, ...],
) -> Answer:
    texts = (processor.decode(ids).strip() for ids in said)
    return Answer(
        text=" ".join(filter(None, texts)),
        audio_seconds=round(sum(part.audio_seconds for part in parts), 3),
        audio_seconds_dropped=round(sum(part.seconds_dropped for part in parts), 3),
        new_tokens=sum(map(len, said)),
        ended=all(ids and ids[-1] in eos_token_id for ids in said),
    )
