"""With features of the frozen encoder kept, a stage gives the same losses and weights, without the encoder."""

import dataclasses
import functools
import json
import logging
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from process_setup import Processes
from reference import random_params
from training_setup import (
    EVERYTHING,
    PROJECTOR,
    PROJECTOR_AND_DECODER,
    config,
    inputs_folder,  # noqa: F401 - the fixture `folder`
    losses,
    recipe,
    records,
    run,
    shared_programs,  # noqa: F401 - the fixture `compile_once`
    write_recipe,
)

from llaso_jax.conversion import load_model
from llaso_jax.data.encoder_cache import IDENTITY_FILE
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import abstract_params, bind, flatten, unflatten
from llaso_jax.training.adapters import with_adapters
from llaso_jax.training.cache_choice import open_cache
from llaso_jax.training.optimizer import learning_rate_scales

STEPS = 12  # of 8 samples each: more than two passes over 40


def tree(folder, cache=None, *, parameters=PROJECTOR, data=None, **changes):
    stage = {
        "parameters": list(parameters),
        "max_steps": STEPS,
        "data": {
            "encoder_cache": cache and str(cache),
            "rows": 4,
            "prefetch_batches": 0,
            **(data or {}),
        },
    }
    checkpoint = {"every_steps": 3, "keep_latest": 100, "export_hf": False}
    return recipe(folder, stages=(stage,), **{"checkpoint": checkpoint, **changes})


def weights(output):
    return {p: np.asarray(leaf) for p, leaf in flatten(load_model(output / "model")[1]).items()}


def encoded(output) -> list[int]:
    """Chunks that went through the encoder, by step."""
    return [record["chunks_encoded"] for record in records(output)]


def assert_same_run(output, expected) -> None:
    assert losses(output) == losses(expected)
    theirs = weights(expected)
    for path, leaf in weights(output).items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


@pytest.fixture(scope="module")
def online(folder, tmp_path_factory):
    """Output of a run that encodes in every step."""
    output = tmp_path_factory.mktemp("online") / "run"
    run(tree(folder), output)
    assert all("chunks_encoded" not in record for record in records(output))
    return output


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory):
    """(output, folder of the cache) of the same run with one."""
    output = tmp_path_factory.mktemp("cached") / "run"
    run(tree(folder, output.parent / "cache"), output)
    return output, output.parent / "cache"


# --- the same results -----------------------------------------------------------------------------


def test_losses_and_weights_are_those_without_a_cache(online, cached):
    assert_same_run(cached[0], online)


def test_the_encoder_runs_in_the_first_pass_only(cached):
    counts = encoded(cached[0])
    assert counts[0] > 0
    assert counts[-3:] == [0] * 3
    # What is written is found two batches later: the one after was read ahead.
    assert 40 <= sum(counts) <= 40 + 2 * max(counts)


@pytest.mark.slow
def test_another_run_needs_no_encoder_at_all(folder, online, cached, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the encoder ran")

    monkeypatch.setattr("llaso_jax.training.frozen_encoder._make_encode", lambda *_: refuse)
    run(tree(folder, cached[1]), tmp_path / "run")
    assert encoded(tmp_path / "run") == [0] * STEPS
    assert_same_run(tmp_path / "run", online)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True], ids=["cache kept", "cache lost"])
def test_a_resumed_run_is_the_undisturbed_one(folder, online, cached, tmp_path, lost: bool):
    shutil.copytree(cached[0], tmp_path / "run")
    cache = tmp_path / "empty" if lost else cached[1]
    for step in (6, 9, STEPS):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "align" / str(step))
    run(tree(folder, cache), tmp_path / "run")
    again = records(tmp_path / "run")[STEPS:]
    assert [record["step"] for record in again] == list(range(4, STEPS + 1))
    assert (sum(record["chunks_encoded"] for record in again) > 0) == lost
    assert_same_run(tmp_path / "run", online)


