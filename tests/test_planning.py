"""Plans: real steps compiled on CPU devices, what is said of them, and how batches and meshes are searched."""

import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from training_setup import MODEL, PROJECTOR_AND_DECODER, config, recipe

from llaso_jax import fit as fit_command
from llaso_jax import plan as plan_command
from llaso_jax.config import RunConfig, load_config
from llaso_jax.errors import ConfigError
from llaso_jax.planning import plan as planning
from llaso_jax.planning import search
from llaso_jax.planning.bounds import Bounds, step_bounds
from llaso_jax.planning.estimate import estimate
from llaso_jax.planning.fit import fits
from llaso_jax.planning.hardware import ACCELERATORS, GIB, Accelerator, find_accelerator
from llaso_jax.planning.memory import ARGUMENTS, TEMPORARIES, argument_bytes, device_bytes
from llaso_jax.planning.plan import Plan, PlanError, mesh_name, plan_on, with_batch
from llaso_jax.planning.recipe import planned_model
from llaso_jax.planning.report import comparison_text, plan_text, write_report
from llaso_jax.planning.search import largest_batch, meshes_of, plan_meshes
from llaso_jax.planning.topology import topology_devices
from llaso_jax.sharding.costs import Cost
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.rules import ShardingError
from llaso_jax.training.abstract import AbstractStep, abstract_step
from llaso_jax.training.state import Layout

DEVICE = Accelerator(
    "toy", "cpu", flops=1e11, hbm_bytes=GIB, hbm_bandwidth=1e10, link_bandwidth=1e9
)
# The parts of the step that the issue of the plan names.
KEYS = {
    *("peak_hbm_bytes", "hbm_by_owner", "flops", "collectives", "bounds"),
    *("predicted_step_seconds", "mfu_bound", "compile_seconds"),
}


def small(*, rows: int = 8, **changes) -> RunConfig:
    """A recipe whose stage trains projector and decoder; no file of it is read."""
    stage = {"parameters": list(PROJECTOR_AND_DECODER), "data": {"rows": rows}}
    return config(recipe(Path("nowhere"), stages=(stage,), **changes))


@functools.cache
def planned(mesh: str) -> Plan:
    return plan_on(make_mesh(mesh), DEVICE, small(), topology="toy:8")


def abstract(mesh: str, cfg: RunConfig | None = None, **data) -> AbstractStep:
    """The step of `small`, not compiled; `data` changes the sizes of its batches."""
    cfg = cfg or small()
    model, _ = planned_model(cfg)
    (stage,) = cfg.stages
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, **data))
    compute, frozen = cfg.precision.resolve("cpu")
    layout = Layout.of(model, make_mesh(mesh))
    return abstract_step(model, stage, layout, compute, frozen_dtype=frozen)


# --- one plan -------------------------------------------------------------------------------------


def test_a_plan_says_what_it_must_and_its_numbers_agree():
    plan = planned("4x2")
    said = json.loads(json.dumps(plan.to_json()))
    assert set(said) >= KEYS
    assert set(said["flops"]) == {"analytic", "counted"}
    assert set(said["hbm_by_owner"]) == {*ARGUMENTS, *TEMPORARIES}
    assert sum(said["hbm_by_owner"].values()) == said["peak_hbm_bytes"] > 0
    assert all(size >= 0 for size in said["hbm_by_owner"].values())
    bounds = said["bounds"]
    slowest = max(("compute", "hbm", "interconnect"), key=lambda name: bounds[f"{name}_seconds"])
    assert bounds["binding"] == slowest
    assert said["predicted_step_seconds"] >= bounds[f"{slowest}_seconds"]
    assert 0 < said["mfu_bound"] < 1
    rate = 8 * 2 / said["predicted_step_seconds"]
    assert said["samples_per_second"] == pytest.approx(rate)
    assert said["hours"]["align"] == pytest.approx(12_000_000 / rate / 3600)
    assert said["hours"]["instruct"] == pytest.approx(13_500_000 / rate / 3600)


def test_owners_hold_what_is_stored_on_a_device():
    """All weights of this model split over fsdp, and its matrices over tensor."""
    plan, alone = planned("4x2"), planned("1x1")
    for owner in ("encoder", "projector", "llm", "optimizer"):
        share = plan.hbm_by_owner[owner] / alone.hbm_by_owner[owner]
        assert 1 / 8 <= share < 1 / 2, owner
    trained = alone.hbm_by_owner["projector"] + alone.hbm_by_owner["llm"]
    assert alone.hbm_by_owner["optimizer"] - 2 * trained in (0, 4), "two moments, and a counter"
    mel = 8 * 2 * MODEL["audio"]["num_mel_bins"] * 50 * 4
    assert alone.hbm_by_owner["audio"] == mel + 8 * 2 * 4


