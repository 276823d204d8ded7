"""`llaso evaluate compare` and `paper`: paired differences, refused pairs, and the paper's numbers."""

import json

import numpy as np
import pytest
from evaluation_folders import judgement, record, write_array, write_lines, write_model

from llaso_jax.evaluate import main
from llaso_jax.evaluation.bootstrap import Bootstrap
from llaso_jax.evaluation.comparison import _difference
from llaso_jax.evaluation.paper import check_paper, judge_value
from llaso_jax.evaluation.scoring import ModelScores
from llaso_jax.evaluation.tasks import load_tasks

FILE = "vctk_gender_classification"
TRUTH = ["male", "female"] * 20


def answers(wrong: set[int]) -> list[tuple[str, str]]:
    other = {"male": "female", "female": "male"}
    return [(t, other[t] if i in wrong else t) for i, t in enumerate(TRUTH)]


def compared(a, b, output, *arguments: str) -> dict:
    assert main(["compare", str(a), str(b), "--output", str(output), *arguments]) == 0
    return json.loads((output / "comparison.json").read_text(encoding="utf-8"))


def test_a_difference_has_the_width_of_paired_items_and_not_of_two_samples(tmp_path):
    a = write_model(tmp_path / "a", {FILE: answers(set(range(12)))})
    b = write_model(tmp_path / "b", {FILE: answers(set(range(8)))})
    result = compared(a, b, tmp_path / "out", "--bootstrap", "4000")
    file = result["files"][FILE]
    difference = file["difference"]
    assert (difference["a"], difference["b"]) == (28 / 40, 32 / 40)
    # The items differ in 4 of 40 only: the standard error of their difference, not of two rates.
    error = np.sqrt(0.1 * 0.9 / 40)
    assert difference["low"] == pytest.approx(0.1 - 1.96 * error, abs=0.03)
    assert difference["high"] == pytest.approx(0.1 + 1.96 * error, abs=0.03)
    assert (file["wins"], file["losses"], file["ties"]) == (4, 0, 36)
    assert difference["better"] == "b"
    assert [pair["number"] for pair in file["examples"]] == [8, 9, 10]
    shown = file["examples"][0]
    assert (shown["reference"], shown["a"], shown["b"]) == ("male", "female", "male")


def test_lower_error_rates_are_better_and_equal_models_are_undecided(tmp_path):
    said = [("a b c d", "a b c d")] * 10
    records = [record(n, *pair) for n, pair in enumerate(said)]
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, answer in ((a, "a b x d"), (b, "a b c d")):
        folder.mkdir()
        write_array(folder / "ASR_test.json", [{**r, "answer": answer} for r in records])
    difference = compared(a, b, tmp_path / "ab")["files"]["ASR"]["difference"]
    assert (difference["a"], difference["b"], difference["better"]) == (1 / 4, 0, "b")
    assert difference["p_value"] == pytest.approx(2 / 1001)
    same = compared(a, a, tmp_path / "aa")["files"]["ASR"]["difference"]
    assert (same["low"], same["high"], same["better"], same["p_value"]) == (0, 0, "", 1)