@pytest.mark.slow
def test_a_run_may_take_up_a_cache_where_it_had_none(folder, online, tmp_path):
    shutil.copytree(online, tmp_path / "run")
    for step in (6, 9, STEPS):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "align" / str(step))
    run(tree(folder, tmp_path / "cache"), tmp_path / "run")
    assert_same_run(tmp_path / "run", online)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"), [("2x4", {"lanes": 2}), ("8x1", {"rows": 8, "lanes": 4})]
)
def test_a_mesh_gives_the_losses_it_gives_without(folder, tmp_path, mesh, changes):
    """Frozen parameters, rows and lanes are split; micro-batches are encoded one by one."""
    made = [
        tree(folder, cache, parameters=PROJECTOR_AND_DECODER, data=changes)
        for cache in (None, tmp_path / "cache")
    ]
    for number, one in enumerate(made):
        one["stages"][0] |= {"accumulation": 2 if mesh == "2x4" else 1, "max_steps": 12}
        run(one, tmp_path / str(number), mesh=mesh)
    assert encoded(tmp_path / "1")[0] > 0 == encoded(tmp_path / "1")[-1]
    assert losses(tmp_path / "1") == losses(tmp_path / "0")


@pytest.mark.slow
def test_two_processes_fill_and_read_one_cache(folder, tmp_path):
    made = tree(folder, data={"lanes": 4, "rows": 8})
    made["stages"][0]["max_steps"] = 6
    run(made, tmp_path / "alone", mesh="8x1")
    made["stages"][0]["data"]["encoder_cache"] = str(tmp_path / "cache")
    path = write_recipe(tmp_path, made)
    for name in ("first", "second"):
        with Processes(path, tmp_path / name, count=2) as processes:
            assert processes.codes() == [0, 0], processes.said()
        for (key, loss), expected in zip(
            losses(tmp_path / name).items(), losses(tmp_path / "alone").values(), strict=True
        ):
            assert loss == pytest.approx(expected, rel=1e-5), key
    assert encoded(tmp_path / "first")[0] > 0
    assert encoded(tmp_path / "second") == [0] * 6


# --- the model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(folder):
    cfg = config(tree(folder)).model
    assert cfg is not None
    return cfg, random_params(unflatten(abstract_params(cfg)))


@functools.partial(jax.jit, static_argnums=0)
def encode(cfg, params, mel, mel_frames):
    return bind(cfg, params).encode(mel, mel_frames)


