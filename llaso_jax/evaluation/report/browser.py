"""Answers for the page's error browser: texts with what differs marked, and where the audio is."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jiwer

from llaso_jax.evaluation.examples import Example
from llaso_jax.evaluation.scoring import ModelScores
from llaso_jax.evaluation.tasks import TaskFiles

LONGEST = 600  # characters of a text that are shown
DIFFERENCE = frozenset({"WER/CER", "PER", "BLEU", "TER", "chrF", "ROUGE-L"})


def browser_data(
    scored: Sequence[ModelScores], tasks: TaskFiles, audio_root: Path | None, page: Path
) -> dict[str, Any]:
    """Model -> file -> items, as the page's script reads them.

    Args:
      audio_root: where audio paths start; None: no players.
      page: folder of the page: players name audio relative to it.
    """
    return {
        model.name: {
            file: [_shown(one, tasks[file].metric, audio_root, page) for one in examples]
            for file, examples in model.examples.items()
        }
        for model in scored
    }


def _shown(one: Example, metric: str, audio_root: Path | None, page: Path) -> dict[str, Any]:
    reference, answer = _cut(one.reference), _cut(one.answer)
    shown: dict[str, Any] = {
        "n": one.number,
        "asked": _cut(one.instruction),
        "reference": reference,
        "answer": answer,
        "score": None if one.score is None else round(one.score, 3),
        "judge": _cut(one.explanation),
        "voices": list(one.voices),
        "audio": _players(one.voices, audio_root, page),
    }
    if metric in DIFFERENCE and reference.split() and answer.split():
        shown["diff"] = word_difference(reference, answer)
    return shown


def word_difference(reference: str, answer: str) -> list[tuple[str, str]]:
    """(kind, words) from left to right; kinds: equal, delete (of the reference), insert (of the answer)."""
    aligned = jiwer.process_words(reference, answer)
    truth, said = aligned.references[0], aligned.hypotheses[0]
    parts: list[tuple[str, str]] = []
    for chunk in aligned.alignments[0]:
        wanted = " ".join(truth[chunk.ref_start_idx : chunk.ref_end_idx])
        given = " ".join(said[chunk.hyp_start_idx : chunk.hyp_end_idx])
        if chunk.type == "equal":
            parts.append(("equal", wanted))
            continue
        parts += [(kind, text) for kind, text in (("delete", wanted), ("insert", given)) if text]
    return parts


def _players(voices: Sequence[str], audio_root: Path | None, page: Path) -> list[str]:
    if audio_root is None:
        return []
    # Not resolve(): a corpus may be links into another folder.
    root = Path(os.path.normpath(audio_root.absolute()))
    paths = [Path(os.path.normpath(root / voice)) for voice in voices]
    there = [path for path in paths if path.is_relative_to(root) and path.is_file()]
    return [quote(os.path.relpath(path.resolve(), page.resolve())) for path in there]


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text)} characters)"