def test_items_in_another_order_are_put_together_with_their_judgements(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    order = [2, 0, 1]
    for folder, numbers in ((a, [0, 1, 2]), (b, order)):
        (folder / "gpt_result").mkdir(parents=True)
        write_array(folder / "dolly_input_1_test.json", [record(n, f"r{n}", "x") for n in numbers])
        scores = [judgement(i, f"Score: {n + 1}") for i, n in enumerate(numbers)]
        write_lines(folder / "gpt_result" / "dolly_input_1_test.jsonl", scores)
    file = compared(a, b, tmp_path / "out")["files"]["dolly_input_1"]
    assert (file["wins"], file["losses"], file["ties"]) == (0, 0, 3)


def test_another_instruction_is_counted_and_another_reference_refused(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    records = [record(n, "male" if n else "female", "male") for n in range(5)]
    for folder in (a, b):
        folder.mkdir()
        write_array(folder / f"{FILE}_test.json", records)
    reworded = json.loads(json.dumps(records))
    reworded[1]["conversations"][0]["value"] = "In other words?<audio>"
    write_array(b / f"{FILE}_test.json", reworded)
    assert compared(a, b, tmp_path / "out")["files"][FILE]["reworded"] == 1

    reworded[4]["conversations"][1]["value"] = "female"
    write_array(b / f"{FILE}_test.json", reworded)
    assert main(["compare", str(a), str(b)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "DifferentItemsError" in told
    assert "1 items only a has (record 4: corpus/4.wav 'male')" in told
    assert "1 items only b has (record 4: corpus/4.wav 'female')" in told


def test_files_of_one_model_only_are_refused_until_tasks_are_chosen(tmp_path, capsys):
    a = write_model(tmp_path / "a", {FILE: answers(set()), "ASR": [("x", "x")]})
    b = write_model(tmp_path / "b", {FILE: answers(set())})
    assert main(["compare", str(a), str(b)]) == 1
    assert "only a has ASR" in capsys.readouterr().err
    assert main(["compare", str(a), str(b), "--tasks", "SGC"]) == 0
    assert main(["compare", str(a), str(tmp_path), "--tasks", "SGC"]) == 1
    assert "Name one model's folder each" in capsys.readouterr().err


def test_a_file_without_a_score_of_both_is_in_no_mean_and_named(tmp_path, capsys):
    a, b = (write_model(tmp_path / name) for name in "ab")
    (b / "gpt_result" / "dolly_input_1_test.jsonl").unlink()
    result = compared(a, b, tmp_path / "out", "--bootstrap", "50")
    assert list(result["left_out"]) == ["dolly_input_1"]
    assert result["left_out"]["dolly_input_1"] == "no judge's score of b"
    assert "dolly_input_1" not in result["files"]
    assert "AQA" not in [task["name"] for task in result["tasks"]]
    for difference in (*result["tasks"], *result["overall"]):
        assert difference["a"] == difference["b"]
        assert difference["low"] == difference["high"] == 0
    assert "no judge's score of b" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "dolly_input_1: no judge&#x27;s score of b" in page


def test_what_was_repaired_is_told_by_compare_and_paper(tmp_path, capsys):
    a, b = (write_model(tmp_path / name) for name in "ab")
    write_lines(b / "gpt_result" / "dolly_input_1_test.jsonl", [judgement(0, "Score: 5")])
    told = "b: dolly_input_1_test.jsonl: 2 of 3 items are not judged"
    result = compared(a, b, tmp_path / "out")
    assert told in result["notes"]
    assert told in " ".join(capsys.readouterr().err.split())
    assert told in (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    output = tmp_path / "missing" / "paper.json"
    assert main(["paper", str(tmp_path), "-o", str(output)]) == 0
    assert told in json.loads(output.read_text(encoding="utf-8"))["notes"]
    assert told in " ".join(capsys.readouterr().err.split())


def test_models_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    a = write_model(tmp_path / "run1" / "same" / "m", {FILE: answers({0})})
    b = write_model(tmp_path / "run2" / "same" / "m", {FILE: answers(set())})
    result = compared(a, b, tmp_path / "out")
    assert (result["a"], result["b"]) == ("run1/same/m", "run2/same/m")


def test_draws_without_a_score_are_on_neither_side():
    drawn = [np.zeros(4), np.array([1.0, 1.0, np.nan, np.nan])]
    difference = _difference("x", "", (0.0, 1.0), drawn, Bootstrap(samples=4))
    assert difference.p_value == pytest.approx(2 / 3)  # of two draws and the sample itself


# --- the paper ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "quoted", "verdict"),
    [
        (0.0847, "0.08", "match"),
        (2.575, "2.58", "match"),  # a tie, although its binary value is below it
        (0.0364, "0.03", "rounding"),
        (0.021, "0.03", "rounding"),
        (0.0499, "0.03", "mismatch"),
        (0.0, "0.00", "match"),
        (10605.0, "15044", "mismatch"),
    ],
)
def test_values_are_held_to_the_printed_precision(ours, quoted, verdict):
    assert judge_value(ours, quoted)[0] == verdict


def test_every_quoted_value_has_a_verdict_and_the_overall_one_is_never_a_match():
    scores = ModelScores("LLaSO-Base")
    scores.entries = {"ASR": {"n": 1, "paper": {"wer": 0.0846, "cer": 0.0364}}}
    means = {"macro_task": 0.72, "macro_cat3": 0.72, "macro_cat4": None}
    scores.aggregates = {"paper": means, "abstention_mean": 0.0}
    checks = {(c.quote, c.model): c for c in check_paper([scores], load_tasks())}
    overall = checks["overall (normalized)", "LLaSO-Base"]
    assert (overall.verdict, overall.ours) == ("not reproducible", 0.72)
    assert "0.720, 0.720, -" in overall.reason
    assert checks["overall (normalized)", "Kimi-Audio"].verdict == "no predictions"
    assert checks["ASR word error rate", "LLaSO-Base"].verdict == "match"
    cut = checks["ASR character error rate", "LLaSO-Base"]
    assert (cut.verdict, cut.reason) == ("rounding", "cut off after two decimals, not rounded")
    assert checks["PR phoneme error rate", "LLaSO-Base"].verdict == "no predictions"
    assert checks["samples", None].verdict == "mismatch"
    assert checks["tasks", None].verdict == "match"


def test_a_reason_is_told_of_its_verdict_only():
    scores = ModelScores("LLaSO-Base")
    scores.entries = {"ASR": {"n": 1, "paper": {"cer": 0.9}}}
    scores.aggregates = {"paper": dict.fromkeys(("macro_task", "macro_cat3", "macro_cat4"))}
    checks = {(c.quote, c.model): c for c in check_paper([scores], load_tasks())}
    other = checks["ASR character error rate", "LLaSO-Base"]
    assert (other.verdict, other.reason) == (
        "mismatch",
        "the published predictions do not give it",
    )
