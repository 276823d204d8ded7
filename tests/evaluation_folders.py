"""Folders of predictions made by hand, in the layouts LLaSO released them in."""

import json
from pathlib import Path
from typing import Any

Pairs = list[tuple[str, str]]
"""(reference, answer) of each item."""

ASR: Pairs = [("The cat sat.", "the cat sat"), ("A dog barked twice", "a dog barks")]
GENDER: Pairs = [("male", "Male."), ("female", "a female voice"), ("male", "female"), ("male", "?")]
AGE: Pairs = [("20", "25"), ("40", "no idea")]
QA: Pairs = [("Paris", "It is Paris."), ("Two", "Three"), ("Rome", "")]
ENTITIES: Pairs = [("wake [time : five]", "[time : five]"), ("[a : b]", "[a : c]")]
SCORES = {"dolly_input_1": [5, 1, 1], "slurp_Entity_Extraction": [4, 2]}
FILES: dict[str, Pairs] = {
    "ASR": ASR,
    "vctk_gender_classification": GENDER,
    "vocalsound_age_prediction": AGE,
    "dolly_input_1": QA,
    "slurp_Entity_Extraction": ENTITIES,
}


def record(number: int, reference: str, answer: str, key: str = "answer") -> dict[str, Any]:
    """One released record."""
    return {
        "voice": [f"corpus\\{number}.wav"],
        "conversations": [
            {"from": "human", "value": f"Question {number}?<audio>"},
            {"from": "gpt", "value": reference},
        ],
        key: answer,
    }


def write_array(path: Path, values: list[Any]) -> None:
    """As most models were released."""
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")


def write_lines(path: Path, values: list[Any]) -> None:
    """As some models, and all judges, were released."""
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def judgement(index: int, evaluation: str, pair: tuple[str, str] | None = None) -> dict[str, Any]:
    """One line of gpt_result; pair: reference and answer that were judged."""
    judged = {} if pair is None else {"reference": pair[0], "predicted": pair[1]}
    return {"file": "x_test.json", **judged, "index": index, "evaluation": evaluation}


def write_model(
    folder: Path, files: dict[str, Pairs] | None = None, *, key: str = "answer", lines: bool = False
) -> Path:
    """A model's folder with every kind of file; returns it."""
    (folder / "gpt_result").mkdir(parents=True)
    for name, pairs in (FILES if files is None else files).items():
        records = [record(n, *pair, key=key) for n, pair in enumerate(pairs)]
        if lines:
            write_lines(folder / f"{name}_test.jsonl", records)
        else:
            write_array(folder / f"{name}_test.json", records)
        if name in SCORES:
            told = [
                judgement(i, f"Score: {s}  \nExplanation: so", pair)
                for i, (s, pair) in enumerate(zip(SCORES[name], pairs, strict=True))
            ]
            write_lines(folder / "gpt_result" / f"{name}_test.jsonl", told)
    return folder
