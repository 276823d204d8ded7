"""Answers that must equal their reference: plain answers, intents and spoken commands."""

import re
from collections.abc import Callable, Sequence

from llaso_jax.evaluation.metrics.statistic import Statistic, mean
from llaso_jax.evaluation.metrics.text import whisper_english

_NOT_WORD = re.compile(r"[^\w]+")


def plain(text: str) -> str:
    """Lower-case words: underscores and anything that is no word character become one blank.

    Example: "Calendar_Set." -> "calendar set".
    """
    return _NOT_WORD.sub(" ", text.lower().replace("_", " ")).strip()


def exact_match(
    references: Sequence[str], answers: Sequence[str], normalize: Callable[[str], str] = plain
) -> Statistic:
    """Share of answers equal to their reference after `normalize`."""
    pairs = zip(references, answers, strict=True)
    return mean([normalize(reference) == normalize(answer) for reference, answer in pairs])


def accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Share of hypotheses equal to their reference after Whisper's English normaliser.

    Raises:
      ValueError: different numbers of texts, or none.
    """
    if not references or len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references for {len(hypotheses)} hypotheses.")
    return exact_match(references, hypotheses, whisper_english).value()
