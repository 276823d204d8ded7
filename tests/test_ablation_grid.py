"""Points of a sweep: which combinations, which field a short name means, and what a mistake is told."""

import pytest

from llaso_jax.ablation.grid import Point, find_field, grid, sharding_axis, swept_axis
from llaso_jax.config import load_config
from llaso_jax.errors import ConfigError
from llaso_jax.sharding.strategies import plans

MINI = load_config("mini")


# --- axes -----------------------------------------------------------------------------------------


def test_sharding_tries_every_plan_of_the_devices_whole_copies_first():
    axis = sharding_axis(8)
    assert axis[0] == {"mesh": "data=8", "sharding.strategy": "ddp"}
    tried = {(turn["sharding.strategy"], turn["mesh"]) for turn in axis}
    assert tried == set(plans(8))
    assert len(tried) == len(axis)
    for point in grid([axis], mesh="1x1"):
        assert point.config(MINI).sharding.strategy == dict(point.settings)["sharding.strategy"]


def test_axes_are_combined_and_the_last_changes_fastest():
    axes = [
        swept_axis(["remat=none,dots"], MINI, 0),
        swept_axis(["mesh=8x1,'data=2,fsdp=4'"], MINI, 0),
    ]
    assert grid(axes, mesh="1x1") == [
        Point("8x1", (("precision.remat", "none"),)),
        Point("data=2,fsdp=4", (("precision.remat", "none"),)),
        Point("8x1", (("precision.remat", "dots"),)),
        Point("data=2,fsdp=4", (("precision.remat", "dots"),)),
    ]


def test_points_lie_on_the_mesh_given_where_none_is_swept():
    points = grid([swept_axis(["remat=none,dots"], MINI, 0)], mesh="4x2")
    assert [point.mesh for point in points] == ["4x2", "4x2"]


def test_fields_of_one_axis_move_together_and_a_single_value_stays():
    words = [
        "audio_mode=true_length,padded",
        "mel_buckets=[104, 160],[3000]",
        "stages.0.data.rows=16",
    ]
    assert swept_axis(words, MINI, 0) == [
        {
            "model.audio_mode": "true_length",
            "stages.0.data.mel_buckets": "[104, 160]",
            "stages.0.data.rows": "16",
        },
        {
            "model.audio_mode": "padded",
            "stages.0.data.mel_buckets": "[3000]",
            "stages.0.data.rows": "16",
        },
    ]


def test_a_point_is_the_recipe_with_its_settings():
    (first, second) = grid([swept_axis(["learning_rate=1e-3,5e-4"], MINI, 1)], mesh="1x1")
    assert first.config(MINI) == MINI
    changed = second.config(MINI)
    assert changed.stages[1].optimizer.learning_rate == 5e-4
    assert changed.stages[0] == MINI.stages[0]


def test_a_value_that_cannot_work_is_told_when_its_point_is_made():
    (point,) = grid([swept_axis(["rows=0"], MINI, 0)], mesh="1x1")
    with pytest.raises(ConfigError, match="`rows` is 0"):
        point.config(MINI)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage", "field"),
    [
        ("remat", 0, "precision.remat"),
        ("precision.remat", 0, "precision.remat"),
        ("audio_mode", 0, "model.audio_mode"),
        ("rows", 1, "stages.1.data.rows"),
        ("data.rows", 0, "stages.0.data.rows"),
        ("stages.1.data.rows", 1, "stages.1.data.rows"),
        ("data.seed", 0, "stages.0.data.seed"),
        ("seed", 0, "seed"),  # a whole path, though others end so
        ("optimizer", 0, "stages.0.optimizer"),
        ("parameters.0.pattern", 0, "stages.0.parameters.0.pattern"),
        ("lora", 0, "lora"),
    ],
)
def test_a_name_means_the_field_whose_path_ends_so(name: str, stage: int, field: str):
    assert find_field(name, MINI, stage) == field


def test_a_path_that_is_not_there_is_taken_for_its_last_word_and_said_so(caplog):
    caplog.set_level("INFO", logger="llaso_jax.ablation")
    assert find_field("data.audio_mode", MINI, 0) == "model.audio_mode"
    assert "data.audio_mode is taken for model.audio_mode" in caplog.text


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("every_steps", ["checkpoint.every_steps", "logging.every_steps", "stages.0.evaluation"]),
        ("remmat", ["did you mean precision.remat?"]),
        ("nothing_like_it", ["no such field"]),
    ],
)
def test_a_name_that_means_no_field_or_several_is_an_error_with_the_candidates(name, told):
    with pytest.raises(ConfigError) as refused:
        find_field(name, MINI, 0)
    for part in told:
        assert part in str(refused.value)


def test_fields_of_other_stages_are_no_candidates():
    with pytest.raises(ConfigError, match=r"in stage 0; did you mean stages\.0\.data\.rows"):
        find_field("stages.1.data.rows", MINI, 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["remat"], "write field=value,value"),
        (["remat="], "write field=value,value"),
        (["remat=[none"], "not valid YAML"),
        (["remat=none,dots", "rows=8,16,32"], "rows has 3 values|remat has 2 values"),
        (["remat=none", "precision.remat=dots"], "precision.remat is there twice"),
    ],
)
def test_a_sweep_that_is_not_understood_is_an_error(words: list[str], told: str):
    with pytest.raises(ConfigError, match=told):
        swept_axis(words, MINI, 0)


def test_a_field_in_two_axes_is_an_error():
    axis = swept_axis(["remat=none,dots"], MINI, 0)
    with pytest.raises(ConfigError, match=r"two axes of the sweep set precision\.remat"):
        grid([axis, axis], mesh="1x1")
