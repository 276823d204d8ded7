"""A whole run: exact resume from any point, on another mesh too; what it refuses; what it leaves behind."""

import json
import logging
import os
import shutil
import signal

import numpy as np
import pytest
import yaml
from tolerances import LEAF
from training_setup import (
    HELD_OUT,
    PROJECTOR,
    PROJECTOR_AND_DECODER,
    inputs_folder,  # noqa: F401 - the fixture `folder`
    losses,
    recipe,
    records,
    run,
    shared_programs,  # noqa: F401 - the fixture `compile_once`
    write_recipe,
)

import llaso_jax.train
from llaso_jax.config import RunConfig, parse_config
from llaso_jax.conversion import load_model
from llaso_jax.errors import CheckpointError, NonFiniteLossError
from llaso_jax.modeling.functional import flatten
from llaso_jax.training import loop
from llaso_jax.training.ledger import read_ledger

STEPS = 4
logger = logging.getLogger(__name__)


@pytest.fixture(autouse=True)
def sample_order(monkeypatch):
    """{(stage, step): sample ids of its batch} of the steps done in this test."""
    order = {}
    report = loop.StageRun._report

    def noted(self, done, bar, newer=None):
        if done is not None:
            order[self.stage.name, done.number] = done.batch.sample_ids
        return report(self, done, bar, newer)

    monkeypatch.setattr(loop.StageRun, "_report", noted)
    return order


def two_stages(folder, **changes):
    """LLaSO's two stages, each of 4 steps, saved every 2; the data of the second in another order."""
    stages = (
        {"parameters": list(PROJECTOR), "max_steps": STEPS},
        {"parameters": list(PROJECTOR_AND_DECODER), "max_steps": STEPS, "data": {"seed": 3}},
    )
    checkpoint = {"every_steps": 2, "keep_latest": 100, "export_hf": False}
    return recipe(folder, stages=stages, **{"checkpoint": checkpoint, **changes})


def _tree(folder) -> dict[str, np.ndarray]:
    return {p: np.asarray(leaf) for p, leaf in flatten(load_model(folder / "model")[1]).items()}


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """(output folder, losses, sample order, final parameters) of a run that nothing disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    order = {}
    report = loop.StageRun._report

    def noted(self, done, bar, newer=None):
        if done is not None:
            order[self.stage.name, done.number] = done.batch.sample_ids
        return report(self, done, bar, newer)

    loop.StageRun._report = noted
    try:
        run(two_stages(folder), output)
    finally:
        loop.StageRun._report = report
    values = losses(output)
    assert len(values) == 2 * STEPS
    assert len(set(values.values())) == 2 * STEPS
    return output, values, order, _tree(output)


def _as_if_killed(source, target, *, stage: str, step: int) -> None:
    """A copy of a run as a kill leaves it whose newest checkpoint is `step` of `stage`."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "model")
    (target / "metrics.png").unlink()
    for checkpoint in (target / "checkpoints" / stage).iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    if stage == "align":
        shutil.rmtree(target / "checkpoints" / "instruct", ignore_errors=True)


def _assert_same_params(actual, expected) -> None:
    assert set(actual) == set(expected)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "step"),
    [("align", 2), ("align", 4), ("instruct", 2)],
    ids=["inside the first stage", "between the stages", "inside the second stage"],
)
def test_a_resumed_run_continues_bit_for_bit(
    folder, undisturbed, sample_order, tmp_path, stage: str, step: int
):
    source, expected, expected_order, expected_params = undisturbed
    output = tmp_path / "run"
    _as_if_killed(source, output, stage=stage, step=step)
    (output / "metrics.jsonl").unlink()
    run(two_stages(folder), output)

    keys = list(expected)
    to_do = keys[keys.index((stage, step)) + 1 :]
    assert losses(output) == {key: expected[key] for key in to_do}
    assert sample_order == {key: expected_order[key] for key in to_do}
    _assert_same_params(_tree(output), expected_params)