@pytest.mark.parametrize("mode", ["true_length", "trimmed"])
def test_the_features_of_a_chunk_do_not_depend_on_its_batch(model, mode):
    """What a cache needs: alone in its batch, elsewhere in it, among others, bit for bit the same."""
    cfg = dataclasses.replace(model[0], audio_mode=mode)
    rng = np.random.default_rng(0)
    mel = rng.normal(size=(4, 3, 8, 50)).astype(np.float32)
    frames = rng.integers(10, 50, size=(4, 3)).astype(np.int32)
    expected = np.asarray(encode(cfg, model[1], mel, frames))
    order = rng.permutation(12)
    moved = mel.reshape(12, 8, 50)[order].reshape(mel.shape)
    lengths = frames.reshape(12)[order].reshape(4, 3)
    found = np.asarray(encode(cfg, model[1], moved, lengths))
    np.testing.assert_array_equal(found.reshape(12, 25, -1), expected.reshape(12, 25, -1)[order])
    others = rng.normal(size=mel.shape).astype(np.float32)
    others[2, 1] = mel[2, 1]
    found = np.asarray(encode(cfg, model[1], others, frames))
    np.testing.assert_array_equal(found[2, 1], expected[2, 1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["padded", "trimmed"])
def test_what_is_not_kept_of_a_chunk_is_never_heard(folder, tmp_path, mode):
    """Encoded 30 s long: the kept frames alone give the loss of all of them."""
    made = tree(folder, data={"mel_buckets": [3000], "sequence_length": 700})
    made["model"] = {**made["model"], "audio_mode": mode}
    made["model"]["audio"] = {**made["model"]["audio"], "max_source_positions": 1500}
    made["stages"][0]["max_steps"] = 2
    run(made, tmp_path / "online")
    made["stages"][0]["data"]["encoder_cache"] = str(tmp_path / "cache")
    for name in ("filling", "reading"):
        run(made, tmp_path / name)
        assert losses(tmp_path / name) == losses(tmp_path / "online")
    assert sum(encoded(tmp_path / "reading")) == 0
    sizes = {path.stat().st_size for path in (tmp_path / "cache").glob("*/*/*")}
    whole = 1500 * 16 * 4 + 4
    assert (sizes == {whole}) == (mode == "padded")
    assert max(sizes) <= whole


# --- when it is used --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parameters": EVERYTHING}, "the stage trains audio_tower/"),
        ({"data": {"spec_augment": {}}}, "data.spec_augment masks its input anew"),
        (
            {"lora": [{"pattern": "audio_tower/.*fc1", "rank": 2}]},
            "the encoder has adapters (audio_tower/layers/fc1/lora_A/weight)",
        ),
    ],
    ids=["trained", "masked", "adapted"],
)
def test_outputs_that_change_are_not_kept(folder, tmp_path, caplog, changes, told):
    def opened(cache):
        cfg = config(tree(folder, cache, **changes))
        assert cfg.model is not None
        stage, model = cfg.stages[0], with_adapters(cfg.model, cfg.lora)
        unused: Any = None
        return open_cache(
            stage,
            stage.data,
            unused,
            model=model,
            compute=ComputeConfig(),
            scales=learning_rate_scales(abstract_params(model), stage.parameters),
            loader=unused,
            identity=unused,
        )

    with pytest.raises(ConfigError, match=r"data\.encoder_cache=") as refused:
        opened(tmp_path / "cache")
    assert told in str(refused.value)
    assert not (tmp_path / "cache").exists()
    with caplog.at_level(logging.INFO):
        assert opened("auto") is None
    assert f"stage align: no encoder cache: {told}" in caplog.text
    assert opened(None) is None


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "llaso_jax" / "encoder"


@pytest.mark.slow
def test_auto_keeps_features_where_that_spares_a_pass(folder, online, tmp_path, user_cache, caplog):
    caplog.set_level(logging.INFO)
    run(tree(folder, "auto"), tmp_path / "run")
    assert f"encoder cache in {user_cache}" in caplog.text
    assert encoded(tmp_path / "run")[-1] == 0
    assert_same_run(tmp_path / "run", online)
    (identity,) = user_cache.glob(f"*/{IDENTITY_FILE}")
    assert set(json.loads(identity.read_text())) >= {"weights", "program", "device", "layout"}
    # A single pass spares nothing, unless the features are there already.
    once = tree(folder, "auto", data={"epochs": 1})
    once["stages"][0]["max_steps"] = None
    run(once, tmp_path / "once")
    assert encoded(tmp_path / "once") == [0] * len(records(tmp_path / "once"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"epochs": 1},
            "would not spare a whole pass of the encoder (about 1.0 passes over 0.00 h",
        ),
        ({"encoder_cache_gb": 1e-5}, "raise data.encoder_cache_gb, or free the disk"),
    ],
    ids=["one pass", "no room"],
)
def test_auto_does_without_where_it_does_not_pay(folder, tmp_path, user_cache, caplog, data, told):
    caplog.set_level(logging.INFO)
    made = tree(folder, "auto", data=data)
    if "epochs" in data:
        made["stages"][0]["max_steps"] = None
    run(made, tmp_path / "run")
    assert "stage align: no encoder cache: " in caplog.text
    assert told in caplog.text
    assert "chunks_encoded" not in records(tmp_path / "run")[0]
    assert not list(user_cache.glob("*/*"))
