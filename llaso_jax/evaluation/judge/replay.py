"""Scores that were published with the predictions, in `gpt_result`."""

from llaso_jax.evaluation.predictions import (
    JUDGE_FOLDER,
    SUFFIX,
    Judgements,
    ModelFolder,
    Predictions,
    read_judgements,
)
from llaso_jax.evaluation.tasks import TaskFile


class ReplayJudge:
    """Reads `gpt_result/<file>_test.jsonl` beside the predictions."""

    name = "published scores (gpt_result)"

    def __call__(
        self, folder: ModelFolder, spec: TaskFile, predictions: Predictions
    ) -> Judgements | None:
        """The judgements of one file; None where none were published."""
        path = folder.path / JUDGE_FOLDER / f"{spec.file}{SUFFIX}.jsonl"
        return read_judgements(path, predictions.items) if path.is_file() else None
