"""What a reader should know before trusting a number: where protocols disagree, and why."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llaso_jax.evaluation.scoring import ModelScores
from llaso_jax.evaluation.tasks import TaskFile, TaskFiles
from llaso_jax.evaluation.unit_score import PROTOCOLS

DISAGREEMENT = 0.02  # on 0..1, between protocols
SYNONYMS = 0.05  # accuracy gained if synonyms count


class Note(NamedTuple):
    """One remark; model "" for one about several."""

    model: str
    file: str
    text: str


def notes_of(scored: Sequence[ModelScores], tasks: TaskFiles) -> list[Note]:
    """Remarks on every file of every model, and on ranks that depend on the protocol."""
    found = [
        Note(model.name, file, text)
        for model in scored
        for file in model.entries
        for text in _file_notes(model, tasks[file])
    ]
    return [*_rank_flips(scored, tasks), *found]


def _file_notes(model: ModelScores, spec: TaskFile) -> Iterator[str]:
    entry = model.entries[spec.file]
    upstream, corrected = (model.units.get(p, {}).get(spec.file) for p in PROTOCOLS)
    if upstream is not None and corrected is not None and abs(upstream - corrected) >= DISAGREEMENT:
        yield f"{_why(spec, entry)} On 0 to 1: upstream {upstream:.3f}, corrected {corrected:.3f}."
    if spec.metric == "ACC" and "corrected" in entry:
        yield from _accuracy_notes(model, spec, entry)
    if spec.metric == "MAE" and "corrected" in entry:
        constant = entry["constant_median_baseline"]
        if entry["corrected"] > constant:
            yield (
                f"Mean absolute error {entry['corrected']:.1f}: worse than always answering the median "
                f"({constant:.1f})."
            )
    if spec.metric == "GPT" and entry.get("corrected", entry.get("paper")) is None:
        yield "No judge has scored these answers: the file is left out of all means."


def _why(spec: TaskFile, entry: dict[str, Any]) -> str:
    if spec.metric == "WER/CER":
        return "Upstream compares raw text: case, punctuation, spelling and phrases around a transcript count."
    if spec.metric == "PER":
        return (
            "Upstream compares Latin letters only; IPA letters such as ʃ and ə are lost, marks too."
        )
    if spec.metric == "MAE":
        dropped = entry["n"] - entry["paper_n"]
        return (
            f"Upstream drops {dropped} of {entry['n']} answers without a usable number; here each counts "
            "with the largest error possible."
        )
    if spec.metric == "GPT":
        return "Items without a readable judge's score are dropped upstream and count as 1 here."
    return (
        "Upstream looks for labels anywhere in the answer, even inside other words; here exactly one whole "
        "label must be named."
    )


def _accuracy_notes(model: ModelScores, spec: TaskFile, entry: dict[str, Any]) -> Iterator[str]:
    gained = entry["corrected_synonyms"] - entry["corrected"]
    if gained >= SYNONYMS:
        yield (
            f"Accuracy {entry['corrected']:.2f}, and {entry['corrected_synonyms']:.2f} if synonyms count: "
            f"most of its {entry['abstention']:.0%} abstentions are the label in other words."
            if gained > entry["abstention"] / 2
            else f"Accuracy {entry['corrected']:.2f}, and {entry['corrected_synonyms']:.2f} if synonyms count."
        )
    bounds = model.intervals.get("files", {}).get(spec.file, {}).get("corrected")
    if bounds and bounds[1] < entry["chance"]:
        yield f"Accuracy {entry['corrected']:.2f}: below chance ({entry['chance']:.2f})."
    elif bounds and bounds[0] <= entry["chance"] <= bounds[1]:
        yield f"Accuracy {entry['corrected']:.2f} cannot be told from chance ({entry['chance']:.2f})."


def _rank_flips(scored: Sequence[ModelScores], tasks: TaskFiles) -> Iterator[Note]:
    """Pairs of models whose order on a file depends on the protocol by more than a little."""
    for file, spec in tasks.items():
        for number, a in enumerate(scored):
            for b in scored[number + 1 :]:
                gaps = [
                    model_units[file] - other[file]
                    for protocol in PROTOCOLS
                    if file in (model_units := a.units.get(protocol, {}))
                    and file in (other := b.units.get(protocol, {}))
                ]
                if len(gaps) == 2 and gaps[0] * gaps[1] < 0 and max(map(abs, gaps)) >= DISAGREEMENT:
                    first, then = (a, b) if gaps[0] > 0 else (b, a)
                    yield Note(
                        "",
                        spec.file,
                        f"{first.name} leads {then.name} in the upstream protocol by {abs(gaps[0]):.3f} and "
                        f"is behind by {abs(gaps[1]):.3f} in the corrected one.",
                    )
