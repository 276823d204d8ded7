"""A recipe that adds adapters to finished weights: what is trained, saved, resumed and exported."""

import dataclasses
import json

import numpy as np
import pytest
from reference import jit
from training_setup import (
    MODEL,
    PROJECTOR,
    inputs_folder,  # noqa: F401 - the fixture `folder`
    losses,
    recipe,
    run,
    shared_programs,  # noqa: F401 - the fixture `compile_once`
)

from llaso_jax.config import RunConfig, parse_config
from llaso_jax.conversion import load_model, read_info
from llaso_jax.errors import ConfigError, InterruptedRunError
from llaso_jax.inference.pretrained import load_pretrained
from llaso_jax.modeling.functional import bind, flatten
from llaso_jax.modeling.lora import LoraRule
from llaso_jax.training import loop
from llaso_jax.training.run import model_config

LORA = [
    {"pattern": "language_model/layers/self_attn/[qv]_proj", "rank": 2, "dropout": 0.3},
    {"pattern": "audio_tower/layers/fc1", "rank": 3, "alpha": 6.0},
]
STAGE = {
    "parameters": [
        {"pattern": ".*/lora_[AB]/weight"},
        {"pattern": ".*", "learning_rate_scale": None},
    ]
}


@pytest.fixture(scope="module", autouse=True)
def _base(folder, compile_once):
    """In base/ a run whose weights the adapters are added to."""
    run(recipe(folder, stages=({"parameters": list(PROJECTOR), "max_steps": 1},)), folder / "base")


def adapted(folder, **changes):
    weights = str(folder / "base" / "model")
    return recipe(folder, stages=(STAGE,), model=None, weights=weights, lora=LORA, **changes)


@pytest.fixture(scope="module")
def finished(folder):
    """Output of a run that trains the adapters and exports a LLaSO folder."""
    checkpoint = {"every_steps": 2, "keep_latest": 100, "export_hf": True}
    run(adapted(folder, checkpoint=checkpoint), folder / "lora")
    return folder / "lora"


def test_adapters_learn_beside_weights_that_stay_bit_identical(folder, finished):
    assert read_info(finished / "model").cfg.lora == tuple(LoraRule(**rule) for rule in LORA)
    base = flatten(load_model(folder / "base" / "model")[1])
    after = flatten(load_model(finished / "model")[1])
    for path, leaf in base.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    added = after.keys() - base.keys()
    assert len(added) == 2 * 3
    assert all(np.abs(after[path]).max() > 0 for path in added), "lora_B has left zero"


def test_the_exported_folder_has_them_merged_and_answers_the_same(finished, tmp_path):
    ours, merged = load_pretrained(finished / "model"), load_pretrained(finished / "hf")
    assert ours[0].lora
    assert not merged[0].lora
    tokens = np.arange(1, 40)[None]
    batch = {
        "tokens": tokens,
        "audio_slot": np.full_like(tokens, -1),
        "positions": tokens - 1,
        "segment_ids": np.ones_like(tokens),
        "answer_index": tokens - 1,
    }
    logits = [
        np.asarray(jit(lambda p, cfg=cfg: bind(cfg, p).answer_logits(batch))(params))
        for cfg, params, _ in (ours, merged)
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.slow
def test_a_resumed_run_drops_the_same_inputs(folder, finished, monkeypatch):
    """Stopped by a signal after two steps and continued, on another mesh: the losses of the undisturbed run."""
    save = loop.StageRun._save

    def stop(self, checkpoints):
        save(self, checkpoints)
        checkpoints.wait()
        if self.step == 2:
            raise InterruptedRunError("stopped here")

    tree = adapted(folder, checkpoint={"every_steps": 2, "keep_latest": 100, "export_hf": False})
    monkeypatch.setattr(loop.StageRun, "_save", stop)
    with pytest.raises(InterruptedRunError):
        run(tree, folder / "again")
    monkeypatch.setattr(loop.StageRun, "_save", save)
    run(tree, folder / "again", mesh="4x2")
    expected = losses(finished)
    assert losses(folder / "again") == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 4


def test_other_adapters_than_the_weights_have_are_refused(finished, folder, tmp_path):
    tree = adapted(folder) | {"weights": str(finished / "model"), "lora": [{"pattern": ".*/fc2"}]}
    with pytest.raises(ConfigError, match=r"differs from the adapters.*\[qv\]_proj"):
        run(tree, tmp_path / "out")


@pytest.mark.parametrize("named", [(), ("model",), ("lora",), ("model", "lora")])
def test_a_recipe_for_a_model_with_adapters_may_name_what_it_has(finished, folder, named):
    given = {"model": None, "lora": []} | {
        name: value for name, value in (("model", MODEL), ("lora", LORA)) if name in named
    }
    tree = recipe(folder, weights=str(finished / "model"), **given)
    cfg = parse_config(RunConfig, json.loads(json.dumps(tree)))
    assert model_config(cfg) == read_info(finished / "model").cfg
    other = dataclasses.replace(model_config(cfg), audio_mode="padded")
    assert other != model_config(cfg)
    with pytest.raises(ConfigError, match="differs from the architecture"):
        model_config(dataclasses.replace(cfg, model=other))


def test_a_pattern_without_a_linear_layer_is_an_error_of_the_recipe(folder, tmp_path):
    tree = adapted(folder) | {"lora": [{"pattern": "language_model/query"}]}
    with pytest.raises(ConfigError, match=r"lora.*language_model/query"):
        run(tree, tmp_path / "out")


@pytest.mark.slow
def test_smoothing_and_z_loss_of_the_recipe_change_what_is_minimized(folder, tmp_path):
    plain = recipe(folder, stages=({"max_steps": 1},))
    values = {}
    for name, loss in {"plain": {}, "both": {"label_smoothing": 0.1, "z_loss": 0.01}}.items():
        plain["stages"][0]["loss"] = loss
        run(plain, tmp_path / name)
        values[name] = losses(tmp_path / name)["align", 1]
    # Random logits of unit variance: smoothing changes little, and z-loss adds w * (log 264 + 1/2)^2.
    expected = 0.01 * (np.log(264) + 0.5) ** 2
    assert values["both"] - values["plain"] == pytest.approx(expected, rel=0.1)
