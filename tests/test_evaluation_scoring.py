"""`llaso evaluate score`: scores of a folder made by hand, in both protocols, with intervals and what is missing."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_folders import record, write_array, write_model

from llaso_jax.evaluate import main
from llaso_jax.evaluation.bootstrap import Bootstrap
from llaso_jax.evaluation.metrics.statistic import mean, ratio


def report(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name}-report") / name


def scored(folder: Path, *arguments: str) -> dict:
    """scores.json of a report."""
    assert main(["score", str(folder), "--output", str(report(folder, "")), *arguments]) == 0
    return json.loads(report(folder, "scores.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("predictions") / "ours")


@pytest.fixture(scope="module")
def scores(folder) -> dict:
    return scored(folder, "--bootstrap", "200")


def test_error_rates_by_hand(scores):
    asr = scores["models"]["ours"]["files"]["ASR"]
    # raw: The/the, sat./sat, A/a, barked/barks and twice missing of 7 words, 6 in the answers
    assert asr["paper"]["wer"] == pytest.approx(5 / 6)
    assert asr["paper_unswapped"]["wer"] == pytest.approx(5 / 7)
    assert asr["corrected"]["wer"] == pytest.approx(2 / 7)
    assert asr["variants"]["lower_nopunct"]["wer"] == pytest.approx(2 / 7)
    assert scores["normalizers"]["ours"]["ASR"] == "whisper-normalizer English"


def test_accuracy_abstention_and_chance_by_hand(scores):
    gender = scores["models"]["ours"]["files"]["vctk_gender_classification"]
    # upstream: "a female voice" holds the label "male" too, and "?" nothing
    assert gender["paper"] == 1 / 4
    assert gender["corrected"] == 2 / 4
    assert gender["invalid_corrected"] == gender["abstention"] == 1 / 4
    assert gender["balanced_corrected"] == pytest.approx((1 / 3 + 1) / 2)
    assert gender["chance"] == 1 / 2
    assert gender["abstention_shipped"] is None


def test_numbers_judge_and_companions_by_hand(scores):
    files = scores["models"]["ours"]["files"]
    age = files["vocalsound_age_prediction"]
    assert (age["paper"], age["paper_n"]) == (5, 1)
    assert age["corrected"] == (5 + 60) / 2
    assert (age["coverage"], age["constant_median_baseline"]) == (1 / 2, 10)
    question = files["dolly_input_1"]
    assert (question["n"], question["empty"]) == (3, 1)
    assert question["corrected"] == pytest.approx(7 / 3)
    assert question["gpt"]["hist"] == {"1": 2, "2": 0, "3": 0, "4": 0, "5": 1}
    assert files["slurp_Entity_Extraction"]["extra"]["slot_micro_f1"] == pytest.approx(2 / 4)


def test_tasks_and_overall_by_hand(scores):
    aggregates = scores["models"]["ours"]["aggregates"]["corrected"]
    asr = scores["models"]["ours"]["files"]["ASR"]["corrected"]
    expected = {
        "ASR": ((1 - asr["wer"]) + (1 - asr["cer"])) / 2,
        "AQA": 7 / 15,
        "SGC": 1 / 2,
        "AR": 1 - 32.5 / 100,
        "EE": 3 / 5,
    }
    assert aggregates["tasks"] == pytest.approx(expected)
    assert aggregates["macro_task"] == pytest.approx(np.mean(list(expected.values())))
    assert aggregates["speaker"] == pytest.approx((1 / 2 + 0.675) / 2)
    assert aggregates["paralinguistic"] == pytest.approx((1 / 2 + 0.675 + 3 / 5) / 3)
    assert aggregates["macro_15_common_tasks"] == pytest.approx(
        (expected["AQA"] + expected["SGC"] + expected["AR"]) / 3
    )
    assert aggregates["modality_AQA_gpt"]["(t,a)"] == pytest.approx(7 / 3)
    assert aggregates["modality"]["(a)"] is None


def test_every_score_has_an_interval_around_it(scores):
    ours = scores["models"]["ours"]["files"]["ASR"]["corrected"]["wer"]
    low, high = scores["intervals"]["ours"]["files"]["ASR"]["corrected.wer"]
    assert 0 <= low <= ours <= high
    tasks = scores["intervals"]["ours"]["aggregates"]["paper"]["tasks"]
    assert set(tasks) == {"ASR", "AQA", "SGC", "AR", "EE"}
    low, high = scores["intervals"]["ours"]["aggregates"]["corrected"]["macro_task"]
    assert low < scores["models"]["ours"]["aggregates"]["corrected"]["macro_task"] < high


def test_missing_files_are_listed_and_not_scored(folder, scores, capsys):
    assert len(scores["missing"]["ours"]) == 39
    assert "phoneme_recognition" in scores["missing"]["ours"]
    scored(folder, "--bootstrap", "0")
    assert "39 of 44 files are missing: 1M_GPT4_end" in capsys.readouterr().err
    with report(folder, "files.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [row["file"] for row in rows if row["score"] == "missing"]
    assert missing == scores["missing"]["ours"]


def test_one_protocol_leaves_nothing_of_the_other(folder):
    upstream = scored(folder, "--protocol", "upstream", "--bootstrap", "0")
    corrected = scored(folder, "--protocol", "corrected", "--bootstrap", "0")
    for only, other in ((upstream, "corrected"), (corrected, "paper")):
        model = only["models"]["ours"]
        assert other not in model["aggregates"]
        assert other not in only["definitions"]
        for entry in model["files"].values():
            assert not [key for key in entry if key.startswith(other) or key.endswith("_" + other)]
            assert other not in entry.get("gpt", {})


def test_without_a_judge_free_answers_have_no_score_and_keep_their_companion(folder):
    files = scored(folder, "--judge", "none", "--bootstrap", "0")["models"]["ours"]["files"]
    assert files["dolly_input_1"]["paper"] is None
    assert files["dolly_input_1"]["corrected"] is None
    assert "gpt" not in files["dolly_input_1"]
    assert files["slurp_Entity_Extraction"]["extra"]["slot_micro_f1"] == pytest.approx(1 / 2)


def test_further_tasks_come_from_a_yaml_entry(tmp_path):
    model = write_model(tmp_path / "m", {"ASR": [("a b", "a b")]})
    further = {
        "zh": [("你好, 世界", "你好世")],
        "mood": [("good", "good"), ("bad", "so-so"), ("good", "bad")],
        "story": [("a cat on a mat", "a cat on a mat")],
    }
    for name, pairs in further.items():
        records = [record(n, *pair) for n, pair in enumerate(pairs)]
        write_array(model / f"{name}_test.json", records)
    (tmp_path / "more.yaml").write_text(
        "- {name: ZH, metric: WER/CER, language: zh, files: [zh]}\n"
        "- {name: MOOD, metric: F1, labels: [good, bad, so-so], files: [mood]}\n"
        "- {name: STORY, metric: BLEU, files: [story]}\n",
        encoding="utf-8",
    )
    scores = scored(model, "--task-list", str(tmp_path / "more.yaml"), "--bootstrap", "0")
    files = scores["models"]["m"]["files"]
    assert files["zh"]["corrected"] == {"cer": 1 / 4}  # one of four characters, no words
    assert "blanks removed" in scores["normalizers"]["m"]["zh"]
    assert files["mood"]["corrected"] == pytest.approx((2 / 3 + 0) / 2)
    assert files["story"]["corrected"] == pytest.approx(100)
    aggregates = scores["models"]["m"]["aggregates"]["corrected"]
    assert aggregates["tasks"]["ZH"] == 3 / 4
    assert aggregates["macro_task"] == 1  # LLaSO-Eval's tasks only
    assert files["mood"]["abstention"] == 0
    assert scores["models"]["m"]["aggregates"]["abstention_mean"] is None
    assert scores["normalizers"]["m"]["story"] == "sacrebleu 13a"
    assert scores["task_map"]["mood"]["ended"] == "closed"


def test_further_files_are_in_no_mean_of_llaso_eval_whatever_their_task_is_called(tmp_path):
    files = {"ASR": [("a b", "a b")], "dolly_input_1": [("a", "b")] * 3}
    model = write_model(tmp_path / "m", {**files, "other": [("a b", "c d")], "asked": [("a", "a")]})
    (tmp_path / "more.yaml").write_text(
        "- {name: ASR, metric: WER/CER, category: linguistic, files: [other]}\n"
        "- {name: AQA, metric: EM, files: [asked]}\n",
        encoding="utf-8",
    )
    without = scored(model, "--bootstrap", "0")
    with_them = scored(model, "--task-list", str(tmp_path / "more.yaml"), "--bootstrap", "0")
    assert with_them["models"]["m"]["aggregates"] == without["models"]["m"]["aggregates"]
    assert with_them["models"]["m"]["files"]["other"]["corrected"]["wer"] == 1


def test_an_output_that_cannot_be_written_is_told_before_anything_is_scored(tmp_path, capsys):
    model = write_model(tmp_path / "m")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (model / "ASR_test.json").write_text("no JSON", encoding="utf-8")
    for command in (["score", str(model)], ["compare", str(model), str(model)]):
        assert main([*command, "-o", str(tmp_path / "file")]) == 1
        assert "ConfigError" in capsys.readouterr().err
    assert main(["paper", str(model), "-o", str(tmp_path)]) == 1
    assert "ConfigError" in capsys.readouterr().err


def test_means_say_of_how_many_tasks_they_are(folder, capsys):
    scored(folder, "--bootstrap", "0")
    assert "5 of 20" in capsys.readouterr().out
    page = report(folder, "report.html").read_text(encoding="utf-8")
    assert page.count("5 of 20") == 2  # both protocols
    assert "20 tasks" not in page


@pytest.mark.parametrize("flags", [["--judge-rate", "-5"], ["--judge-timeout", "nan"]])
def test_numbers_that_cannot_be_are_refused(folder, flags, capsys):
    with pytest.raises(SystemExit):
        main(["score", str(folder), "-o", "nowhere", *flags])
    assert "is no number" in capsys.readouterr().err


def test_a_bad_file_ends_with_code_1_and_names_the_record(tmp_path, capsys):
    model = write_model(tmp_path / "m")
    write_array(model / "vocalsound_age_prediction_test.json", [record(0, "old", "20")])
    assert main(["score", str(model), "-o", str(tmp_path / "out")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "UnreadableReferenceError" in told
    assert "'old' is no age in 0..100 [record 0 of" in told


# --- the bootstrap --------------------------------------------------------------------------------


def drawn(file: str, bootstrap: Bootstrap) -> np.ndarray:
    return np.concatenate([*bootstrap.weights(file, 20)])


def test_draws_depend_on_file_seed_and_items_only():
    bootstrap = Bootstrap(samples=50, seed=3)
    weights = drawn("ASR", bootstrap)
    assert weights.shape == (50, 20)
    assert (weights.sum(-1) == 20).all()
    np.testing.assert_array_equal(weights, drawn("ASR", bootstrap))
    assert (weights != drawn("PR", bootstrap)).any()
    assert (weights != drawn("ASR", Bootstrap(samples=50, seed=4))).any()


def test_draws_are_the_same_in_blocks_of_any_size(monkeypatch):
    whole = drawn("ASR", Bootstrap(samples=50))
    monkeypatch.setattr("llaso_jax.evaluation.bootstrap.BLOCK", 140)  # seven draws
    np.testing.assert_array_equal(drawn("ASR", Bootstrap(samples=50)), whole)


def test_an_interval_has_the_width_of_the_binomial():
    right = np.r_[np.ones(300), np.zeros(100)]
    bootstrap = Bootstrap(samples=4000)
    low, high = bootstrap.interval(bootstrap.draws("x", {"acc": mean(right.tolist())})["acc"])
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - error, abs=0.005)
    assert high == pytest.approx(0.75 + error, abs=0.005)


def test_statistics_of_a_file_are_drawn_together_and_undefined_draws_left_out():
    bootstrap = Bootstrap(samples=100)
    rare = ratio([5.0, 0, 0, 0], [1, 0, 0, 0])  # only where the first item is drawn
    drawn = bootstrap.draws("x", {"first": mean([1, 0, 0, 0]), "rare": rare})
    assert (np.isnan(drawn["rare"]) == (drawn["first"] == 0)).all()
    assert bootstrap.interval(drawn["rare"]) == (5, 5)
    assert bootstrap.interval(np.full(3, np.nan)) is None
    assert Bootstrap(samples=0).draws("x", {"first": mean([1])}) == {}
