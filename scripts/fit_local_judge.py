"""Fit the local judge to the scores published with predictions, and print its agreement on models left out.

python scripts/fit_local_judge.py PREDICTIONS_DIR [--output llaso_jax/evaluation/judge/local_judge.json]

PREDICTIONS_DIR holds a folder per model with gpt_result in it: the folder `results` of LLaSO's repository. Each model
is left out once, with its family, the judge fitted on the others, and its scores compared with the published ones; the
weights written are fitted on all.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from llaso_jax.evaluation.judge.features import FEATURES, features
from llaso_jax.evaluation.judge.fitting import Judged, fit, held_out_agreement
from llaso_jax.evaluation.judge.local import WEIGHTS, agreement_line
from llaso_jax.evaluation.judge.replay import ReplayJudge
from llaso_jax.evaluation.predictions import find_models, read_predictions
from llaso_jax.evaluation.tasks import load_tasks

DIGITS = 6
# Variants of one model, whose answers are much the same.
FAMILIES = {"LLaSO-Base_encoder_true": "LLaSO-Base", "Mini-Omni2": "Mini-Omni"}


def main() -> None:
    """Read, leave each model out, fit on all, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS_DIR")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    judged = read_judged(args.predictions)
    agreement = held_out_agreement(judged, FAMILIES)
    print(f"{'left out':<24}  pairs      r    rho  error  judge  local")
    for model, row in agreement.items():
        numbers = (
            row["pearson"],
            row["spearman"],
            row["mean_absolute_error"],
            row["judge"],
            row["local"],
        )
        print(f"{model:<24} {row['pairs']:6d}  " + "  ".join(f"{n:5.2f}" for n in numbers))
    print(agreement_line(agreement))
    written = {
        "features": FEATURES,
        "weights": {task: [round(w, DIGITS) for w in row] for task, row in fit(judged).items()},
        "agreement": {
            model: {key: round(value, 4) for key, value in row.items()}
            for model, row in agreement.items()
        },
    }
    args.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def read_judged(folder: Path) -> Judged:
    """All judged answers of a folder of models, from every file that has gpt_result."""
    tasks, replay = load_tasks(), ReplayJudge()
    rows = []
    for model in find_models([folder], list(tasks)):
        for file, path in model.files.items():
            predictions = read_predictions(path)
            judgements = replay(model, tasks[file], predictions)
            if judgements is None:
                continue
            for item, score in zip(predictions.items, judgements.scores, strict=True):
                if score is not None:
                    numbers = features(item.reference, item.answer)
                    rows.append((model.name, tasks[file].task, numbers, score))
    models, names, inputs, scores = zip(*rows, strict=True)
    return Judged(np.array(models), np.array(names), np.array(inputs), np.array(scores, np.float64))


if __name__ == "__main__":
    main()
