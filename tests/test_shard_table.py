"""Where parameters lie: one reviewed table per recipe, and what the numbers in it mean."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llaso_jax.config import RECIPES, load_config
from llaso_jax.planning.shards import recipe_shards
from llaso_jax.shard_table import main
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.report import ShardRow, replicated_share, shard_row

GOLDEN = Path(__file__).parent / "golden"
RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SMOLLM2 = ("mini_align", "mini_instruct")  # 3 key/value heads: no 2
MESHES = dict.fromkeys(RECIPE_NAMES, "4x2") | dict.fromkeys(SMOLLM2, "8x1")


@pytest.mark.parametrize(("name", "mesh"), MESHES.items())
def test_the_layout_of_every_recipe_is_the_reviewed_one(name: str, mesh: str):
    golden = GOLDEN / f"sharding_{name}_{mesh}.txt"
    assert recipe_shards(load_config(name), mesh) == golden.read_text(), (
        f"if the change is meant: llaso shard-table --config {name} --mesh {mesh} --output {golden}"
    )


@pytest.mark.parametrize("mesh", ["8x1", "2x4", "data=2,fsdp=4", "16x2"])
def test_llaso_base_is_nearly_nowhere_twice(mesh: str):
    text = recipe_shards(load_config("llaso_base_instruct"), mesh)
    share = float(text.rsplit("held more than once: ", 1)[1].split("%")[0])
    assert share < (50.1 if mesh.startswith("data") else 2), "a data axis holds whole copies"


@pytest.mark.parametrize(
    ("spec", "layout", "copies"),
    [
        (P(), "-,-", 8),
        (P("fsdp"), "fsdp,-", 2),
        (P(None, "tensor"), "-,tensor", 4),
        (P("tensor", "fsdp"), "tensor,fsdp", 1),
        (P(("fsdp", "tensor")), "fsdp+tensor,-", 1),
    ],
)
def test_a_row_says_what_devices_really_hold(spec: P, layout: str, copies: int):
    sharding = NamedSharding(make_mesh("4x2"), spec)
    array = jax.device_put(jnp.zeros((16, 8), jnp.bfloat16), sharding)
    row = shard_row("x", array.shape, "bfloat16", 2, sharding)
    assert row == ShardRow("x", (16, 8), "bfloat16", layout, row.device_bytes, copies)
    held = [shard.data.nbytes for shard in array.addressable_shards]
    assert set(held) == {row.device_bytes}
    distinct = {str(shard.index) for shard in array.addressable_shards}
    assert len(held) / len(distinct) == copies


def test_the_replicated_share_counts_second_and_further_copies():
    whole = ShardRow("a", (8,), "float32", "-", 32, 8)
    split = ShardRow("b", (64,), "float32", "fsdp", 32, 1)
    assert replicated_share([whole]) == pytest.approx(7 / 8)
    assert replicated_share([split]) == 0
    assert replicated_share([whole, split]) == pytest.approx(7 / 16)
    assert replicated_share([]) == 0


def test_trained_parameters_are_f32_with_two_moments_and_frozen_ones_bf16(capsys):
    assert main(["--config", "llaso_base_align", "--mesh", "1x1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    dtypes = {line.split()[0]: line.split()[2] for line in lines if "/" in line.split(" ")[0]}
    assert {d for path, d in dtypes.items() if path.startswith("projector/")} == {"float32"}
    assert {d for path, d in dtypes.items() if not path.startswith("projector/")} == {"bfloat16"}
    numbers = {line.split(":")[0]: line.split(":")[1].split()[0] for line in lines if ": " in line}
    trained = int(numbers["of them trained"].replace(",", ""))
    assert trained == 4 * np.sum([1280 * 3072, 3072, 3072 * 3072, 3072])
    assert int(numbers["moments of AdamW"].replace(",", "")) == 2 * trained


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mesh", "8x3"], "does not split evenly over the 3 devices of mesh axis tensor"),
        (["--mesh", "rows=2"], "mesh axis 'rows' is unknown"),
        (["--mesh", "context=2"], "axis context has 2 devices, and strategy 'fsdp+tensor'"),
        (["--mesh", "8x1", "sharding.strategy=ddp"], "Add fsdp to sharding.strategy"),
        (["sharding.strategy=fsdp+pipeline"], "unknown part 'pipeline'"),
        (["sharding.strategi=fsdp"], "did you mean 'sharding.strategy'?"),
        (["sharding.frozen=never"], "sharding.frozen"),
        (
            ["--mesh", "tensor=4", "sharding.encoder=ddp"],
            "2 along 'kv_heads'",
        ),
        (["--mesh", "fsdp=2,fsdp=2"], "names the axis 'fsdp' twice"),
        (["--stage", "2"], "has the stages 0 to 1 (align, instruct)"),
        (["--config", "nothing"], "there is no recipe 'nothing'"),
        (["lora=[{pattern: query}]"], "decides for no linear layer"),
    ],
)
def test_what_cannot_be_is_an_error_with_its_numbers(arguments, told, capsys):
    assert main(arguments) == 1
    assert told in capsys.readouterr().err


def test_a_file_gets_the_same_table(tmp_path, capsys):
    assert main(["--mesh", "2x1", "--output", str(tmp_path / "table.txt")]) == 0
    assert main(["--mesh", "2x1"]) == 0
    assert capsys.readouterr().out == (tmp_path / "table.txt").read_text()


def test_a_strategy_decides_where_parameters_lie():
    def layouts(*overrides: str, mesh: str) -> dict[str, str]:
        lines = recipe_shards(load_config("mini", overrides), mesh).splitlines()
        return {line.split()[0]: line.split()[3] for line in lines if "/" in line.split(" ")[0]}

    encoder = "audio_tower/layers/self_attn/q_proj/weight"
    decoder = "language_model/layers/self_attn/q_proj/weight"
    both = layouts("sharding.strategy=fsdp+tensor+context-ring", mesh="fsdp=2,tensor=2,context=2")
    assert both[encoder] == both[decoder] == "-,tensor,-,fsdp+context"
    own = layouts("sharding.encoder=fsdp+chunks", mesh="fsdp=2,tensor=2")
    assert own[encoder] == "-,-,-,fsdp+context+tensor"
    assert own[decoder] == "-,tensor,-,fsdp"
    still = [
        "stages.0.parameters=[{pattern: 'audio_.*', learning_rate_scale: null}, {pattern: '.*'}]"
    ]
    copied = layouts(*still, "sharding.frozen=replicated", mesh="4x2")
    assert copied[encoder] == "-,tensor,-,-"
    assert copied[decoder] == "-,tensor,-,fsdp"
