"""scores.json: scores of all models for other programs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llaso_jax.evaluation.scoring import ModelScores, Settings
from llaso_jax.evaluation.tasks import TaskFiles

SCORES_FILE = "scores.json"

DEFINITIONS = {
    "paper": {
        "WER/CER": "corpus level on raw text with reference and answer swapped, as the published script calls "
        "it; unswapped beside it",
        "PER": "letters A-Z through TIMIT's map of 61 to 39 phones, mean over utterances, swapped; unswapped "
        "beside it",
        "ACC": "equal, or the reference is a substring of the answer and no other label is",
        "MAE": "over answers that parse; pitches outside 0..127 dropped",
        "GPT": "mean of `Score: N` over lines that are JSON by themselves",
    },
    "corrected": {
        "WER/CER": "corpus level after the language's normaliser (see `normalizers`)",
        "PER": "corpus level over IPA symbols",
        "ACC": "exactly one label is named, at word boundaries and longest first, and it is the reference",
        "MAE": "unparsable or out of range counts with the largest error possible (0..100 years, MIDI 0..127)",
        "GPT": "a missing or unparsable score counts as 1; null where there is no judge",
        "F1": "mean over labels",
        "EM": "equal after the language's normaliser",
        "BLEU": "sacrebleu, 0..100",
        "chrF": "sacrebleu, 0..100",
        "TER": "sacrebleu, lower is better",
        "ROUGE-L": "rouge-score, mean F-measure",
    },
}


def scores_tree(
    models: Sequence[ModelScores], tasks: TaskFiles, settings: Settings, judge: dict[str, Any]
) -> dict[str, Any]:
    """All scores. `models` holds scores only; intervals, notes and the like stand beside it."""
    bootstrap = settings.bootstrap
    return {
        "definitions": {p: DEFINITIONS[p] for p in settings.protocols},
        "task_map": {file: spec.described() for file, spec in tasks.items()},
        "models": {
            scores.name: {
                "files": scores.entries,
                "abstention_check": scores.abstention_check,
                "n_total": scores.items,
                "aggregates": scores.aggregates,
            }
            for scores in models
        },
        "intervals": {scores.name: scores.intervals for scores in models},
        "bootstrap": {
            "samples": bootstrap.samples,
            "seed": bootstrap.seed,
            "confidence": bootstrap.confidence,
        },
        "missing": {scores.name: list(scores.missing) for scores in models},
        "notes": {scores.name: scores.notes for scores in models},
        "normalizers": {scores.name: scores.normalizers for scores in models},
        "audio_seconds": {scores.name: scores.audio_seconds for scores in models},
        "judge": judge,
    }


def write_json(path: Path, tree: Any) -> None:
    """Write beside and rename: a report that is stopped leaves no half file."""
    temporary = path.with_name(f"{path.name}.tmp")
    text = json.dumps(_finite(tree), ensure_ascii=False, indent=1, allow_nan=False)
    # What UTF-8 cannot hold, half a surrogate pair, is written as JSON escapes it.
    temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def _finite(tree: Any) -> Any:
    """JSON knows no NaN: what is not defined is null."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