def test_a_finished_run_is_not_trained_again(folder, undisturbed, monkeypatch, tmp_path):
    source, expected, _, expected_params = undisturbed
    output = tmp_path / "run"
    shutil.copytree(source, output)

    def refuse(*_):
        raise AssertionError("a step was made")

    monkeypatch.setattr(loop, "place_lanes", refuse)
    run(two_stages(folder), output)
    assert len(records(output)) == len(expected)
    _assert_same_params(_tree(output), expected_params)


def test_the_sample_order_is_of_the_seed_and_every_sample_is_seen(undisturbed, folder):
    _, _, order, _ = undisturbed
    first, second = (
        [i for (name, _), rows in order.items() if name == stage for row in rows for i in row]
        for stage in ("align", "instruct")
    )
    assert first != second
    # 4 batches of 16 samples: one pass of 40 and a part of the next, a window of 20 apart at most.
    assert len(set(first)) == 40


@pytest.mark.slow
def test_a_resumed_mixture_goes_on_and_tells_how_often_each_source_was_seen(folder, tmp_path):
    corpus = folder / "corpus"
    tree = two_stages(folder)
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0]["data"] |= {
        "train_json": [],
        "mixture": [
            {"name": "many", "files": [str(corpus / "train.json")]},
            {"name": "few", "files": [str(corpus / "eval.json")], "weight": 0.5},
        ],
    }
    run(tree, tmp_path / "whole")
    expected = records(tmp_path / "whole")
    taken = [ids for _, ids in read_ledger(tmp_path / "whole" / "ledger" / "align")]
    few = 0
    for record, ids in zip(expected, taken, strict=True):
        few += sum(i.startswith("held-") for i in ids)
        assert record["passes"] == {"many": (record["samples"] - few) / 40, "few": few / HELD_OUT}
    assert abs(few - expected[-1]["samples"] / 3) <= 2

    _as_if_killed(tmp_path / "whole", tmp_path / "run", stage="align", step=2)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run(tree, tmp_path / "run")
    for ours, theirs in zip(records(tmp_path / "run"), expected[2:], strict=True):
        assert ours["loss"] == theirs["loss"]
        assert ours["passes"] == theirs["passes"]