def test_traffic_is_along_the_axes_that_split_something():
    assert planned("1x1").collectives == {}
    sent = planned("4x2").collectives
    assert set(sent) >= {"fsdp", "tensor"}
    assert "all-gather" in sent["fsdp"]


def test_flops_of_a_mesh_are_those_of_a_device_and_what_tensor_does_not_split():
    alone, split = planned("1x1"), planned("4x2")
    assert alone.analytic_flops == split.analytic_flops
    # Both devices of the tensor axis run the whole projector.
    assert 1 <= split.counted_flops / alone.counted_flops < 1.06


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "a100", "h100", "h200"])
def test_bounds_are_work_over_what_a_device_can_do(name: str):
    (device,) = (one for one in ACCELERATORS if one.name == name)
    costs = [Cost("product", 1e12, 10**9, times=3), Cost("norm", 0.0, 10**9, times=1)]
    bounds = step_bounds(costs, {"fsdp": {"all-gather": 1e9, "all-reduce": 1e9}}, device)
    assert bounds.compute == pytest.approx(3e12 / device.flops)
    assert bounds.hbm == pytest.approx(4e9 / device.hbm_bandwidth)
    assert bounds.interconnect == pytest.approx(2e9 / device.link_bandwidth)
    product = max(1e12 / device.flops, 1e9 / device.hbm_bandwidth)
    assert bounds.steps == pytest.approx(3 * product + 1e9 / device.hbm_bandwidth)
    assert bounds.seconds <= bounds.predicted


def test_which_bound_binds():
    assert Bounds(3, 2, 1, 4).binding == "compute"
    assert Bounds(1, 2, 1, 4).binding == "hbm"
    assert Bounds(1, 2, 5, 4).binding == "interconnect"
    assert (Bounds(1, 2, 5, 4).seconds, Bounds(1, 2, 5, 4).predicted) == (5, 5)
    assert (Bounds(3, 2, 1, 4).seconds, Bounds(3, 2, 1, 4).predicted) == (3, 4)


def test_accelerators_are_found_by_the_names_jax_gives_them():
    names = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "NVIDIA H100 80GB HBM3": "h100",
    }
    for kind, name in names.items():
        found = find_accelerator(kind)
        assert found is not None
        assert found.name == name
    assert find_accelerator("cpu") is None


# --- batches and meshes ---------------------------------------------------------------------------


def test_a_batch_keeps_about_the_rows_of_a_step():
    (stage,) = small().stages
    for shards, batch in ((1, 1), (2, 4), (8, 3)):
        changed = with_batch(stage, shards, batch)
        assert changed.data.rows == changed.accumulation * shards * batch
        assert abs(changed.data.rows - stage.data.rows) <= shards * batch / 2 + stage.data.rows / 2
    assert with_batch(stage, 8, None) == stage
    with pytest.raises(ConfigError, match=r"8 rows at a time.*3 parts.*--batch"):
        with_batch(stage, 3, None)
    with pytest.raises(ConfigError, match="--batch 0"):
        with_batch(stage, 1, 0)


def test_all_meshes_of_8_devices():
    meshes = list(meshes_of(8))
    assert len(set(meshes)) == len(meshes) == 7
    for mesh in meshes:
        assert math.prod(int(n) for n in re.findall(r"\d+", mesh)) == 8
    assert list(meshes_of(1)) == ["fsdp=1,tensor=1"]


def test_a_mesh_is_named_by_its_larger_axes():
    assert mesh_name({"data": 1, "fsdp": 4, "tensor": 2, "context": 1}) == "fsdp=4,tensor=2"
    assert mesh_name({"data": 1, "fsdp": 1}) == "1x1"


def of_size(rows: int, *, fixed: float, each: float) -> Plan:
    peak = int((fixed + each * rows) * GIB / 100)
    return dataclasses.replace(planned("1x1"), rows=rows, peak_hbm_bytes=peak)


@pytest.mark.parametrize(
    ("fixed", "each", "rows"), [(50, 10, 4), (50, 41, 1), (2, 1, 90), (0, 45, 2), (30, 0.5, 124)]
)
def test_the_largest_batch_is_the_last_that_fits_and_is_found_quickly(fixed, each, rows):
    tried = []

    def attempt(count: int) -> Plan:
        tried.append(count)
        if fixed + each * count > 100:
            raise PlanError("does not fit")
        return of_size(count, fixed=fixed, each=each)

    assert largest_batch(attempt).rows == rows
    assert len(tried) == len(set(tried)) <= 7


def test_a_batch_of_nothing_is_an_error():
    with pytest.raises(PlanError, match=r"one row needs 0\.95 GiB of 1\.00"):
        largest_batch(lambda rows: of_size(rows, fixed=90, each=5))


