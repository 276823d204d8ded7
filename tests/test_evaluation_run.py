"""`llaso evaluate run`: the mini corpus' eval split through a tiny model, stopped, resumed and scored."""

import json
import os
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from evaluation_folders import write_model
from test_generate_cli import checkpoint  # noqa: F401 - a fixture

from llaso_jax.evaluate import main
from llaso_jax.evaluation.answering import answers
from llaso_jax.evaluation.answering.journal import Journal
from llaso_jax.evaluation.answering.questions import load_questions, write_task_list
from llaso_jax.evaluation.errors import (
    IncompleteRecordError,
    MalformedFileError,
    NoPredictionsError,
    TaskListError,
)
from llaso_jax.evaluation.tasks import read_task_list

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


def test_predictions_can_be_scored_again_by_themselves(whole, tmp_path, capsys):
    folder = whole / "predictions" / "tiny"
    arguments = ["score", str(folder), "-o", str(tmp_path), "--bootstrap", "20"]
    assert main([*arguments, "--task-list", str(folder / "tasks.yaml")]) == 0
    _, told = capsys.readouterr().out.split("other tasks")  # that LLaSO-Eval has not
    assert [told.count(f" {task} ") for task in TASKS] == [2] * len(TASKS)  # in both protocols
    again = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    scores = json.loads((whole / "report" / "scores.json").read_text(encoding="utf-8"))
    again, scores = again["models"]["tiny"], scores["models"]["tiny"]
    assert again["files"] == scores["files"]
    assert again["aggregates"] == scores["aggregates"]
    assert scores["aggregates"]["corrected"]["macro_task"] is None  # no file of LLaSO-Eval


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
    assert len(report["missing"]["model"]) == 43  # what the data lacks is missing, not forgotten
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


@pytest.fixture
def small(tmp_path) -> Path:
    """Two questions of the mini corpus' ASR, in LLaSO-Eval's layout."""
    questions = json.loads((MINI / "eval.json").read_text(encoding="utf-8"))
    asr = [q for q in questions if q["metadata"]["task"] == "ASR"][:2]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ASR_test.json").write_text(json.dumps(asr), encoding="utf-8")
    return tmp_path


def ask(checkpoint, folder: Path, *arguments: str) -> int:  # noqa: F811
    where = [
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(folder / "data"),
        "-o",
        str(folder / "out"),
    ]
    where += ["--audio-root", str(MINI), "--name", "tiny", "--max-new-tokens", "2"]
    return main(["run", *where, "--bootstrap", "0", *arguments])


def test_a_mistyped_checkpoint_leaves_nothing_that_stops_the_corrected_command(
    checkpoint,  # noqa: F811
    small,
    capsys,
):
    assert ask(small / "mistyped", small) == 1
    assert "CheckpointError" in capsys.readouterr().err
    assert ask(checkpoint, small) == 0
    capsys.readouterr()
    assert ask(checkpoint, small) == 0


def test_a_mesh_that_is_no_mesh_is_told_in_words(checkpoint, small, capsys):  # noqa: F811
    assert ask(checkpoint, small, "--mesh", "3y") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "ShardingError" in told
    assert "'3y' is not understood" in told


