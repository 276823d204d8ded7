"""Predictions are read in every released layout; what cannot be read is named, and nothing is dropped."""

import json

import pytest
import yaml
from evaluation_folders import ASR, FILES, judgement, record, write_array, write_lines, write_model

from llaso_jax.evaluation.errors import (
    DuplicateRecordError,
    IncompleteRecordError,
    MalformedFileError,
    NoPredictionsError,
    TaskListError,
)
from llaso_jax.evaluation.predictions import (
    Item,
    find_models,
    read_abstentions,
    read_judgements,
    read_predictions,
)
from llaso_jax.evaluation.tasks import load_tasks, read_task_list


@pytest.mark.parametrize("key", ["answer", "result", "prediction"])
@pytest.mark.parametrize("lines", [False, True])
def test_every_layout_gives_the_same_items(tmp_path, key, lines):
    model = write_model(tmp_path / "m", key=key, lines=lines)
    (path,) = model.glob("ASR_test.*")
    read = read_predictions(path)
    assert (read.format, read.pred_key) == ("jsonl" if lines else "json", key)
    assert list(zip(read.references, read.answers, strict=True)) == ASR
    assert read.items[1].question == (("corpus/1.wav",), ASR[1][0], "Question 1?<audio>")


def test_a_line_broken_in_a_string_is_put_together_and_reported(tmp_path):
    whole = json.dumps(record(0, "a", "b"))
    place = whole.index("Question") + 3
    path = tmp_path / "x_test.jsonl"
    text = [json.dumps(record(1, "c", "d")), whole[:place], whole[place:], "", whole]
    path.write_text("\r\n".join(text), encoding="utf-8")
    read = read_predictions(path)
    assert read.answers == ["d", "b", "b"]
    assert read.items[1] == read.items[2]
    assert read.notes == ("x_test.jsonl: record 1 was broken over 2 lines",)


def test_a_byte_order_mark_and_unicode_line_separators_are_no_line_breaks(tmp_path):
    path = tmp_path / "x_test.jsonl"
    path.write_text(json.dumps(record(0, "a\u2028b", "c"), ensure_ascii=False), "utf-8-sig")
    assert read_predictions(path).references == ["a\u2028b"]


def _without(*keys):
    return {key: value for key, value in record(1, "a", "b").items() if key not in keys}