def test_more_than_a_device_has_is_an_error_where_the_compiler_lets_it_pass(monkeypatch):
    full = dataclasses.replace(planned("1x1"), peak_hbm_bytes=3 * GIB)
    monkeypatch.setattr(planning, "topology_devices", lambda name: jax.devices()[:1])
    monkeypatch.setattr(planning, "find_accelerator", lambda kind: DEVICE)
    monkeypatch.setattr(planning, "plan_on", lambda *args, **kwargs: full)
    with pytest.raises(PlanError, match=r"needs 3\.00 GiB of 1\.00"):
        planning.plan(small(), topology="toy:1", mesh="1x1")


def test_meshes_that_cannot_be_are_listed_with_their_reasons(monkeypatch):
    def attempt(recipe, *, topology, mesh, stage, batch) -> Plan:
        if mesh == "fsdp=8,tensor=1":
            raise PlanError("does not fit: Used 20G of 15.75G hbm.")
        if mesh == "4x2":
            return planned(mesh)
        return plan_on(make_mesh(mesh), DEVICE, recipe, topology=topology, stage=stage, batch=batch)

    monkeypatch.setattr(search, "plan", attempt)
    monkeypatch.setattr(search, "topology_devices", lambda name: [None] * 8)
    meshes = ["fsdp=8,tensor=1", "4x2", "fsdp=1,tensor=8", "data=8"]
    monkeypatch.setattr(search, "meshes_of", lambda n: meshes)
    cfg = small(rows=12)
    plans, refusals = plan_meshes(cfg, topology="toy:8", mesh="all")
    assert [plan.mesh for plan in plans] == ["fsdp=4,tensor=2"]
    assert refusals["fsdp=8,tensor=1"] == "does not fit: Used 20G of 15.75G hbm."
    assert "does not split evenly over the 8 devices" in refusals["fsdp=1,tensor=8"]
    assert "12 rows at a time, which do not split over 8 parts" in refusals["data=8"]
    with pytest.raises(ConfigError, match="12 rows at a time, which do not split over 8 parts"):
        plan_meshes(cfg, topology="toy:8", mesh="data=8")
    with pytest.raises(ConfigError, match="stage"):
        plan_meshes(cfg, topology="toy:8", mesh="all", stage=7)


def test_what_training_would_refuse_is_not_planned():
    """Ulysses gives every device some heads: 8 devices have too many."""
    cfg = small(sharding={"strategy": "context-ulysses"})
    heads = MODEL["text"]["num_attention_heads"]
    assert heads % 8
    with pytest.raises(ShardingError, match=f"{heads}"):
        plan_on(make_mesh("context=8"), DEVICE, cfg)


# --- the report and the programs ------------------------------------------------------------------


def test_the_report_is_one_page_that_needs_no_network(tmp_path: Path):
    plans = [planned("1x1"), planned("4x2")]
    write_report(tmp_path, plans, {"2x4": "does not fit <there>"})
    said = json.loads((tmp_path / "plan.json").read_text())
    assert said["mesh"] == "1x1"
    assert [one["mesh"] for one in said["meshes"]] == ["1x1", "fsdp=4,tensor=2", "2x4"]
    assert said["meshes"][2]["reason"] == "does not fit <there>"
    page = (tmp_path / "plan.html").read_text()
    assert "does not fit &lt;there&gt;" in page
    assert not re.search(r"(src|href)=.?(https?:|//)", page)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_text_has_every_owner_and_every_collective():
    plan = planned("4x2")
    text = plan_text(plan)
    for owner in plan.hbm_by_owner:
        assert f"  {owner} " in text
    for axis, kinds in plan.collectives.items():
        for kind in kinds:
            assert re.search(rf"^  {re.escape(axis)} +{kind} ", text, re.M)
    assert "bytes that a device sends in a step\n  none\n" in plan_text(planned("1x1"))
    assert comparison_text([plan], {"2x4": "why"}).splitlines()[-1] == "2x4: why"


