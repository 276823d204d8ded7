"""A stage with objective ctc: it learns to read, on every mesh; what it trains, saves, hands on and refuses."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from data_corpus import byte_tokenizer
from process_setup import Processes
from tolerances import LEAF, assert_close
from training_setup import (
    HELD_OUT,
    MODEL,
    PROJECTOR,
    config,
    inputs_folder,  # noqa: F401 - the fixture `folder`
    losses,
    read_batches,
    recipe,
    records,
    run,
    shared_programs,  # noqa: F401 - the fixture `compile_once`
    trainer,
    write_recipe,
)

from llaso_jax.conversion import load_model
from llaso_jax.data.records import RecordSource
from llaso_jax.data.samples import SampleLoader
from llaso_jax.errors import ConfigError
from llaso_jax.inference.prompts import layout_of
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.ctc import align
from llaso_jax.modeling.functional import abstract_params, flatten, merge
from llaso_jax.modeling.token_ctc import CTCConfig
from llaso_jax.planning.estimate import estimate
from llaso_jax.planning.fit import fits
from llaso_jax.planning.hardware import GIB, Accelerator
from llaso_jax.planning.plan import plan_on
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.training.abstract import stage_flops
from llaso_jax.training.ctc_validation import CTCValidator, collapse, label_tokens
from llaso_jax.training.objective import BLANK, TokenCTC
from llaso_jax.training.optimizer import OptimizerConfig

# Letters of 20 ms, so that the longest answers, of 12 letters, fit the tones of 0.1 to 0.45 s nearly all.
READER = {**MODEL, "projector": {"type": "mlp2x_gelu", "stack": 1}}
LISTENS = (
    {"pattern": "(audio_tower|projector)/.*"},
    {"pattern": "language_model/.*", "learning_rate_scale": None},
)
DECODER = (
    {"pattern": "language_model/.*"},
    {"pattern": ".*", "learning_rate_scale": None},
)
CTC = {"objective": "ctc", "ctc": {"negatives": 40, "dropout": 0.1}}
SAMPLED = TokenCTC(CTCConfig(negatives=40, dropout=0.1))
WHOLE = TokenCTC(CTCConfig(negatives=40, dropout=0.0))


def reader_tree(folder, *stages, **changes):
    stages = tuple(
        {**stage, "data": {"sequence_length": 176, **stage.get("data", {})}} for stage in stages
    )
    return recipe(folder, stages=stages, model=READER, **changes)


@pytest.fixture(scope="module")
def inputs(folder):
    """(model, batches of the real pipeline)."""
    cfg = config(reader_tree(folder, {**CTC, "parameters": list(LISTENS)}))
    return cfg.model, read_batches(cfg, 3)


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_to_read_a_batch(folder, inputs):
    """The loss goes to nothing, and every sample that can be aligned is read as it is written."""
    model, batches = inputs
    train = trainer(
        model,
        rules=LISTENS,
        optimizer=OptimizerConfig(),
        objective=TokenCTC(CTCConfig(dropout=0.0)),
    )
    arrays = batches[0].arrays
    first = train(arrays)
    for _ in range(250):
        last = train(arrays, 1e-2)
    assert float(first.loss) > 3
    assert float(last.loss) < 0.05
    cfg = config(reader_tree(folder, {"data": {"eval_json": [str(folder / "corpus/train.json")]}}))
    tokenizer = byte_tokenizer()
    validate = CTCValidator(
        cfg.model,
        ComputeConfig(),
        train.layout,
        cfg.stages[0].data,
        SampleLoader(tokenizer, prompt=cfg.prompt, layout=layout_of(cfg.model)),
        tokenizer,
        max_samples=None,
        ctc=CTCConfig(),
    )
    report = validate(merge(train.state.trainable, train.frozen))
    seen = {int(name[1:]) for row in batches[0].sample_ids for name in row}
    read = {i for i, (_, said, heard) in enumerate(report.answers) if said == heard}
    assert len(seen) - int(last.unaligned) == len(seen & read) > 10
    assert 0 < report.token_error_rate < 1


@pytest.mark.slow
@pytest.mark.parametrize("rules", [PROJECTOR, LISTENS], ids=["projector", "projector and encoder"])
@pytest.mark.parametrize("mesh", ["8x1", "2x4"])
def test_losses_are_the_same_on_every_mesh(inputs, mesh, rules):
    """With sampled classes and dropout; weights sharded, the vector of blank copied."""
    model, batches = inputs
    alone = trainer(model, rules=rules, objective=SAMPLED)
    split = trainer(model, rules=rules, objective=SAMPLED, mesh=mesh)
    values = []
    for batch in batches:
        expected, metrics = alone(batch.arrays), split(batch.arrays)
        assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=LEAF)
        assert float(metrics.grad_norm) == pytest.approx(float(expected.grad_norm), rel=10 * LEAF)
        assert int(metrics.answers) == int(expected.answers)
        assert int(metrics.unaligned) == int(expected.unaligned)
        values.append(float(expected.loss))
    assert len(set(values)) == len(batches)


@pytest.mark.slow
def test_four_micro_batches_equal_one_batch(inputs):
    model, batches = inputs
    whole = trainer(model, rules=PROJECTOR, objective=WHOLE)
    split = trainer(model, rules=PROJECTOR, objective=WHOLE, accumulation=4)
    expected, actual = whole(batches[0].arrays), split(batches[0].arrays)
    assert int(actual.answers) == int(expected.answers)
    assert float(actual.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert_close(actual.row_losses.reshape(-1), expected.row_losses.reshape(-1), LEAF)
    for path, leaf in split.trained().items():
        assert_close(leaf, whole.trained()[path], LEAF, path)


def test_only_what_is_trained_moves_and_blank_with_it(inputs):
    model, batches = inputs
    train = trainer(model, rules=PROJECTOR, objective=SAMPLED)
    before = {path: leaf.copy() for path, leaf in train.trained().items()}
    frozen = {path: np.asarray(leaf).copy() for path, leaf in flatten(train.frozen).items()}
    projector = {path for path in abstract_params(model) if path.startswith("projector/")}
    assert set(before) == projector | {BLANK}
    assert not before[BLANK].any()
    for batch in batches:
        train(batch.arrays)
    for path, leaf in train.trained().items():
        assert (leaf != before[path]).any(), f"{path} did not move"
    for path, leaf in flatten(train.frozen).items():
        np.testing.assert_array_equal(np.asarray(leaf), frozen[path], err_msg=path)


@pytest.mark.slow
def test_every_step_draws_other_classes(inputs):
    model, batches = inputs
    train = trainer(model, rules=PROJECTOR, objective=WHOLE)
    values = [float(train(batches[0].arrays, 0.0).loss) for _ in range(3)]
    assert len(set(values)) == 3


# --- samples and what is read ---------------------------------------------------------------------


def test_what_frames_say_is_read_by_hand():
    blank = -1
    assert collapse([blank, 5, 5, blank, 5, 6, 6]) == [5, 5, 6]
    assert collapse([0, 0, blank, blank]) == [0]
    assert collapse([blank, blank]) == collapse([]) == []


@pytest.mark.slow
def test_reference_tokens_are_the_labels_of_the_loss(folder, inputs):
    model, batches = inputs
    cfg = config(reader_tree(folder, {}))
    loader = SampleLoader(byte_tokenizer(), prompt=cfg.prompt, layout=layout_of(model))
    source = RecordSource(cfg.stages[0].data.train_json, data_root=None, index_dir=None)
    plan = jax.tree.map(np.asarray, align(batches[0].arrays, slots=112))
    missing = 0
    for b, row in enumerate(batches[0].sample_ids):
        for segment, name in enumerate(row, 1):
            number = int(name[1:])
            expected = label_tokens(loader.load(source[number]))
            assert len(expected) == 1 + number % 12
            found = plan.labels[b][plan.label_segments[b] == segment].tolist()
            missing += not found
            assert found in ([], expected)
    assert missing == plan.unaligned.sum()
    assert missing < 8


# --- runs -----------------------------------------------------------------------------------------


def warm_up(folder, **changes):
    """4 steps of CTC of the projector, then 2 of the decoder over it; both validated."""
    data = {"eval_json": [str(folder / "corpus" / "eval.json")]}
    ctc = {**CTC, "name": "warm", "parameters": list(PROJECTOR), "data": data}
    lm = {"name": "lm", "parameters": list(DECODER), "max_steps": 2, "data": data}
    lm["evaluation"] = {"max_new_tokens": 4, "batch_rows": 4}
    checkpoint = {"every_steps": 2, "keep_latest": 100, "export_hf": True}
    return reader_tree(folder, ctc, lm, checkpoint=checkpoint, **changes)


@pytest.fixture(scope="module")
def warmed(folder):
    """The result of such a run."""
    return run(warm_up(folder), folder / "warm")


def saved_paths(output, stage: str, step: int) -> set[str]:
    metadata = json.loads(
        (output / "checkpoints" / stage / str(step) / "state" / "_METADATA").read_text()
    )
    keys = [
        [key["key"] for key in entry["key_metadata"]]
        for entry in metadata["tree_metadata"].values()
    ]
    return {"/".join(path[1:]) for path in keys if path[0] == "trainable"}


@pytest.mark.slow
def test_blank_is_in_the_checkpoints_of_its_stage_and_nowhere_else(warmed):
    assert BLANK in saved_paths(warmed.output, "warm", 4)
    assert not any("objective" in path for path in saved_paths(warmed.output, "lm", 2))
    cfg, params, *_ = load_model(warmed.model)
    assert set(flatten(params)) == set(abstract_params(cfg))
    from safetensors.numpy import load_file

    assert not [name for name in load_file(warmed.hf / "model.safetensors") if "blank" in name]


@pytest.mark.slow
def test_the_next_stage_starts_from_the_warmed_projector(folder, warmed, tmp_path):
    """Whose own training leaves the projector alone: what is exported is what CTC made of it."""
    alone = warm_up(folder)
    alone["stages"] = alone["stages"][:1]
    run(alone, tmp_path / "alone")
    after, warm = (
        flatten(load_model(output / "model")[1]) for output in (warmed.output, tmp_path / "alone")
    )
    for path, leaf in warm.items():
        same = np.array_equal(np.asarray(after[path]), np.asarray(leaf))
        assert same != path.startswith("language_model/"), path


@pytest.mark.slow
def test_a_stage_of_ctc_reports_its_own_numbers(warmed):
    train = [r for r in records(warmed.output) if r["stage"] == "warm"]
    assert [r["step"] for r in train] == [1, 2, 3, 4]
    assert all(np.isfinite(r["loss"]) for r in train)
    counted = [r["unaligned"] for r in train]
    assert counted == sorted(counted)
    assert 0 < counted[-1] < train[-1]["samples"] / 4
    assert not any("unaligned" in r for r in records(warmed.output) if r["stage"] == "lm")
    held_out = {(r["stage"], r["step"]): r for r in records(warmed.output, "eval")}
    assert list(held_out) == [("warm", 0), ("warm", 4), ("lm", 0), ("lm", 2)]
    for key, record in held_out.items():
        assert ("token_error_rate" in record) == (key[0] == "warm")
        assert set(record["tasks"]) == {"ASR", "EE", "SGC"}
    assert held_out["warm", 4]["loss"] < held_out["warm", 0]["loss"]
    # Nothing of the first stage's scores is passed off as the second's.
    assert warmed.before.token_error_rate is None
    assert warmed.before.loss == held_out["lm", 0]["loss"]
    assert len(warmed.after.answers) == HELD_OUT


@pytest.mark.slow
def test_a_resumed_run_continues_bit_for_bit(folder, warmed, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(warmed.output, output)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "lm")
    shutil.rmtree(output / "checkpoints" / "warm" / "4")
    (output / "metrics.jsonl").unlink()
    run(warm_up(folder), output)
    expected = losses(warmed.output)
    assert losses(output) == {key: expected[key] for key in list(expected)[2:]}
    counts = [[r.get("unaligned") for r in records(place)] for place in (output, warmed.output)]
    assert counts[0] == counts[1][2:]
    ours, theirs = (flatten(load_model(place / "model")[1]) for place in (output, warmed.output))
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(leaf), err_msg=path)


@pytest.mark.slow
def test_two_processes_train_and_read_as_one(folder, warmed, tmp_path):
    tree = warm_up(folder)
    tree["stages"][0]["data"]["lanes"] = 2
    one, two = tmp_path / "one", tmp_path / "two"
    run(tree, one, mesh="1x1")
    with Processes(write_recipe(tmp_path, tree), two, count=2, mesh="8x1") as processes:
        assert processes.codes() == [0, 0], processes.said()
    assert losses(two) == pytest.approx(losses(one), rel=10 * LEAF)
    for ours, theirs in zip(records(two, "eval"), records(one, "eval"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=10 * LEAF)
        assert ours.get("token_error_rate") == theirs.get("token_error_rate")


# --- settings and plans ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"ctc": {"negatives": 7}}, "settings under 'ctc', which objective: lm does not read"),
        ({**CTC, "loss": {"z_loss": 0.1}}, "settings under 'loss', which objective: ctc"),
        ({"objective": "ctc", "ctc": {"scale": -1.0}}, "scale=-1.0 must be positive"),
        ({"objective": "rnnt"}, "objective"),
    ],
)
def test_settings_of_the_other_objective_are_refused(folder, stage, told):
    with pytest.raises(ConfigError, match=told):
        config(reader_tree(folder, stage))


def test_training_what_is_never_run_is_refused_before_anything_is_read(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"train language_model/.* objective: ctc never runs"):
        run(reader_tree(folder, CTC), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_stage_of_ctc_can_be_planned(folder):
    cfg = config(reader_tree(folder, {**CTC, "parameters": list(PROJECTOR)}))
    device = Accelerator(
        "toy", "cpu", flops=1e11, hbm_bytes=GIB, hbm_bandwidth=1e10, link_bandwidth=1e9
    )
    plan = plan_on(make_mesh("2x1"), device, cfg, topology="toy:2")
    assert sum(plan.hbm_by_owner.values()) == plan.peak_hbm_bytes
    assert all(size >= 0 for size in plan.hbm_by_owner.values())
    decoder = sum(
        info.size
        for path, info in abstract_params(cfg.model).items()
        if path.startswith("language_model/")
    )
    assert plan.hbm_by_owner["llm"] >= 4 * decoder / 2, "it is not run, but it is there"
    assert 0.5 < plan.counted_flops / plan.analytic_flops < 1.5
    lm = dataclasses.replace(cfg.stages[0], objective="lm", ctc=CTCConfig())
    assert stage_flops(cfg.model, cfg.stages[0]) < stage_flops(cfg.model, lm)


@pytest.mark.slow
def test_what_fits_is_told_of_a_stage_of_ctc_too(folder):
    cfg = config(
        reader_tree(folder, {**CTC, "parameters": list(PROJECTOR)}, {"parameters": list(PROJECTOR)})
    )
    found = list(fits(cfg, 8.0))
    assert [(fit.stage, fit.trained) for fit in found[::3]] == [
        ("align", "as it says"),
        ("instruct", "as it says"),
        ("instruct", "projector, LoRA 16"),
    ]
    assert all(fit.rows > 0 for fit in found)
    ctc, lm = (
        estimate(cfg.model, stage, cfg.precision, devices=1, rows=4).saved for stage in cfg.stages
    )
    assert ctc > 0
    assert lm > 0
