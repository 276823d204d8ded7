"""One validated configuration from YAML and overrides, and what a mistake in either is told."""

import dataclasses
import re
import typing

import pytest

from llaso_jax.config import (
    RECIPES,
    RunConfig,
    apply_override,
    find_recipe,
    load_config,
    parse_config,
    resolve_data,
    resolve_path,
    to_tree,
    to_yaml,
)
from llaso_jax.data.config import DataConfig
from llaso_jax.errors import ConfigError

RATE = "stages.0.optimizer.learning_rate"


def nested_dataclasses(kind: typing.Any) -> set[type]:
    """`kind` and every dataclass its fields can hold."""
    if not dataclasses.is_dataclass(kind):
        return set().union(*(nested_dataclasses(arg) for arg in typing.get_args(kind)))
    assert isinstance(kind, type)
    hints = typing.get_type_hints(kind)
    inner = (nested_dataclasses(hints[field.name]) for field in dataclasses.fields(kind))
    return {kind}.union(*inner)


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config("mini", overrides)
    return str(refused.value)


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sead=1", "unknown key 'sead': did you mean 'seed'?"),
        ("precision.rematt=layer", "did you mean 'precision.remat'?"),
        ("stages.1.data.packingg=false", "did you mean 'stages.1.data.packing'?"),
        ("stages.0.optimizer.lr=1", "unknown key 'stages.0.optimizer.lr'"),
        ("model.text.vocab=9", "did you mean 'model.text.vocab_size'?"),
        ("stages.0.parameters.0.patern=x", "did you mean 'stages.0.parameters.0.pattern'?"),
    ],
)
def test_an_unknown_key_is_told_the_nearest_one(override: str, told: str):
    assert told in message(override)


def test_an_unknown_key_is_told_all_keys_of_its_place():
    told = message("checkpoint.x=1")
    for field in dataclasses.fields(load_config("mini").checkpoint):
        assert field.name in told


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "where", "given"),
    [
        ("seed=tomorrow", "seed", "'tomorrow'"),
        (f"{RATE}=fast", RATE, "'fast'"),
        ("stages.0.data.rows=[1]", "stages.0.data.rows", "[1]"),
        ("stages.0.data.rows=1.5", "stages.0.data.rows", "1.5"),
        ("stages.0.data.packing=maybe", "stages.0.data.packing", "'maybe'"),
        ("precision.remat=some", "precision.remat", "'some'"),
        ("model.audio_mode=loud", "model.audio_mode", "'loud'"),
        ("stages=3", "stages", "3"),
    ],
)
def test_a_value_of_a_wrong_type_names_its_key_and_itself(override: str, where: str, given: str):
    told = message(override)
    assert where in told
    assert f"(given: {given})" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (f"{RATE}=-1", "learning_rate=-1.0 must be positive"),
        ("stages.0.optimizer.warmup_ratio=2", "warmup_ratio=2.0 must lie in 0..1"),
        (
            "stages.0.data.rows=16 stages.0.accumulation=3",
            "data.rows=16 is not a multiple of accumulation=3",
        ),
        ("stages.0.max_steps=0", "max_steps=0 must be at least 1"),
        ("stages.0.max_steps=null stages.0.data.epochs=null", "never ends: set max_steps or"),
        ("stages.0.data.rows=0", "`rows` is 0; a number above 0 is needed"),
        ("stages.0.data.mel_buckets=[200,100]", "rising numbers from 1 to 3000 are needed"),
        ("stages.0.name=a/b", "must be a folder name"),
        ("stages.1.name=align", "stage names must differ"),
        ("stages=[]", "at least one entry under 'stages'"),
        ("checkpoint.keep_latest=0", "keep_latest must be at least 1"),
        ("logging.every_steps=0", "logging.every_steps=0"),
        ("stages.0.evaluation.every_steps=-1", "must not be negative"),
        ("stages.0.evaluation.batch_rows=0", "evaluation.batch_rows=0 must be at least 1"),
        ("stages.0.parameters.0.pattern=(", "is not a regular expression"),
        ("stages.0.parameters.0.learning_rate_scale=0", "use null to freeze"),
        ("model=null", "give 'weights'"),
        ("model.projector.type=big", "projector type 'big' is unknown"),
        ("prompt.model_max_length=0", "model_max_length is 0"),
    ],
)
def test_a_refused_value_is_told_why(override: str, told: str):
    assert told in message(*override.split())


def test_every_wrong_value_is_listed_at_once():
    told = message("seed=x", "stages.0.data.rows=y")
    assert len(told.splitlines()) == 2


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("+2.e4", 2e4), ("5e-4", 5e-4), ("0.25", 0.25), ("3", 3.0)],
)
def test_numbers_are_read_as_people_write_them(text: str, value: float):
    rate = load_config("mini", [f"{RATE}={text}"]).stages[0].optimizer.learning_rate
    assert isinstance(rate, float)
    assert rate == value


