"""The report: one page that needs no network, says what is missing, and shows answers as text whatever they hold."""

import json
import re
from html.parser import HTMLParser

import pytest
import soundfile as sf
from evaluation_folders import record, write_array, write_model

from llaso_jax.evaluate import main
from llaso_jax.evaluation.report.browser import word_difference
from llaso_jax.evaluation.report.svg import Point, Series, dots, radar

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}
NASTY = '<!--<script></script><script>alert("x")</script><b>&amp;'


class Page(HTMLParser):
    """Checks nesting, and keeps ids, resources and the embedded data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.data = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.links += [value for key, value in attrs if key in ("src", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script" and data.startswith("{"):
            self.data += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("report")
    first, second = write_model(folder / "first"), write_model(folder / "second")
    nasty = [record(n, NASTY, NASTY) for n in range(3)]
    nasty[0]["voice"] = ["../secret.wav"]
    write_array(first / "dolly_input_1_test.json", nasty)
    sf.write(folder / "secret.wav", [0.0] * 160, 16_000)
    (folder / "audio" / "corpus").mkdir(parents=True)
    sf.write(folder / "audio" / "corpus" / "1.wav", [0.0] * 160, 16_000)
    (folder / "trained.yaml").write_text("first: {tasks: [ASR, SGC]}\n", encoding="utf-8")
    arguments = [
        "score",
        str(first),
        str(second),
        "--output",
        str(folder / "out"),
        "--bootstrap",
        "50",
    ]
    arguments += [
        "--trained-on",
        str(folder / "trained.yaml"),
        "--audio-root",
        str(folder / "audio"),
    ]
    assert main(arguments) == 0
    return Page((folder / "out" / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def browser(page) -> dict:
    return json.loads(page.data)


def test_the_page_is_whole_and_needs_no_network(page):
    assert {"overall", "tasks", "files", "modality", "abstention", "coverage", "confusion"} <= {
        *page.ids
    }
    assert {"notes", "browser", "model", "file", "items"} <= {*page.ids}
    assert page.links
    assert all(link.startswith("#") for link in page.links)


def test_answers_are_data_and_never_markup(page, browser):
    shown = browser["first"]["dolly_input_1"][0]
    assert (shown["reference"], shown["answer"]) == (NASTY, NASTY)
    assert "<" not in page.data


def test_answers_come_worst_first_with_what_differs_and_a_player(browser):
    asr = browser["first"]["ASR"]
    assert [item["n"] for item in asr] == [1, 0]
    assert asr[0]["diff"][3:] == [["delete", "barked"], ["insert", "barks"], ["delete", "twice"]]
    assert asr[0]["audio"] == ["../audio/corpus/1.wav"]
    assert asr[1]["audio"] == []  # corpus/0.wav is not there
    assert all(item["audio"] == [] for item in browser["first"]["dolly_input_1"] if not item["n"])
    judged = browser["second"]["dolly_input_1"]
    assert [item["score"] for item in judged] == [1, 1, 5]
    assert judged[0]["judge"].startswith("Score: 1")


def test_word_differences_by_hand():
    assert word_difference("a b c d", "a x c d e") == [
        ("equal", "a"),
        ("delete", "b"),
        ("insert", "x"),
        ("equal", "c d"),
        ("insert", "e"),
    ]


def test_coverage_is_of_declared_models_and_in_the_scores(tmp_path, capsys):
    model = write_model(tmp_path / "m")
    (tmp_path / "trained.yaml").write_text("m: {tasks: [ASR], languages: [en]}\n", encoding="utf-8")
    arguments = ["score", str(model), "-o", str(tmp_path / "out"), "--bootstrap", "0"]
    assert main([*arguments, "--trained-on", str(tmp_path / "trained.yaml")]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    covered = scores["coverage"]["m"]
    assert covered["coverage"] == 1 / 20
    groups = covered["groups"]
    assert [groups[g]["files"] for g in ("seen", "unseen_task", "unseen_language")] == [1, 4, 0]
    assert groups["unseen_task"]["score"] == pytest.approx((1 / 2 + 0.675 + 7 / 15 + 3 / 5) / 4)
    assert groups["unseen_task"]["abstention"] == 1 / 4
    assert groups["seen"]["abstention"] is None
    (tmp_path / "trained.yaml").write_text("m: {tasks: [SPEECH]}\n", encoding="utf-8")
    assert main([*arguments, "--trained-on", str(tmp_path / "trained.yaml")]) == 1
    assert "m was trained on SPEECH" in " ".join(capsys.readouterr().err.split())


def test_items_and_baselines_are_of_every_model(tmp_path):
    gender = "vctk_gender_classification"
    a = write_model(tmp_path / "a", {gender: [("male", "male")]})
    b = write_model(tmp_path / "b", {gender: [("male", "male"), ("female", "male")]})
    assert main(["score", str(a), str(b), "-o", str(tmp_path / "out"), "--bootstrap", "0"]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "1 / 2" in page
    assert "chance 1.00 / chance 0.50" in page


def test_a_comparison_has_a_page_of_its_own(tmp_path):
    a = write_model(tmp_path / "a", {"ASR": [("one two", NASTY)]})
    b = write_model(tmp_path / "b", {"ASR": [("one two", "one two")]})
    assert main(["compare", str(a), str(b), "-o", str(tmp_path / "out"), "--bootstrap", "20"]) == 0
    text = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert not Page(text).links
    assert "record 0: b is better" in text
    assert "<script" not in text


def test_a_radar_puts_values_at_their_distance_and_leaves_out_missing_ones():
    drawn = radar(["N", "E", "S", "W"], [Series("m", "red", {"N": 1.0, "E": 0.5, "S": None})])
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert circles == [("240.0", "60.0"), ("330.0", "240.0")]


def test_dots_lie_between_the_ends_of_their_intervals():
    drawn = dots({"ASR": [Point("m", "red", 0.5, 0.25, 0.75)]}, (0, 1), "share")
    (line,) = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"', drawn)
    (dot,) = re.findall(r'<circle cx="([\d.]+)"', drawn)
    low, middle, high = float(line[0]), float(dot), float(line[1])
    assert middle - low == pytest.approx(high - middle)
    assert low < middle
    assert "m: 0.500 (0.250 to 0.750)" in drawn
