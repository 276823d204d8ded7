"""`llaso evaluate run`: the mini corpus' eval split through a tiny model, stopped, resumed and scored."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from evaluation_folders import write_model
from test_generate_cli import checkpoint  # noqa: F401 - a fixture

from llaso_jax.evaluate import main
from llaso_jax.evaluation.answering import answers
from llaso_jax.evaluation.answering.journal import Journal

MINI = Path(str(files("llaso_jax"))) / "data" / "mini"
COMMON = ["--data", str(MINI / "eval.json"), "--max-new-tokens", "4", "--bootstrap", "20"]
TASKS = ["AC", "AQA", "ASR", "EE", "IP", "SCR", "SGC", "SSD", "SV"]


def run(checkpoint, output, *arguments: str) -> int:  # noqa: F811
    where = ["--checkpoint", str(checkpoint), "--output", str(output), "--name", "tiny"]
    return main(["run", *where, *COMMON, *arguments])


def predictions(output) -> dict[str, list]:
    folder = output / "predictions" / "tiny"
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*_test.json"))
    }


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("evaluation")
    assert run(checkpoint, output, "--limit", "3", "--batch-size", "2") == 0
    return output


def test_every_task_of_the_mini_corpus_is_answered_and_scored(whole):
    answered = predictions(whole)
    assert list(answered) == [f"eval_{task}_test" for task in TASKS]
    record = answered["eval_SCR_test"][0]
    questions = json.loads((MINI / "eval.json").read_text(encoding="utf-8"))
    asked = next(q for q in questions if q["metadata"]["task"] == "SCR")
    assert {key: record[key] for key in asked} == asked
    assert record["audio_seconds"] > 0
    assert record["audio_seconds_dropped"] == 0
    assert isinstance(record["answer"], str)
    assert not list((whole / "predictions" / "tiny" / "partial").iterdir())

    scores = json.loads((whole / "report" / "scores.json").read_text(encoding="utf-8"))
    model = scores["models"]["tiny"]
    assert {entry["n"] for entry in model["files"].values()} == {3}
    assert (
        model["files"]["eval_SCR"]["chance"] == 1 / 8
    )  # labels of the corpus, not of three records
    heard = sum(r["audio_seconds"] for records in answered.values() for r in records)
    assert scores["audio_seconds"]["tiny"] == pytest.approx(heard)
    assert set(model["aggregates"]["corrected"]["tasks"]) == set(TASKS)


def test_predictions_can_be_scored_again_by_themselves(whole, tmp_path):
    folder = whole / "predictions" / "tiny"
    arguments = ["score", str(folder), "-o", str(tmp_path), "--bootstrap", "20"]
    assert main([*arguments, "--task-list", str(folder / "tasks.yaml")]) == 0
    again = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    scores = json.loads((whole / "report" / "scores.json").read_text(encoding="utf-8"))
    assert again["models"]["tiny"]["files"] == scores["models"]["tiny"]["files"]


def test_a_killed_run_goes_on_and_the_text_is_that_of_any_batch(
    checkpoint,  # noqa: F811
    whole,
    tmp_path,
    monkeypatch,
):
    add, added = Journal.add, []

    def killed_after_four(self, number, answer):
        if len(added) == 4:
            raise KeyboardInterrupt
        added.append(number)
        add(self, number, answer)

    arguments = ["--limit", "3", "--batch-size", "1", "--tasks", "ASR", "SCR"]
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", killed_after_four)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, tmp_path, *arguments)
    folder = tmp_path / "predictions" / "tiny"
    assert [path.name for path in folder.glob("*_test.json")] == ["eval_ASR_test.json"]
    with (folder / "partial" / "eval_SCR.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"number": 1, "answ')  # a kill in the middle of a line

    asked = []
    load = answers.load_audio
    monkeypatch.setattr(
        answers, "load_audio", lambda path, **k: asked.append(path) or load(path, **k)
    )
    assert run(checkpoint, tmp_path, *arguments) == 0
    assert len(asked) == 2  # of six questions, the two without an answer
    for name in ("eval_ASR_test", "eval_SCR_test"):
        assert predictions(tmp_path)[name] == predictions(whole)[name]


def test_answers_of_other_settings_are_not_mixed(checkpoint, whole, capsys):  # noqa: F811
    assert run(checkpoint, whole, "--limit", "4") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "limit was 3 and is 4" in told


def test_questions_come_from_llaso_evals_folder_too(checkpoint, tmp_path):  # noqa: F811
    questions = json.loads((MINI / "eval.json").read_text(encoding="utf-8"))
    asr = [q for q in questions if q["metadata"]["task"] == "ASR"][:2]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ASR_test.json").write_text(json.dumps(asr), encoding="utf-8")
    where = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "data")]
    arguments = ["run", *where, "-o", str(tmp_path / "out"), "--audio-root", str(MINI)]
    other = write_model(tmp_path / "other", {"ASR": [("a b", "a b")]})
    arguments += ["--beside", str(other), "--mesh", "2x1"]
    assert main([*arguments, "--max-new-tokens", "3", "--bootstrap", "0"]) == 0
    report = json.loads((tmp_path / "out" / "report" / "scores.json").read_text(encoding="utf-8"))
    assert report["models"]["model"]["files"]["ASR"]["n"] == 2
    assert report["models"]["other"]["files"]["ASR"]["corrected"]["wer"] == 0
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["ASR_test.json"]


def test_a_missing_recording_stops_the_run_and_is_named(checkpoint, tmp_path, capsys):  # noqa: F811
    (tmp_path / "data").mkdir()
    lost = {
        "id": "q7",
        "voice": ["gone.wav"],
        "conversations": [{"from": "human", "value": "a<audio>"}, {"from": "gpt", "value": "b"}],
    }
    (tmp_path / "data" / "ASR_test.json").write_text(json.dumps([lost]), encoding="utf-8")
    where = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "data")]
    assert main(["run", *where, "-o", str(tmp_path / "out")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "AudioError" in told
    assert "gone.wav" in told
    assert "q7" in told