def test_overrides_reach_nested_fields_list_entries_lists_and_null():
    cfg = load_config(
        "mini",
        [
            "stages.1.parameters.0.learning_rate_scale=0.5",
            "stages.0.data.mel_buckets=[120, 160]",
            "stages.0.data.max_audio_seconds=null",
            "stages.1.evaluation.every_steps=7",
            "checkpoint.export_hf=false",
            "name=other",
        ],
    )
    assert cfg.stages[1].parameters[0].learning_rate_scale == 0.5
    assert cfg.stages[0].data.mel_buckets == (120, 160)
    assert cfg.stages[0].data.max_audio_seconds is None
    assert cfg.stages[1].evaluation.every_steps == 7
    assert cfg.checkpoint.export_hf is False
    assert cfg.name == "other"


def test_an_override_of_one_stage_leaves_the_other():
    """mini's stages share their `data` through a YAML anchor."""
    before, after = load_config("mini"), load_config("mini", ["stages.0.data.rows=32"])
    assert after.stages[0].data.rows == 32 != before.stages[0].data.rows
    assert after.stages[1] == before.stages[1]


def test_an_override_makes_sections_the_recipe_leaves_out():
    assert load_config("mini", ["logging.every_steps=3"]).logging.every_steps == 3


def test_a_later_override_wins():
    assert load_config("mini", ["seed=1", "seed=2"]).seed == 2


def test_a_value_may_hold_equal_signs():
    assert load_config("mini", ["description='a=b'"]).description == "a=b"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "write any.field=value"),
        ("seed.x=1", "'seed' holds the value 0, it has no fields"),
        ("stages.2.name=x", "'2' must be an index below 2"),
        ("stages.first.name=x", "'first' must be an index below 2"),
        ("stages.-1.name=x", "'-1' must be an index below 2"),
        ("stages.5=x", "'5' must be an index below 2"),
    ],
)
def test_an_override_that_leads_nowhere_is_told_why(override: str, told: str):
    tree = {"seed": 0, "stages": [{"name": "a"}, {"name": "b"}]}
    with pytest.raises(ConfigError, match=re.escape(told)):
        apply_override(tree, override)


def test_an_override_that_is_not_yaml_is_a_config_error():
    assert "stages.0.data.mel_buckets=[1" in message("stages.0.data.mel_buckets=[1")


# --- files ----------------------------------------------------------------------------------------


def test_a_missing_recipe_is_told_all_there_are():
    with pytest.raises(ConfigError) as refused:
        find_recipe("mimi")
    assert "'mimi'" in str(refused.value)
    for path in RECIPES.glob("*.yaml"):
        assert path.stem in str(refused.value)


def test_a_recipe_may_be_a_file_anywhere(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(load_config("mini", ["seed=5"])), encoding="utf-8")
    assert load_config(str(path)).seed == 5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [", "is not valid YAML"),
        ("- a\n- b\n", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("just words", "must hold keys and values"),
        ("name: x\ntokenizer: y\n", "stages"),
        ("tokenizer: !!python/object:os.system x\n", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_told_its_name_and_fault(tmp_path, text: str, told: str):
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(told)) as refused:
        load_config(str(path))
    if told != "stages":
        assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_resolved_configuration_reads_back_the_same(name: str, tmp_path):
    cfg = load_config(name, ["seed=3", f"{RATE}=1e-7"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(cfg), encoding="utf-8")
    assert load_config(str(path)) == cfg
    assert parse_config(RunConfig, to_tree(cfg)) == cfg


def test_a_resolved_configuration_states_every_field():
    def check(kind: typing.Any, tree: typing.Any) -> None:
        assert set(tree) == {field.name for field in dataclasses.fields(kind)}

    tree = to_tree(load_config("mini"))
    check(RunConfig, tree)
    check(DataConfig, tree["stages"][0]["data"])


def test_package_paths_lie_inside_the_package():
    path = resolve_path("package:data/mini/eval.json")
    assert path.is_file()
    assert path.is_absolute()
    assert str(resolve_path("some/where.json")) == "some/where.json"


def test_offsets_of_packaged_files_are_kept_in_the_run(tmp_path):
    data = DataConfig(train_json=("package:data/mini/align_train.json",))
    resolved = resolve_data(data, index_dir=tmp_path)
    assert resolved.index_dir == str(tmp_path)
    assert not resolved.train_json[0].startswith("package:")
    elsewhere = DataConfig(train_json=("a.json",))
    assert resolve_data(elsewhere, index_dir=tmp_path) == elsewhere


# --- documentation --------------------------------------------------------------------------------


def test_the_walk_finds_every_section():
    names = {kind.__name__ for kind in nested_dataclasses(RunConfig)}
    assert names >= {"RunConfig", "StageConfig", "DataConfig", "ParameterRule", "RopeScaling"}


@pytest.mark.parametrize(
    "kind", sorted(nested_dataclasses(RunConfig), key=lambda kind: kind.__name__)
)
def test_a_section_is_frozen_hashable_and_documented(kind: type):
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    text = kind.__doc__ or ""
    assert not text.startswith(f"{kind.__name__}("), "the docstring is dataclass's own"
    assert text.strip(), kind


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in sorted(nested_dataclasses(RunConfig), key=lambda kind: kind.__name__)
        if not kind.__module__.startswith("llaso_jax.modeling")
    ],
)
def test_every_setting_of_a_recipe_is_documented(kind: type):
    text = kind.__doc__ or ""
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if not re.search(rf"\b{field.name}\b[^:\n]*:", text)
    ]
    assert not missing, f"{kind.__name__} does not document {missing}"
