"""Records in LLaSO's format: an instruction, recordings, an answer, and how the answer is scored."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from llaso_jax.data.prompt import AUDIO_PLACEHOLDER, PURE_AUDIO_TEXT

Layout = Literal["(t,a)", "(a,t)", "(a)"]

ASR_TEMPLATES = (
    "Transcribe the audio.", "Transcribe this speech.", "Transcribe what you hear.",
    "Transcribe the recording.", "Please transcribe.", "Transcribe the words.",
    "Write the words.", "Write what you hear.", "Write down the speech.",
    "Write the spoken words.", "Please write the transcript.", "Write the transcript.",
    "Give the transcript.", "Give the spoken words.", "Give the words you hear.",
    "Repeat the words.", "Repeat what you hear.", "Repeat the speech.",
)  # fmt: skip


def record(
    name: str,
    task: str,
    path: str,
    layout: Layout,
    instruction: str,
    answer: str,
    *,
    labels: Sequence[str] = (),
    **metadata: Any,
) -> dict[str, Any]:
    """One recording and one question.

    Args:
        name: the record's id.
        path: of the recording, relative to the JSON file.
        layout: where `instruction` stands: before the recording, after it, or nowhere: (a) has LLaSO's fixed phrase.
        labels: the answers of a closed task, scored by accuracy; () for the word error rate.
        **metadata: what else `metadata` holds.
    """
    if layout == "(a)" and instruction:
        raise ValueError(f"(a) has no text of its own, and {instruction!r} was given")
    value = {
        "(t,a)": instruction + AUDIO_PLACEHOLDER,
        "(a,t)": AUDIO_PLACEHOLDER + instruction,
        "(a)": PURE_AUDIO_TEXT + AUDIO_PLACEHOLDER,
    }[layout]
    scored = {"metric": "accuracy", "labels": list(labels)} if labels else {"metric": "wer"}
    return {
        "id": name,
        "voice": [path],
        "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}],
        "metadata": {"task": task, **scored, **metadata},
    }


def asr_record(name: str, path: str, template: str, text: str, **metadata: Any) -> dict[str, Any]:
    """Speech recognition, (t,a)."""
    return record(name, "ASR", path, "(t,a)", template, text, **metadata)


def write_records(records: Iterable[dict[str, Any]], path: Path) -> Path:
    """Write an array with one record per line; returns `path`."""
    lines = (json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in records)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return path