@pytest.mark.slow  # one process goes on from two on another mesh by default (test_processes.py)
def test_another_mesh_continues_with_the_same_losses(folder, tmp_path):
    """Saved on 8x1, continued on 2x4 and compared with a run that stays on 8x1."""
    checkpoint = {"every_steps": 2, "keep_latest": 100, "export_hf": False}
    tree = recipe(folder, stages=({"max_steps": 8},), checkpoint=checkpoint)
    run(tree, tmp_path / "whole", mesh="8x1")
    expected = losses(tmp_path / "whole")
    _as_if_killed(tmp_path / "whole", tmp_path / "moved", stage="align", step=2)
    (tmp_path / "moved" / "metrics.jsonl").unlink()
    run(tree, tmp_path / "moved", mesh="2x4")
    continued = losses(tmp_path / "moved")
    assert list(continued) == [("align", step) for step in range(3, 9)]
    for key, loss in continued.items():
        logger.info("%s: %.2e apart", key, abs(loss - expected[key]))
        assert loss == pytest.approx(expected[key], rel=LEAF)
    ours, theirs = _tree(tmp_path / "moved"), _tree(tmp_path / "whole")
    assert max(np.abs(ours[p] - theirs[p]).max() for p in theirs) < 1e-3


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("SIGINT", 0),
        pytest.param("SIGTERM", 0, marks=pytest.mark.slow),
        # Grain waits up to 25 s for a worker process that is closed before its data ends.
        pytest.param("SIGTERM", 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_says_how_to_continue(
    folder, undisturbed, monkeypatch, tmp_path, capsys, name: str, workers: int
):
    """At a step that is not saved otherwise; the run that continues from there is the undisturbed one."""
    _, expected, _, expected_params = undisturbed
    report = loop.StageRun._report

    def signalled(self, done, bar, newer=None):
        if newer is not None and (self.stage.name, newer.number) == ("instruct", 3):
            os.kill(os.getpid(), signal.Signals[name])
        return report(self, done, bar, newer)

    handler = signal.getsignal(signal.Signals[name])
    command = [
        "--config",
        str(write_recipe(tmp_path, two_stages(folder))),
        "--output",
        str(tmp_path / "run"),
        *(f"stages.{stage}.data.num_workers={workers}" for stage in (0, 1)),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(loop.StageRun, "_report", signalled)
        assert llaso_jax.train.main(command) == 75
    assert signal.getsignal(signal.Signals[name]) is handler
    text = " ".join(capsys.readouterr().out.split())
    assert f"{name}: stage 'instruct' is saved at step 3. Run the same command again" in text
    done = losses(tmp_path / "run")
    assert list(done)[-1] == ("instruct", 3)

    assert llaso_jax.train.main(command) == 0
    assert losses(tmp_path / "run") == expected
    assert len(records(tmp_path / "run")) == len(expected), "a step was done twice"
    _assert_same_params(_tree(tmp_path / "run"), expected_params)
    assert "Done in" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """`main` sets up logging for a terminal; the tests after it want none of that."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


# --- folders --------------------------------------------------------------------------------------


def _prepare(tree, output, **options):
    from llaso_jax.training.run import _prepare_output

    cfg = parse_config(RunConfig, json.loads(json.dumps(tree)))
    return _prepare_output(cfg, output, overwrite=options.get("overwrite", False))


def test_other_settings_are_refused_naming_the_key_and_both_values(folder, tmp_path):
    output = tmp_path / "run"
    _prepare(two_stages(folder), output)
    other = two_stages(folder)
    other["stages"][1]["optimizer"]["learning_rate"] = 0.5
    with pytest.raises(
        CheckpointError, match=r"stages\.1\.optimizer\.learning_rate: 0\.01 there, 0\.5 now"
    ):
        _prepare(other, output)
    with pytest.raises(CheckpointError, match="seed: 0 there, 7 now"):
        _prepare(two_stages(folder, seed=7), output)
    stored = yaml.safe_load((output / "config.yaml").read_text())
    assert stored["seed"] == 0, "the refused settings must not take the place of the run's"


def test_settings_that_do_not_change_results_may_differ(folder, tmp_path):
    output = tmp_path / "run"
    _prepare(two_stages(folder), output)
    other = two_stages(
        folder,
        checkpoint={"every_steps": 7},
        logging={"every_steps": 3},
        description="the same run, told differently",
    )
    for stage in other["stages"]:
        stage["data"] |= {"num_threads": 1, "read_ahead": 3, "prefetch_batches": 0}
        stage["evaluation"] = {"every_steps": 2}
    _prepare(other, output)


def test_overwrite_starts_over(folder, tmp_path):
    tree = recipe(folder, stages=({"parameters": list(PROJECTOR), "max_steps": 2},))
    output = tmp_path / "run"
    run(tree, output)
    (output / "old").write_text("of the earlier run")
    tree["stages"][0]["optimizer"]["learning_rate"] = 0.02
    run(tree, output, overwrite=True)
    assert [r["step"] for r in records(output)] == [1, 2]
    assert not (output / "old").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "years of work"},
        {"config.yaml": "defaults: [hydra]\n", "src/main.py": "pass\n"},
        {"config.yaml": "- a list\n"},
        {"config.yaml": "not: [valid yaml"},
    ],
    ids=["no config", "a config of something else", "a list", "broken YAML"],
)
def test_a_folder_of_something_else_is_refused_and_left_alone(
    folder, tmp_path, files, overwrite: bool
):
    output = tmp_path / "precious"
    for name, text in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    with pytest.raises(CheckpointError, match="choose another --output"):
        _prepare(two_stages(folder), output, overwrite=overwrite)
    left = {str(p.relative_to(output)): p.read_text() for p in output.rglob("*") if p.is_file()}
    assert left == files


def test_a_kill_while_the_settings_are_written_leaves_a_run_that_continues(
    folder, monkeypatch, tmp_path
):
    """Whatever instant the process ends at, the folder is empty, or holds the whole file."""
    output = tmp_path / "run"
    tree = two_stages(folder)

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, killed)
    with pytest.raises(KeyboardInterrupt):
        _prepare(tree, output)
    assert not (output / "config.yaml").exists()
    monkeypatch.undo()
    _prepare(tree, output)
    _prepare(tree, output)
    assert [p.name for p in output.iterdir()] == ["config.yaml"]


def test_the_resolved_settings_and_the_tokenizer_are_kept(folder, undisturbed):
    output = undisturbed[0]
    stored = parse_config(RunConfig, yaml.safe_load((output / "config.yaml").read_text()))
    assert stored == parse_config(RunConfig, json.loads(json.dumps(two_stages(folder))))
    assert stored.stages[0].optimizer.b2 == 0.999, "defaults are written out"
    assert (output / "tokenizer" / "tokenizer.json").is_file()


def test_frozen_parts_leave_the_run_as_they_came(undisturbed):
    """The encoder is frozen in both stages: its weights are those of the seed."""
    from llaso_jax.sharding.mesh import make_mesh
    from llaso_jax.training.state import Layout, random_params

    output, _, _, params = undisturbed
    model = load_model(output / "model")[0]
    start = flatten(random_params(model, Layout.of(model, make_mesh("1x1")), 0))
    for path, leaf in params.items():
        same = np.array_equal(leaf, np.asarray(start[path]))
        assert same == path.startswith("audio_tower/"), path


def test_only_what_is_trained_is_saved(undisturbed):
    output = undisturbed[0]
    for stage, parts in (("align", {"projector"}), ("instruct", {"projector", "language_model"})):
        metadata = json.loads(
            (output / "checkpoints" / stage / "4" / "state" / "_METADATA").read_text()
        )
        saved = {
            keys[1]
            for entry in metadata["tree_metadata"].values()
            if (keys := [key["key"] for key in entry["key_metadata"]])[0] == "trainable"
        }
        assert saved == parts


# --- loss that is not finite ----------------------------------------------------------------------


def _poison(monkeypatch, *, step: int, row: int) -> None:
    place, calls = loop.place_lanes, []

    def poisoned(lanes, count, accumulation, layout):
        calls.append(1)
        if len(calls) == step:
            lanes = {0: {**lanes[0], "mel": lanes[0]["mel"].copy()}}
            lanes[0]["mel"][row, 0, 0, 0] = np.inf
        return place(lanes, count, accumulation, layout)

    monkeypatch.setattr(loop, "place_lanes", poisoned)


def test_a_loss_that_is_not_finite_names_step_and_samples_and_is_not_saved(
    folder, undisturbed, monkeypatch, sample_order, tmp_path
):
    tree = two_stages(folder)
    tree["checkpoint"]["every_steps"] = 1
    with monkeypatch.context() as patch:
        _poison(patch, step=3, row=5)
        with pytest.raises(NonFiniteLossError) as error:
            run(tree, tmp_path / "run")
    text = str(error.value)
    bad, fine = sample_order["align", 3][5], sample_order["align", 3][4]
    assert "stage 'align': loss nan" in text
    assert "in step 3, computed from the parameters after step 2" in text
    assert f"samples of the rows it came from: {', '.join(bad)}." in text
    assert not any(f" {i}," in text or f" {i}." in text for i in fine)
    saved = sorted(
        p.name for p in (tmp_path / "run/checkpoints/align").iterdir() if p.name.isdecimal()
    )
    assert saved == ["1", "2"]

    run(tree, tmp_path / "run")  # the data has been repaired
    assert losses(tmp_path / "run") == undisturbed[1]
    _assert_same_params(_tree(tmp_path / "run"), undisturbed[3])


def test_a_learning_rate_that_blows_up_stops_the_run(folder, tmp_path):
    tree = recipe(folder, stages=({"parameters": list(PROJECTOR), "max_steps": 8},))
    tree["stages"][0]["optimizer"] = {"learning_rate": 1e36, "warmup_ratio": 0.0}
    with pytest.raises(NonFiniteLossError, match=r"Lower optimizer\.learning_rate"):
        run(tree, tmp_path / "run")
    logged = records(tmp_path / "run")
    assert all(np.isfinite(r["loss"]) and np.isfinite(r["grad_norm"]) for r in logged)
    assert not [p for p in (tmp_path / "run/checkpoints/align").iterdir() if p.name.isdecimal()]