def test_the_program_writes_its_report(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(search, "plan_meshes", lambda *args, **kwargs: ([planned("4x2")], {}))
    arguments = ["--topology", "toy:8", "--config", "mini", "--output", str(tmp_path)]
    assert plan_command.main(arguments) == 0
    assert "memory of a device at its peak" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"plan.json", "plan.png", "plan.html"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--topology", "h100:9"], "a node has 1 to 8 GPUs"),
        (["--topology", "h100"], "a node has 1 to 8 GPUs"),
        (["--topology", "v5e:4x2", "--config", "nothing"], "there is no recipe 'nothing'"),
        (["--topology", "nonsense:4x2"], "cannot be compiled for"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys):
    assert plan_command.main(arguments) == 1
    assert told in capsys.readouterr().err


def test_what_is_no_number_of_rows_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        plan_command.main(["--topology", "v5e:4x2", "--batch", "many"])
    assert stopped.value.code == 2
    assert "a number of rows, or auto" in capsys.readouterr().err


# --- memory that is really used -------------------------------------------------------------------

MEASURE = """
import jax, numpy as np, pathlib, sys
sys.path.insert(0, "tests")
from llaso_jax.planning.memory import peak_bytes
from test_planning import measured_step

def kib(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0])

step = measured_step()
compiled = step.compile()
predicted = peak_bytes(compiled.memory_analysis(), "cpu")
before = kib("VmRSS")
make = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype) + np.ones((), leaf.dtype), leaf.sharding)
arguments = jax.tree.map(make, step.arguments)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
jax.block_until_ready(compiled(*arguments))
print(predicted, (kib("VmHWM") - before) * 1024)
"""


def measured_step() -> AbstractStep:
    """A step with some hundred MB of weights and activations."""
    text = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    cfg = small(model={**MODEL, "text": MODEL["text"] | text})
    return abstract("1x1", cfg, sequence_length=256)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_predicted_memory_is_what_a_process_really_takes():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    predicted, taken = map(int, done.stdout.split())
    assert taken > 100 * 2**20, "too small to measure"
    assert predicted == pytest.approx(taken, rel=0.1)


# --- without a compiler ---------------------------------------------------------------------------


def test_an_estimate_counts_what_is_stored_exactly():
    step, cfg = abstract("8x1"), small()
    assert cfg.model is not None
    precision = dataclasses.replace(cfg.precision, compute="float32", frozen="float32")
    memory = estimate(cfg.model, cfg.stages[0], precision, devices=8, rows=1)
    held = argument_bytes(step)
    assert memory.weights == sum(held[part] for part in ("encoder", "projector", "llm"))
    assert memory.optimizer == pytest.approx(held["optimizer"], abs=8)
    assert memory.gradients == device_bytes(jax.tree.leaves(step.state.trainable))


def test_what_is_kept_of_a_row_is_what_jax_says():
    """layer keeps each layer's input; dots its products and attention's result and logsumexp; none all of it."""
    cfg = load_config("llaso_base_align")
    model, _ = planned_model(cfg)
    kept = {}
    for remat in ("none", "dots", "layer"):
        precision = dataclasses.replace(cfg.precision, remat=remat)
        kept[remat] = estimate(model, cfg.stages[0], precision, devices=1, rows=1).saved
    positions, text = 4096, model.text
    layers, width = text.num_hidden_layers, text.hidden_size
    heads = text.num_attention_heads
    kv = 2 * text.num_key_value_heads * text.head_width
    dots = 4 * width + kv + 2 * text.intermediate_size
    # And what encoder outputs, projector and embeddings keep, a third of it.
    assert 1 < kept["layer"] / (2 * layers * positions * width) < 1.35
    assert kept["dots"] == pytest.approx(layers * positions * (2 * dots + 4 * heads), rel=0.05)
    assert kept["none"] > 2 * kept["dots"]


COMPILED = re.findall(
    r"^\| (llaso_base_\w+) \| (\d+) x \w+(?:, fsdp)? \| (\d+) \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$",
    (Path(__file__).parents[1] / "docs" / "plan.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.slow
@pytest.mark.parametrize("row", COMPILED, ids="-".join)
def test_estimates_are_those_of_the_page_and_near_what_compilers_say(row: tuple[str, ...]):
    name, devices, rows, remat, compiled, told = row
    cfg = load_config(name)
    model, _ = planned_model(cfg)
    precision = dataclasses.replace(cfg.precision, remat=remat)
    memory = estimate(model, cfg.stages[0], precision, devices=int(devices), rows=int(rows))
    assert memory.peak / GIB == pytest.approx(float(told), abs=0.01)
    assert memory.peak / GIB == pytest.approx(float(compiled), rel=0.1)


def test_the_page_compares_estimates_with_compiled_steps():
    assert len(COMPILED) >= 5


def test_more_memory_fits_more_rows_and_too_little_tells_how_many_devices():
    cfg = small()
    none, dots, layer = [fit.rows for fit in fits(cfg, 0.1) if fit.trained == "as it says"]
    assert 0 < none <= dots <= layer
    assert all(fit.rows == 0 and fit.devices is None for fit in fits(cfg, 1e-5))


def test_the_program_answers_for_a_card(monkeypatch, capsys):
    monkeypatch.setattr("llaso_jax.config.load_config", lambda name, overrides: small())
    assert fit_command.main(["--hbm", "1", "--config", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "1 device(s) of 1 GiB" in out
    assert re.search(r"^tiny +align +as it says +layer +\d+ ", out, re.M)
    with pytest.raises(SystemExit):
        fit_command.main(["--hbm", "0"])


def test_an_unknown_slice_names_the_plugin():
    with pytest.raises(ConfigError, match="libtpu"):
        topology_devices("v0:1x1")
