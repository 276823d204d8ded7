"""The recipes in configs/: they parse, they train what they say, and LLaSO-Base's are the published ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llaso_jax.config import RECIPES, RunConfig, load_config, resolve_path
from llaso_jax.data.config import DataConfig
from llaso_jax.inference.prompts import layout_of
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.frames import CHUNK_MEL_FRAMES, audio_slots
from llaso_jax.modeling.functional import abstract_params
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.training.abstract import abstract_step
from llaso_jax.training.optimizer import OptimizerConfig, learning_rate_scales
from llaso_jax.training.state import Layout

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
OF_ONE_DEVICE = ("mini_align", "mini_instruct")  # batches of two CPU cores, too small to split
LLASO_BASE = tuple(name for name in NAMES if name.startswith("llaso_base"))

# Llama-3.2's 128,256 tokens and the five of LLaSO.
BASE = dataclasses.replace(
    SpeechLMConfig(), text=dataclasses.replace(SpeechLMConfig().text, vocab_size=128_261)
)
PROJECTOR = 1280 * 3072 + 3072 + 3072 * 3072 + 3072
POSITION_TABLE = 1500 * 1280
ENCODER = 636_968_960  # Whisper-large-v3's, its table of positions included
DECODER = 3_863_109_632 - ENCODER - PROJECTOR


def model_of(recipe: RunConfig) -> SpeechLMConfig:
    return recipe.model or BASE


def published(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(
        schedule="cosine",
        final_ratio=0.0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        **changes,
    )


def test_the_recipes_of_both_stages_are_there():
    assert set(NAMES) >= {
        "mini",
        "llaso_base_align",
        "llaso_base_instruct",
        "llaso_base_instruct_unfrozen",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_parses_and_is_named_like_its_file(name: str):
    recipe = load_config(name)
    assert recipe.name == name
    assert len(recipe.description) > 80, "a recipe says what it is and what result to expect"


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_a_recipe_suit_its_model(name: str):
    recipe = load_config(name)
    for stage in recipe.stages:
        layout = layout_of(model_of(recipe))
        stage.data.check(layout)
        longest = audio_slots(stage.data.mel_buckets[-1], mode=layout.mode, stack=layout.stack)
        assert longest < stage.data.sequence_length, "not even one chunk of audio fits a row"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_ONE_DEVICE])
def test_micro_batches_of_a_recipe_split_over_8_devices(name: str):
    for stage in load_config(name).stages:
        assert (stage.data.rows // stage.accumulation) % 8 == 0


@pytest.mark.parametrize("name", NAMES)
def test_packaged_files_of_a_recipe_are_there(name: str):
    recipe = load_config(name)
    files = [recipe.tokenizer, recipe.weights or ""]
    files += [file for stage in recipe.stages for file in stage.data.train_json]
    files += [file for stage in recipe.stages for file in stage.data.eval_json]
    for file in files:
        if file.startswith("package:"):
            assert resolve_path(file).exists(), file
        else:
            assert not file.startswith(("/", "~")), f"{file} is of one machine"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("llaso_base_align", [PROJECTOR]),
        ("llaso_base_instruct", [PROJECTOR + DECODER]),
        ("llaso_base_instruct_unfrozen", [PROJECTOR + DECODER + ENCODER - POSITION_TABLE]),
    ],
)
def test_llaso_base_trains_exactly_the_published_parts(name: str, counts: list[int]):
    assert trained_counts(load_config(name)) == counts


def test_mini_trains_every_part_in_both_stages():
    recipe = load_config("mini")
    total = sum(info.size for info in abstract_params(model_of(recipe)).values())
    assert trained_counts(recipe) == [total, total]
    assert total <= 10_000_000


def trained_counts(recipe: RunConfig) -> list[int]:
    infos = abstract_params(model_of(recipe))
    counts = []
    for stage in recipe.stages:
        scales = learning_rate_scales(infos, stage.parameters)
        assert set(scales.values()) <= {1.0, None}
        counts.append(sum(infos[path].size for path in infos if scales[path] is not None))
    return counts


def test_align_has_the_published_hyper_parameters():
    recipe = load_config("llaso_base_align")
    (stage,) = recipe.stages
    assert stage.optimizer == published(learning_rate=1e-3, warmup_ratio=0.0015)
    assert (stage.data.epochs, stage.max_steps) == (1, None)
    assert stage.accumulation == 32
    # 2 samples per device x 32 accumulation x 8 devices.
    assert stage.data.rows * full_chunks_per_row(stage.data) == 2 * 32 * 8
    assert recipe.precision.compute == "auto"


@pytest.mark.parametrize("name", ["llaso_base_instruct", "llaso_base_instruct_unfrozen"])
def test_instruct_has_the_published_hyper_parameters(name: str):
    recipe = load_config(name)
    (stage,) = recipe.stages
    assert stage.optimizer == published(learning_rate=3e-5, warmup_ratio=0.01)
    assert (stage.data.epochs, stage.max_steps) == (1, None)
    # 1 sample per device x 32 accumulation x 8 devices.
    assert stage.data.rows * full_chunks_per_row(stage.data) == 1 * 32 * 8
    assert recipe.precision.remat == "layer"  # published with gradient checkpointing


def full_chunks_per_row(data: DataConfig) -> int:
    """30 s samples that share a row, with 200 tokens of text each."""
    slots = audio_slots(CHUNK_MEL_FRAMES, mode="padded")
    assert slots == 1500
    return min(data.chunks_per_row, data.sequence_length // (slots + 200))


def test_the_longest_prompt_with_one_chunk_fits_a_row_of_instruct():
    recipe = load_config("llaso_base_instruct")
    (stage,) = recipe.stages
    slots = audio_slots(CHUNK_MEL_FRAMES, mode="padded")
    assert recipe.prompt.model_max_length + slots <= stage.data.sequence_length


def test_instruct_starts_where_align_ends():
    align = load_config("llaso_base_align")
    for name in ("llaso_base_instruct", "llaso_base_instruct_unfrozen"):
        recipe = load_config(name)
        assert recipe.weights == f"runs/{align.name}/model"
        assert recipe.tokenizer == f"runs/{align.name}/tokenizer"


def test_unfrozen_differs_from_instruct_in_the_trained_parts_only():
    frozen = load_config("llaso_base_instruct")
    unfrozen = load_config("llaso_base_instruct_unfrozen")
    changed = {
        field.name
        for field in dataclasses.fields(frozen)
        if getattr(frozen, field.name) != getattr(unfrozen, field.name)
    }
    assert changed == {"name", "description", "stages"}
    (a,), (b,) = frozen.stages, unfrozen.stages
    assert dataclasses.replace(a, parameters=b.parameters) == b


@pytest.mark.parametrize("name", LLASO_BASE)
@pytest.mark.parametrize("mesh", ["8x1", pytest.param("2x1", marks=pytest.mark.slow)])
def test_a_step_of_llaso_base_traces_without_memory(name: str, mesh: str):
    """The whole step at its real shapes: gradients of the trainable tree only, state in, state out."""
    recipe = load_config(name)
    (stage,) = recipe.stages
    # Two micro-batches of the recipe's size: each is traced anew.
    data = dataclasses.replace(stage.data, rows=2 * stage.data.rows // stage.accumulation)
    stage = dataclasses.replace(stage, data=data, accumulation=2)
    layout = Layout.of(BASE, make_mesh(mesh, devices=jax.devices()[: int(mesh[0])]))
    compute = ComputeConfig(dtype="bfloat16", remat=recipe.precision.remat)
    step, arguments = abstract_step(BASE, stage, layout, compute)
    state = arguments[0]

    after, metrics = jax.eval_shape(step, *arguments)

    assert shapes(after) == shapes(state)
    assert metrics.loss.shape == ()
    assert metrics.loss.dtype == jnp.float32
    assert metrics.row_losses.shape == (
        stage.accumulation,
        stage.data.rows // stage.accumulation,
    )
    # Two moments per trained parameter and nothing for frozen ones.
    moments = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.trainable))


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
