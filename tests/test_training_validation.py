"""Validation: every held-out sample once, in file order, with numbers that can be worked out elsewhere."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import pytest
from data_corpus import byte_tokenizer
from reference import jit, random_params
from tolerances import LEAF
from training_setup import (
    HELD_OUT,
    PROJECTOR,
    config,
    inputs_folder,  # noqa: F401 - the fixture `folder`
    losses,
    recipe,
    records,
    run,
    shared_programs,  # noqa: F401 - the fixture `compile_once`
)

from llaso_jax.data.batch import make_batch
from llaso_jax.data.packing import BatchShape, Row
from llaso_jax.data.records import RecordSource
from llaso_jax.data.samples import SampleLoader
from llaso_jax.data.tokenizer import eos_token_ids
from llaso_jax.errors import DataError
from llaso_jax.evaluation.metrics.text import whisper_english
from llaso_jax.inference.prompts import layout_of
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import abstract_params, bind, unflatten
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.training import validation
from llaso_jax.training.report import score_table, transcript_lines
from llaso_jax.training.state import Layout
from llaso_jax.training.validation import Report, TaskScore, Validator

REFERENCES = ["a", "ab", "abc", "abcd", "abcde", "abcdef", "abcdefg"]
TASKS = ["ASR", "EE", "SGC", "ASR", "EE", "SGC", "ASR"]


def _tree(folder, file: str = "eval.json", **stage):
    held_out = {"eval_json": [str(folder / "corpus" / file)]}
    return recipe(folder, stages=({"data": held_out, **stage},))


def _loader(cfg) -> SampleLoader:
    return SampleLoader(byte_tokenizer(), prompt=cfg.prompt, layout=layout_of(cfg.model))


def _validator(
    folder,
    *,
    file: str = "eval.json",
    max_samples: int | None = None,
    compute: ComputeConfig | None = None,
) -> Validator:
    cfg = config(_tree(folder, file))
    tokenizer = byte_tokenizer()
    return Validator(
        cfg.model,
        compute or ComputeConfig(),
        Layout.of(cfg.model, make_mesh("1x1")),
        cfg.stages[0].data,
        _loader(cfg),
        tokenizer,
        eos_token_id=eos_token_ids(tokenizer),
        max_samples=max_samples,
        max_new_tokens=6,
        batch_rows=4,
    )


@functools.cache
def _params(model):
    return random_params(unflatten(abstract_params(model)))


@pytest.fixture(scope="module")
def report(folder) -> Report:
    return _validator(folder)(_params(config(_tree(folder)).model))


def test_every_held_out_sample_is_answered_once_in_file_order(report):
    assert [(task, said) for task, said, _ in report.answers] == list(
        zip(TASKS, REFERENCES, strict=True)
    )
    assert len(report.answers) == HELD_OUT
    assert sum(score.samples for score in report.tasks.values()) == HELD_OUT


def test_a_bfloat16_run_generates_in_float32_on_a_cpu_and_has_its_own_loss(folder, report):
    params = _params(config(_tree(folder)).model)
    low = _validator(folder, compute=ComputeConfig(dtype="bfloat16"))(params)
    assert low.answers == report.answers
    assert low.loss != report.loss
    assert low.loss == pytest.approx(report.loss, rel=0.02)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    stored_low = _validator(folder, compute=ComputeConfig(dtype="bfloat16"))(rounded)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    assert stored_low.answers == _validator(folder)(exact).answers


def test_the_loss_is_the_mean_over_the_tokens_of_samples_taken_one_by_one(folder, report):
    """Unpacked and in float64 from the logits."""
    cfg = config(_tree(folder))
    loader, audio = _loader(cfg), layout_of(cfg.model)
    data = dataclasses.replace(cfg.stages[0].data, rows=1)
    shape = BatchShape.of(data, audio, pad_id=loader.pad_id)
    source = RecordSource(data.eval_json, data_root=None, index_dir=None)
    program = jit(lambda p, b: bind(cfg.model, p).answer_logits(b))
    values = []
    for i in range(HELD_OUT):
        row = Row()
        row.add(loader.load(source[i]))
        arrays = make_batch([row], shape, mel_frames=50).arrays
        logits = np.asarray(program(_params(cfg.model), arrays), np.float64)[0]
        target = arrays["answer_token"][0]
        all_losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(target)), target]
        values.append(all_losses[arrays["answer_index"][0] >= 0])
    # Answers of 1 to 7 bytes, each with its end token and the line break of the template.
    assert len({len(v) for v in values}) == HELD_OUT
    assert report.loss == pytest.approx(np.concatenate(values).mean(), rel=LEAF)
    assert abs(np.mean([v.mean() for v in values]) / report.loss - 1) > 10 * LEAF


def test_scores_of_real_answers_are_those_of_jiwer_and_of_counting(report):
    normalize = whisper_english

    def pairs(metric: str):
        return [
            (normalize(said), normalize(heard))
            for task, said, heard in report.answers
            if (task == "ASR") == (metric == "wer")
        ]

    said, heard = zip(*pairs("wer"), strict=True)
    assert report.wer == pytest.approx(jiwer.wer(list(said), list(heard)))
    assert report.accuracy == np.mean([a == b for a, b in pairs("accuracy")])


@pytest.fixture
def scripted(monkeypatch):
    """Answers of a model that says what it is told to."""
    tokenizer = byte_tokenizer()

    def say(*texts: str) -> None:
        def generate(cfg, params, samples, generation, **_):
            assert all(len(sample.answer_index) == 0 for sample in samples), "answers leak"
            end = generation.eos_token_id[0]
            return iter([[*tokenizer(text)["input_ids"], end] for text in texts])

        monkeypatch.setattr(validation, "generate_samples", generate)

    return say


def test_scores_by_hand(folder, scripted):
    scripted("A.", "ab", "abc", " abcd", "", "ABCDEF", "not it")
    report = _validator(folder)(_params(config(_tree(folder)).model))
    assert report.wer == pytest.approx(2 / 3)  # a substitution and an insertion for three words
    assert report.accuracy == 3 / 4
    assert report.tasks == {
        "ASR": TaskScore("wer", pytest.approx(2 / 3), 3, None),
        "EE": TaskScore("accuracy", 0.5, 2, 1 / 4),
        "SGC": TaskScore("accuracy", 1.0, 2, 1 / 2),
    }
    assert [heard for _, _, heard in report.answers] == [
        *("A.", "ab", "abc", "abcd", "", "ABCDEF", "not it")
    ]
    again = Report.from_dict(json.loads(json.dumps(dataclasses.asdict(report))))
    assert again == report
    table = score_table(None, report)
    assert list(table.columns[0].cells) == ["ASR", "EE", "SGC", "all", "all", "all"]
    assert list(table.columns[3].cells)[:3] == ["-", "0.250", "0.500"]
    assert transcript_lines(report.answers, 2) == [
        "  said: a      heard: A.",
        "  said: abcd   heard: abcd",
    ]


def test_the_first_samples_only_where_a_limit_is_set(folder, scripted):
    scripted("a", "b")
    report = _validator(folder, max_samples=2)(_params(config(_tree(folder)).model))
    assert [said for _, said, _ in report.answers] == ["a", "ab"]
    assert (report.wer, report.accuracy) == (0.0, 0.0)


def test_held_out_data_is_never_skipped_over(folder):
    entries = json.loads((folder / "corpus" / "eval.json").read_text())
    entries[3]["voice"] = ["gone.wav"]
    (folder / "corpus" / "broken.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"gone\.wav.*held-3"):
        _validator(folder, file="broken.json")


# --- while training -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folder):
    """A run validated before, every 2 of its 4 steps, and after; and one never validated."""
    stage = {"max_steps": 4, "parameters": list(PROJECTOR)}
    evaluation = {"every_steps": 2, "max_new_tokens": 6, "batch_rows": 4}
    result = run(_tree(folder, **stage, evaluation=evaluation), folder / "run")
    run(recipe(folder, stages=(stage,)), folder / "blind")
    return result


def test_validation_is_logged_before_every_n_steps_and_after_once_each(trained):
    logged = records(trained.output, "eval")
    assert [(r["stage"], r["step"]) for r in logged] == [("align", 0), ("align", 2), ("align", 4)]
    for record, report in ((logged[0], trained.before), (logged[-1], trained.after)):
        assert record["loss"] == report.loss
        assert record["wer"] == report.wer
        assert record["accuracy"] == report.accuracy
        assert set(record["tasks"]) == {"ASR", "EE", "SGC"}
        assert record["tasks"]["SGC"]["chance"] == 0.5
    assert trained.after.loss < trained.before.loss


def test_validation_does_not_disturb_training(trained, folder):
    assert losses(trained.output) == losses(folder / "blind")


def test_validation_before_training_can_be_left_out(trained, folder):
    evaluation = {"every_steps": 2, "before": False, "max_new_tokens": 6, "batch_rows": 4}
    stage = {"max_steps": 4, "parameters": list(PROJECTOR)}
    late = run(_tree(folder, **stage, evaluation=evaluation), folder / "late")
    assert [r["step"] for r in records(late.output, "eval")] == [2, 4]
    assert late.before is None
    assert late.after == trained.after


def test_a_finished_run_knows_its_scores_from_before(trained, folder):
    evaluation = {"every_steps": 2, "max_new_tokens": 6, "batch_rows": 4}
    stage = {"max_steps": 4, "parameters": list(PROJECTOR)}
    again = run(_tree(folder, **stage, evaluation=evaluation), folder / "run")
    assert again.before == trained.before
    assert again.after == trained.after