def test_answers_of_another_checkpoint_or_other_questions_at_the_same_path_are_not_reused(
    checkpoint,  # noqa: F811
    small,
    capsys,
):
    copy = small / "model"
    shutil.copytree(checkpoint, copy)
    assert ask(copy, small) == 0
    config = next(copy.rglob("config.json"))
    status = config.stat()
    os.utime(config, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert ask(copy, small) == 1
    assert "checkpoint_files was" in " ".join(capsys.readouterr().err.split())
    os.utime(config, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ask(copy, small) == 0

    file = small / "data" / "ASR_test.json"
    questions = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(questions[::-1]), encoding="utf-8")
    capsys.readouterr()
    assert ask(copy, small) == 1
    assert "ASR_test.json was" in " ".join(capsys.readouterr().err.split())


def test_a_finished_file_with_another_number_of_answers_is_refused(checkpoint, small, capsys):  # noqa: F811
    assert ask(checkpoint, small, "--limit", "1") == 0
    page = (small / "out" / "report" / "report.html").read_text(encoding="utf-8")
    assert "the first 1 of each file" in page
    scores = json.loads((small / "out" / "report" / "scores.json").read_text(encoding="utf-8"))
    assert scores["limit"] == 1
    path = small / "out" / "predictions" / "tiny" / "ASR_test.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) * 2), encoding="utf-8")
    assert ask(checkpoint, small, "--limit", "1") == 1
    assert "holds 2 answers to 1 questions" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_journal_is_named(tmp_path):
    journal = Journal(tmp_path, "ASR")
    journal.add(0, {"answer": "half \ud83d"})
    assert journal.answered() == {0: {"answer": "half \ud83d"}}
    with (tmp_path / "partial" / "ASR.jsonl").open("a", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(MalformedFileError, match=r"no answer that was kept.*line 2 of"):
        journal.answered()


def test_mistakes_are_told_before_a_model_is_loaded(small, capsys):
    for flags, told in (
        (["--judge", "openai"], "needs --model"),
        (["--beside", str(small / "nowhere")], "is no folder"),
        (["--beside", str(write_model(small / "tiny"))], "called tiny too"),
        (["--trained-on", str(small / "nowhere")], "does not say what models were trained on"),
        (["--name", "../x"], "Give another --name"),
        (["--noise-files", str(small / "nowhere")], "is not there"),
        (["--noise-files", str(small / "data")], "holds no recording"),
    ):
        assert ask(small / "no-model", small, *flags) == 1
        assert told in " ".join(capsys.readouterr().err.split())


def test_a_declared_model_may_be_trained_on_tasks_that_are_not_scored(tmp_path, capsys):
    model = write_model(tmp_path / "m")
    trained = tmp_path / "trained.yaml"
    trained.write_text("m: {tasks: [ASR, SGC]}\nother: {tasks: [PR]}\n", encoding="utf-8")
    arguments = ["score", str(model), "-o", str(tmp_path / "out"), "--bootstrap", "0"]
    assert main([*arguments, "--trained-on", str(trained), "--tasks", "ASR"]) == 0
    assert "models that are not scored: other" in " ".join(capsys.readouterr().err.split())


# --- one file whose records name their task -------------------------------------------------------


def question(task, metric="accuracy", **metadata) -> dict:
    turns = [{"from": "human", "value": "a<audio>"}, {"from": "gpt", "value": "b"}]
    metadata = {"task": task, "metric": metric, **metadata}
    return {"voice": ["a.wav"], "conversations": turns, "metadata": metadata}


@pytest.mark.parametrize(
    ("records", "error", "told"),
    [
        ([], NoPredictionsError, "holds no question"),
        ([question(["ASR"])], IncompleteRecordError, "metadata.task must name a task"),
        ([question("../up")], IncompleteRecordError, "is no name of a file"),
        ([question("A", labels=5)], IncompleteRecordError, "metadata.labels must be"),
        ([question("A", "bleu")], IncompleteRecordError, "metadata.metric must be wer or accuracy"),
        (
            [question("A"), question("A", "wer")],
            IncompleteRecordError,
            "is 'wer', and was 'accuracy'",
        ),
    ],
)
def test_a_mistaken_question_is_told_in_words(tmp_path, records, error, told):
    (tmp_path / "q.json").write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(error, match=told):
        load_questions(tmp_path / "q.json", index_dir=tmp_path / "index")


def test_tasks_of_one_file_can_be_chosen_and_scored_as_a_task_list_says(tmp_path):
    records = [question("A", labels=None), question("ST", "bleu")]
    (tmp_path / "q.json").write_text(json.dumps(records), encoding="utf-8")
    more = tmp_path / "more.yaml"
    more.write_text("- {name: ST, metric: BLEU, language: de, files: [q_ST]}", encoding="utf-8")
    read = {"index_dir": tmp_path / "index", "further": [more]}
    files = load_questions(tmp_path / "q.json", **read)
    assert [(f.spec.file, f.spec.metric) for f in files] == [("q_A", "ACC"), ("q_ST", "BLEU")]
    with pytest.raises(TaskListError, match="no task or file 'SS'"):
        load_questions(tmp_path / "q.json", only=["SS"], **read)

    write_task_list(tmp_path, files[1:])
    write_task_list(tmp_path, files[:1])  # of another run, with other --tasks
    assert sorted(s.file for s in read_task_list(tmp_path / "tasks.yaml")) == ["q_A", "q_ST"]
    assert set(read_task_list(tmp_path / "tasks.yaml")) == {file.spec for file in files}
