"""Judges: an endpoint that fails in every way, the cache, and the local judge's held-out agreement."""

import contextlib
import csv
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from evaluation_folders import write_model

from llaso_jax.evaluate import main
from llaso_jax.evaluation.errors import JudgeError
from llaso_jax.evaluation.judge import openai_judge
from llaso_jax.evaluation.judge.features import FEATURES, features
from llaso_jax.evaluation.judge.fitting import Judged, fit, held_out_agreement, predict
from llaso_jax.evaluation.judge.local import LocalJudge, agreement_line, fitted
from llaso_jax.evaluation.judge.openai_judge import OpenAIJudge
from llaso_jax.evaluation.predictions import find_models, read_predictions
from llaso_jax.evaluation.tasks import load_tasks

FILE = "dolly_input_1"
QA = [("Paris", "It is Paris."), ("Two", "Three"), ("Rome", "")]

# --- an endpoint ----------------------------------------------------------------------------------


def said(text: str | None) -> dict:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


class Endpoint(ThreadingHTTPServer):
    """Answers with a script of (status, body), the last of them for ever; `asked` holds the requests."""

    daemon_threads = True

    def __init__(self, script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.lock = list(script), [], threading.Lock()
        self.given_up = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that gave up waiting is part of the test."""


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            script = self.server.script
            status, answer = script.pop(0) if len(script) > 1 else script[0]
        if status == "slow":
            self.server.given_up.wait(60)  # which ends the connection without an answer
            return
        content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "10")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def endpoint(*script):
    server = Endpoint(script)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.given_up.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def asked(tmp_path):
    """Folder, task and predictions of three answers."""
    model = write_model(tmp_path / "m", {FILE: QA})
    tasks = load_tasks()
    (folder,) = find_models([model], list(tasks))
    return folder, tasks[FILE], read_predictions(folder.files[FILE])


@pytest.fixture
def judge(tmp_path):
    def make(server: Endpoint, **settings) -> OpenAIJudge:
        defaults = {"workers": 1, "timeout": 30, "retries": 3}
        return OpenAIJudge("m", server.url, tmp_path / "cache", **{**defaults, **settings})

    return make


GOOD = (200, said("Score: 4\nExplanation: fine"))


def test_the_published_prompt_is_sent_and_its_score_read(asked, judge):
    with endpoint(GOOD) as server:
        judged = judge(server)(*asked)
    assert judged.scores == (4, 4, 4)
    body = server.asked[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.1, 4096)
    system, user = (message["content"] for message in body["messages"])
    assert "Score: <integer 1-5>" in system
    assert user == (
        "**Reference Answer:**\nParis\n\n**Predicted Answer:**\nIt is Paris.\n\n"
        "Please produce the evaluation."
    )


def test_a_second_run_asks_nothing_and_needs_no_endpoint(asked, judge):
    with endpoint(GOOD) as server:
        first = judge(server)(*asked)
        again = judge(server)
        assert again(*asked).scores == first.scores
        assert again.asked == 0
    offline = judge(server)  # the server is gone
    assert offline(*asked).explanations == first.explanations
    assert len(server.asked) == 3
    with pytest.raises(JudgeError, match="goes on from there"):
        judge(server, retries=0)(asked[0], asked[1], _changed(asked[2]))


def _changed(predictions):
    items = (predictions.items[0]._replace(answer="something new"),)
    return type(predictions)(predictions.path, "json", "answer", items)


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"error": {"message": "too many requests"}}),
        (500, "no JSON"),
        (503, {}),
        ("slow", said("Score: 1")),
    ],
)
def test_a_request_that_fails_is_sent_again(asked, judge, failure):
    seconds = 1 if failure[0] == "slow" else 30
    with endpoint(failure, GOOD) as server:
        judged = judge(server, timeout=seconds)(*asked)
    assert judged.scores == (4, 4, 4)
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    "malformed",
    [
        (200, said("I like it.")),
        (200, said("Score: 9")),
        (200, said(None)),
        (200, {"choices": []}),
        (200, {"hello": 1}),
    ],
)
def test_an_answer_without_a_score_is_asked_for_again(asked, judge, malformed):
    with endpoint(malformed, malformed, GOOD) as server:
        assert judge(server)(*asked).scores == (4, 4, 4)
    assert len(server.asked) == 5


def test_a_judge_that_never_scores_leaves_the_items_unscored_reported_and_uncached(asked, judge):
    with endpoint((200, said("no"))) as server:
        judged = judge(server)(*asked)
        assert len(server.asked) == 9
    assert judged.scores == (None, None, None)
    assert len(judged.notes) == 3
    assert "states no score for item 2" in judged.notes[2]
    with endpoint(GOOD) as server:
        assert judge(server)(*asked).scores == (4, 4, 4)


def test_refusals_and_endless_failures_are_errors_that_keep_what_was_judged(asked, judge):
    with endpoint((401, {"error": {"message": "bad key"}})) as server:
        with pytest.raises(JudgeError, match=r"m at http.*bad key"):
            judge(server)(*asked)
        assert len(server.asked) == 1  # a refusal is not repeated
    with endpoint(GOOD, (429, {}), (429, {}), GOOD) as server:
        with pytest.raises(JudgeError, match="after 1 retries"):
            judge(server, retries=1)(*asked)
        assert judge(server)(*asked).scores == (4, 4, 4)
        assert len(server.asked) == 5  # the first was kept


class StandingClock:
    """A time that does not pass; `slept` holds how long each wait would have been."""

    def __init__(self):
        self.slept = []

    def monotonic(self) -> float:
        return 100.0

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch) -> StandingClock:
    clock = StandingClock()
    monkeypatch.setattr(openai_judge, "time", clock)
    return clock


@pytest.mark.parametrize("workers", [1, 3])
def test_requests_start_no_faster_than_the_rate(asked, judge, clock, workers):
    with endpoint(GOOD) as server:
        judge(server, per_minute=600, workers=workers)(*asked)
    assert sorted(clock.slept) == pytest.approx([0, 0.1, 0.2])


def test_requests_that_are_sent_again_keep_to_the_rate_too(asked, judge, clock):
    with endpoint((429, {}), (429, {}), GOOD) as server:
        judge(server, per_minute=600)(*asked)
    assert len(server.asked) == 5
    # what the endpoint asks for after a failure (10 ms) comes on top of each request's turn
    assert clock.slept == pytest.approx([0, 0.01, 0.1, 0.01, 0.2, 0.3, 0.4])


def test_what_another_endpoint_said_is_not_taken(asked, judge):
    with endpoint(GOOD) as first, endpoint((200, said("Score: 2"))) as second:
        assert judge(first)(*asked).scores == (4, 4, 4)
        assert judge(second)(*asked).scores == (2, 2, 2)


@pytest.mark.parametrize("damage", ["", "[]", '{"evaluation": 5}', '{"evaluation": "well"}'])
def test_a_damaged_file_of_the_cache_is_judged_again(asked, judge, tmp_path, damage):
    with endpoint(GOOD) as server:
        judge(server)(*asked)
        for path in (tmp_path / "cache").iterdir():
            path.write_text(damage, encoding="utf-8")
        assert judge(server)(*asked).scores == (4, 4, 4)
    assert len(server.asked) == 6


def test_the_judge_is_named_with_the_endpoint_that_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1/")
    assert OpenAIJudge("m", None, tmp_path).name == "m at http://127.0.0.1:9/v1"
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert OpenAIJudge("m", None, tmp_path).name == "m at https://api.openai.com/v1"


def test_score_takes_an_endpoint_as_judge(tmp_path, capsys):
    model = write_model(tmp_path / "m", {FILE: QA})
    arguments = ["score", str(model), "-o", str(tmp_path / "out"), "--judge", "openai"]
    assert main(arguments) == 1
    assert "--judge openai needs --model" in capsys.readouterr().err
    with endpoint(GOOD) as server:
        arguments += ["--model", "m", "--base-url", server.url, "--judge-rate", "0"]
        assert main([*arguments, "--judge-cache", str(tmp_path / "cache")]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert scores["models"]["m"]["files"][FILE]["corrected"] == 4
    assert scores["judge"]["name"] == f"m at {server.url}"


# --- the local judge ------------------------------------------------------------------------------


def test_features_are_bounded_and_of_the_pair():
    empty, equal = features("a [b : c] 7", ""), features("a [b : c] 7", "a [b : c] 7")
    assert len(equal) == len(FEATURES)
    assert all(0 <= value <= 1 for value in (*empty, *equal))
    named = dict(zip(FEATURES, equal, strict=True))
    assert (named["equal"], named["f1"], named["slots"], named["numbers"]) == (1, 1, 1, 1)
    assert dict(zip(FEATURES, empty, strict=True))["empty"] == 1


def test_held_out_agreement_is_of_a_judge_fitted_on_the_other_models():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(300, len(FEATURES)))
    models = np.repeat(["a", "b", "c"], 100)
    scores = 1 + 4 * x[:, 3]
    scores[models == "c"] = 5 - 4 * x[models == "c", 3]  # one model is judged the other way round
    judged = Judged(models, np.full(300, "AQA"), x, scores)
    agreement = held_out_agreement(judged)
    assert agreement["c"]["pearson"] < -0.95
    assert agreement["a"]["pairs"] == 100
    only = judged.where(models != "c")
    said = predict(fit(only)["AQA"], only.features)
    assert np.corrcoef(said, only.scores)[0, 1] > 0.95
    line = agreement_line({name: agreement[name] for name in "ac"})
    assert line.startswith(
        "with the published judge on 2 models, each left out of the fit with its"
    )


def test_a_family_is_left_out_of_the_fit_together():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(300, len(FEATURES)))
    models = np.repeat(["a", "b", "b2"], 100)
    scores = 1 + 4 * x[:, 3]
    scores[models != "a"] = 5 - 4 * x[models != "a", 3]  # b and its variant are alike, a is not
    judged = Judged(models, np.full(300, "AQA"), x, scores)
    assert held_out_agreement(judged)["b"]["pearson"] > -0.95  # its variant tells of it
    alone = held_out_agreement(judged, {"b2": "b"})
    assert max(alone["b"]["pearson"], alone["b2"]["pearson"]) < -0.95


def test_the_local_judge_prefers_better_answers_and_is_the_same_every_time(asked):
    first, second = LocalJudge()(*asked), LocalJudge()(*asked)
    assert first.scores == second.scores
    assert first.scores[0] > max(first.scores[1:])
    assert min(first.scores) >= 1


def test_the_local_judges_agreement_is_shown_wherever_its_scores_are(tmp_path, capsys):
    model = write_model(tmp_path / "m", {FILE: QA})
    assert main(["score", str(model), "-o", str(tmp_path / "out"), "--judge", "local"]) == 0
    line = agreement_line(fitted()["agreement"])
    assert line in " ".join(capsys.readouterr().err.split())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    # the head, overall, tasks, files and the modality plot
    assert page.count(line.replace("'", "&#x27;")) == 5
    assert page.count(f"by the local surrogate; agreement {line}") == len(QA)  # every card
    for name in fitted()["agreement"]:
        assert f"<td>{name}</td>" in page
    with (tmp_path / "out" / "tasks.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["name"]: row["judge"] for row in csv.DictReader(file)}
    assert line in rows["AQA"]
    assert line in rows["macro_task"]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert scores["judge"]["agreement"] == line
    assert len(scores["judge"]["held_out"]) == 11
    pair = ["compare", str(model), str(model), "-o", str(tmp_path / "pair"), "--judge", "local"]
    assert main(pair) == 0
    assert line in " ".join(capsys.readouterr().err.split())
    page = (tmp_path / "pair" / "comparison.html").read_text(encoding="utf-8")
    assert line.replace("'", "&#x27;") in page