@pytest.mark.parametrize(
    ("records", "error", "told"),
    [
        ([record(0, "a", "b"), _without("answer")], IncompleteRecordError, "no prediction"),
        ([record(0, "a", "b"), {**_without(), "answer": None}], IncompleteRecordError, "is None"),
        ([record(0, "a", "b"), _without("conversations")], IncompleteRecordError, "no reference"),
        ([record(0, "a", "b"), {**_without(), "voice": 5}], IncompleteRecordError, "and is 5"),
        ([record(0, "a", "b"), {**_without(), "voice": [5]}], IncompleteRecordError, "voice must"),
        ([record(0, "a", "b"), 7], MalformedFileError, "7 is no JSON object"),
        (
            [{**record(0, "a", "b"), "id": "q"}, {**record(1, "a", "b"), "id": "q"}],
            DuplicateRecordError,
            "id 'q' is that of record 0 too",
        ),
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_a_bad_record_is_named_with_its_file(tmp_path, records, error, told, lines):
    path = tmp_path / "ASR_test.json"
    (write_lines if lines else write_array)(path, records)
    with pytest.raises(error, match=told) as raised:
        read_predictions(path)
    assert "ASR_test.json" in str(raised.value)
    assert ("line 2" if lines and error is MalformedFileError else "record 1") in str(raised.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'[{"a": "\xe9"}]', "not UTF-8 text: byte 8 is 0xe9"),
        (b'[{"a": 1}, {"b": ]', "malformed JSON array.*line 1 of"),
        (b'{"a": \n{"b": \n', "no JSON, not even with the lines after it.*record 0"),
        (b"[" * 200_000, "cannot be read as JSON"),
        (b'[{"a": ' + b"[" * 900 + b"]" * 900 + b"}]", "nested too deep"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", "cannot be read as JSON"),
        (b'{"a": ' * 200_000, "no JSON"),
        (b"", "holds no record"),
        (b"[]", "holds no record"),
    ],
)
def test_a_file_that_is_no_predictions_is_refused(tmp_path, content, told):
    path = tmp_path / "ASR_test.json"
    path.write_bytes(content)
    with pytest.raises(MalformedFileError, match=told):
        read_predictions(path)


def test_half_a_character_is_read_as_a_replacement_and_reported(tmp_path):
    path = tmp_path / "x_test.json"
    path.write_text(json.dumps([record(0, "a", "b\ud83d"), record(1, "c", "\U0001f600")]), "utf-8")
    read = read_predictions(path)
    assert read.answers == ["b\ufffd", "\U0001f600"]
    assert read.notes == ("x_test.json: record 0 held half a character, read as U+FFFD",)


def test_records_with_two_different_answers_are_counted(tmp_path):
    path = tmp_path / "x_test.json"
    records = [record(n, "a", "b") | {"result": said} for n, said in enumerate("bc")]
    write_array(path, records)
    read = read_predictions(path)
    assert read.answers == ["b", "b"]
    (note,) = read.notes
    assert "1 records hold different texts under answer, result, prediction" in note


def test_folders_of_a_model_are_no_models_and_others_without_predictions_are_noted(tmp_path):
    write_model(tmp_path / "gpt_result")
    with pytest.raises(NoPredictionsError, match="holds no predictions"):
        find_models([tmp_path], list(FILES))
    write_model(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (found,) = find_models([tmp_path], list(FILES))
    assert found.notes == [f"the folder {tmp_path / 'empty'} is not scored"]


def test_models_are_found_alone_and_in_a_folder_of_models(tmp_path):
    a, b = write_model(tmp_path / "all" / "a"), write_model(tmp_path / "all" / "b")
    (a / "notes_test.json").write_text("[]")
    (tmp_path / "all" / "readme.md").write_text("not a model")
    found = find_models([tmp_path / "all"], ["PR", *FILES])
    assert [(m.name, m.path) for m in found] == [("a", a), ("b", b)]
    assert list(found[0].files) == list(FILES)
    assert (found[0].missing, found[0].strangers) == (("PR",), ("notes",))
    assert [m.name for m in find_models([b], list(FILES))] == ["b"]


def test_folders_without_predictions_and_models_of_one_name_are_refused(tmp_path):
    (tmp_path / "empty" / "gpt_result").mkdir(parents=True)
    for folder, told in (("empty", "holds no predictions"), ("nowhere", "is no folder")):
        with pytest.raises(NoPredictionsError, match=told):
            find_models([tmp_path / folder], list(FILES))
    first, second = write_model(tmp_path / "x" / "m"), write_model(tmp_path / "y" / "m")
    with pytest.raises(DuplicateRecordError, match="two models are called 'm'"):
        find_models([first, second], list(FILES))
    write_lines(first / "ASR_test.jsonl", [record(0, "a", "b")])
    with pytest.raises(DuplicateRecordError, match="are both there"):
        find_models([first], list(FILES))


def items(count: int) -> list[Item]:
    return [Item(f"r{n}", f"a{n}", "asked", (), None) for n in range(count)]


def test_scores_of_another_answer_or_reference_are_not_used_and_counted(tmp_path):
    path = tmp_path / "x_test.jsonl"
    pairs = [("r0 ", "\na0"), ("r1", "another"), ("another", "a2"), None]
    write_lines(path, [judgement(n, "Score: 4", pair) for n, pair in enumerate(pairs)])
    judged = read_judgements(path, items(4))
    assert judged.scores == judged.as_written == (4, None, None, 4)
    assert judged.explanations == ("Score: 4", "", "", "Score: 4")
    (note,) = judged.notes
    assert "2 scores are of another answer or reference" in note
    assert "the first is of item 1" in note


def test_judgements_are_repaired_counted_and_reported(tmp_path):
    path = tmp_path / "dolly_input_1_test.jsonl"
    broken = json.dumps(judgement(1, "Score: 2"))
    told = [
        json.dumps(judgement(0, "Score: 4")),
        broken[:9],
        broken[9:],
        json.dumps(judgement(3, "ERROR: time-out")),
        json.dumps(judgement(9, "Score: 5")),
    ]
    path.write_text("\n".join(told), encoding="utf-8")
    judged = read_judgements(path, items(4))
    assert judged.scores == (4, 2, None, None)
    assert judged.as_written == (4, None, None, None)
    assert judged.broken_lines == 1
    assert len(judged.notes) == 4
    for part in ("line 2 is broken", "line 4 states no score", "index 9 of 4", "1 of 4 items"):
        assert any(part in note for note in judged.notes), part


def test_an_item_judged_twice_is_refused(tmp_path):
    path = tmp_path / "x_test.jsonl"
    write_lines(path, [judgement(0, "Score: 4"), judgement(0, "Score: 1")])
    with pytest.raises(DuplicateRecordError, match=r"index 0 is judged twice.*line 2"):
        read_judgements(path, items(1))


def test_published_abstentions_are_shares_by_file(tmp_path):
    assert read_abstentions(tmp_path) == {}
    (tmp_path / "abstention").mkdir()
    write_lines(
        tmp_path / "abstention" / "instruction_follow_stats.jsonl",
        [{"file": "a_test.json", "abstention_rate": 12.5}],
    )
    assert read_abstentions(tmp_path) == {"a": 0.125}


# --- task lists -----------------------------------------------------------------------------------


def test_llaso_eval_has_twenty_tasks_in_44_files_and_three_modalities():
    tasks = load_tasks()
    assert len(tasks) == 44
    assert len({spec.task for spec in tasks.values()}) == 20
    modalities = [spec.modality for spec in tasks.values() if spec.task == "AQA"]
    assert [modalities.count(m) for m in ("(t,a)", "(a,t)", "(a)")] == [6, 6, 4]
    assert sum(spec.closed for spec in tasks.values()) == 19


def test_some_tasks_or_files_can_be_chosen():
    assert list(load_tasks(only=["SV", "dolly_input_1"])) == [
        "dolly_input_1",
        "meld_SV_classification",
    ]
    with pytest.raises(TaskListError, match=r"no task or file 'ARS'; did you mean .*ASR"):
        load_tasks(only=["ARS"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: x", "no list of tasks"),
        ("- {name: x, metric: WER, files: [a]}", "unknown metric 'WER'; metrics: ACC, WER/CER"),
        ("- {name: x, metric: ACC, file: [a]}", "unknown key 'file'; did you mean 'files'"),
        ("- {name: x, metric: MAE, files: [a]}", "needs a quantity"),
        ("- {name: x, metric: EM, files: [a], labels: [b]}", "labels are for ACC and F1"),
        ("- {name: x, metric: ACC, files: [ASR]}", "'ASR' is already in a task"),
        ("- {name: [", "cannot be read"),
        ("- {name: x, metric: EM, files: [../a]}", "'../a' is no name of a file"),
        ("- {name: x, metric: EM, files: {(a): [.a]}}", "'.a' is no name of a file"),
        (
            "- {name: x, metric: EM, files: [a], language: english}",
            "'english' is no code of ISO 639",
        ),
        ("- {name: x, metric: EM, files: [a], language: xx}", "'xx' is no code"),
    ],
)
def test_a_mistaken_task_list_is_told_in_words(tmp_path, text, told):
    path = tmp_path / "more.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskListError, match=told):
        load_tasks([path])


@pytest.mark.parametrize(
    ("written", "language"),
    [
        ("EN", "en"),
        ("zh-Hant-TW", "zh"),
        ("cmn", "zh"),
        ("jpn", "ja"),
        ("pt_BR", "pt"),
        ("yue", "yue"),
    ],
)
def test_a_language_has_one_code_however_it_is_written(tmp_path, written, language):
    path = tmp_path / "more.yaml"
    path.write_text(f"- {{name: x, metric: EM, files: [a], language: {written}}}", encoding="utf-8")
    (spec,) = read_task_list(path)
    assert spec.language == language


def test_a_task_written_as_an_entry_is_read_as_the_same(tmp_path):
    path = tmp_path / "again.yaml"
    specs = list(load_tasks().values())
    path.write_text(yaml.safe_dump([spec.entry() for spec in specs]), encoding="utf-8")
    assert read_task_list(path, further=False) == specs
