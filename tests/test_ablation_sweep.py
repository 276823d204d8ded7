"""A sweep: rows of measurements and of errors, what is done again after a kill, the report, the winner."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_setup import config, recipe, records, run, write_inputs, write_recipe

from llaso_jax.ablate import main
from llaso_jax.ablation import report, sweep
from llaso_jax.ablation.grid import Point
from llaso_jax.ablation.results import rank
from llaso_jax.ablation.sweep import Row, Sweep, read_rows, run_sweep
from llaso_jax.ablation.trial import Measured
from llaso_jax.config import load_config, to_tree
from llaso_jax.errors import CheckpointError, ConfigError
from llaso_jax.planning.bounds import Bounds
from llaso_jax.planning.hardware import ACCELERATORS
from llaso_jax.planning.plan import Plan

# --- the machinery, with trials that are over at once ---------------------------------------------

# Says what it was given in its losses; seeds choose how it ends.
STAND_IN = """
import json, os, sys, time
spec = json.loads(sys.stdin.readline())
print("trial of", spec["mesh"])
seed = spec["config"]["seed"]
if seed == 13:
    os.kill(os.getpid(), 9)
if seed == 14:
    sys.exit("lost for words")
if seed == 15:
    time.sleep(600)
outcome = {"error": "ConfigError: seed 12"} if seed == 12 else {"measured": MEASURED}
outcome.get("measured", {})["losses"] = [float(seed)] * spec["steps"]
with open(sys.argv[1], "w") as file:
    json.dump(outcome, file)
"""


def measured(**changes) -> Measured:
    values = {
        "losses": (3.0, 2.0, 1.0),
        "grad_norms": (1.0, 1.0, 1.0),
        "step_seconds": (9.0, 0.5, 0.25),
        "timed": (False, True, True),
        "audio_seconds": (10.0, 10.0, 10.0),
        "samples": (8, 10, 5),
        "compile_seconds": 4.0,
        "peak_bytes": 2**30,
        "device_peak_bytes": None,
        "device": "cpu",
        "devices": 8,
        "dtype": "float32",
    }
    return Measured(**{**values, **changes})


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN.replace("MEASURED", repr(to_tree(measured()))))
    monkeypatch.setattr(sweep, "TRIAL", (sys.executable, str(program)))


def seeds(*values: int) -> list[Point]:
    return [Point("1x1", (("seed", str(value)),)) for value in values]


MINI = Sweep(load_config("mini"), 0, 3)


def test_every_point_is_a_row_however_it_ends(stand_in, tmp_path):
    rows = list(run_sweep(MINI, seeds(1, 12, 13, 14, 2), tmp_path / "out"))
    assert [row.measured and row.measured.losses for row in rows] == [
        (1.0, 1.0, 1.0),
        *[None] * 3,
        (2.0, 2.0, 2.0),
    ]
    assert rows[1].error == "ConfigError: seed 12"
    assert "ended by SIGKILL (out of memory?)" in (rows[2].error or "")
    assert "ended with exit code 1" in (rows[3].error or "")
    assert "logs/004.log" in (rows[3].error or "")
    assert "lost for words" in (tmp_path / "out" / "logs" / "004.log").read_text()
    assert read_rows(tmp_path / "out" / "trials.jsonl") == rows


def test_a_point_whose_settings_are_refused_needs_no_process(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "TRIAL", ("/nowhere/at/all",))
    point = Point("1x1", (("stages.0.data.rows", "0"),))
    (row,) = run_sweep(MINI, [point], tmp_path / "out")
    assert "`rows` is 0" in (row.error or "")


def test_a_point_that_takes_too_long_is_a_row(stand_in, tmp_path):
    (row,) = run_sweep(MINI, seeds(15), tmp_path / "out", timeout=1)
    assert "not done after 1 s (--timeout)" in (row.error or "")


def test_points_tried_before_are_not_tried_again_and_new_ones_are(stand_in, tmp_path):
    output = tmp_path / "out"
    trials = run_sweep(MINI, seeds(1, 12, 3), output)
    first = [next(trials), next(trials)]
    trials.close()
    path = output / "trials.jsonl"
    with path.open("a") as file:
        file.write('{"point": {"me')  # a line that was being written
    rows = list(run_sweep(MINI, seeds(12, 1, 3, 4), output))
    assert rows[:2] == first[::-1]
    assert [json.loads(line)["point"]["settings"] for line in path.read_text().splitlines()] == [
        [["seed", value]] for value in ("1", "12", "3", "4")
    ]


def test_failed_points_are_tried_again_when_asked(stand_in, tmp_path):
    output = tmp_path / "out"
    first = list(run_sweep(MINI, seeds(1, 12), output))
    assert list(run_sweep(MINI, seeds(1, 12), output, retry=True)) == first
    lines = (output / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["point"]["settings"][0][1] for line in lines] == ["1", "12", "12"]
    assert len(read_rows(output / "trials.jsonl")) == 2


def test_a_sweep_of_other_settings_is_refused_unless_overwritten(stand_in, tmp_path):
    output = tmp_path / "out"
    list(run_sweep(MINI, seeds(1), output))
    other = Sweep(load_config("mini", ["stages.0.data.rows=16"]), 0, 3)
    with pytest.raises(CheckpointError, match=r"config\.stages\.0\.data\.rows: 8 there, 16 now"):
        list(run_sweep(other, seeds(1), output))
    with pytest.raises(CheckpointError, match="steps: 3 there, 4 now"):
        list(run_sweep(Sweep(MINI.config, 0, 4), seeds(1), output))
    list(run_sweep(other, seeds(5), output, overwrite=True))
    assert [row.point for row in read_rows(output / "trials.jsonl")] == seeds(5)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty and holds no sweep"):
        list(run_sweep(MINI, seeds(1), tmp_path, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_one_step_is_too_few_to_time():
    with pytest.raises(ConfigError, match="--steps 1: at least 2"):
        Sweep(MINI.config, 0, 1)


# --- ranks ----------------------------------------------------------------------------------------


def rows_of(**points: Measured | str) -> list[Row]:
    """Rows by mesh name; a text is an error."""
    return [
        Row(Point(mesh), error=m) if isinstance(m, str) else Row(Point(mesh), m)
        for mesh, m in points.items()
    ]


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def order(rows: list[Row], by="speed") -> list[str]:
    return [result.point.mesh for result in rank(rows, by)]


def test_the_first_step_of_a_program_is_not_timed():
    (result,) = rank(rows_of(a=measured()))
    assert result.step_seconds == 0.375
    assert result.samples_per_second == 15 / 0.75


def test_ranks_follow_speed_memory_or_loss():
    rows = rows_of(
        a=measured(),
        b=measured(step_seconds=(0.1, 0.6, 0.6), peak_bytes=2**29),
        c=measured(step_seconds=(9.0, 0.2, 0.2), device_peak_bytes=2**31),
        d="OutOfMemory",
    )
    assert order(rows) == ["c", "a", "b"]
    assert order(rows, "memory") == ["b", "a", "c"]
    losses = [(2.0,) * 3, (1.0,) * 3]
    other = [
        Row(Point("1x1", (("seed", str(n)),)), measured(losses=loss))
        for n, loss in enumerate(losses)
    ]
    assert [r.measured.losses[-1] for r in rank(other, "loss")] == [1.0, 2.0]


def test_a_point_that_computes_something_else_comes_last_and_never_wins():
    rows = rows_of(
        a=measured(),
        b=measured(losses=(3.0, 2.0 * (1 + 9e-5), 1.0)),
        c=measured(grad_norms=(1.0, 1.0, 1 + 2e-4), step_seconds=(1.0, 0.1, 0.1)),
    )
    assert order(rows) == ["a", "b", "c"]
    results = rank(rows)
    assert [result.agrees for result in results] == [True, True, False]
    assert results[1].loss_difference == pytest.approx(9e-5)
    assert results[2].grad_norm_difference == pytest.approx(2e-4)
    assert "c does not compute what a does" in " ".join(report.notes(rows, results))
    assert report.winner(results[2:]) is None


def test_bfloat16_may_differ_by_its_own_rounding():
    first, second = measured(dtype="bfloat16"), measured(losses=(3.0, 2.0, 1.01), dtype="bfloat16")
    assert all(result.agrees for result in rank(rows_of(a=first, b=second)))


def test_points_are_compared_where_they_should_compute_the_same():
    def point(mesh: str, **settings: str) -> Point:
        return Point(mesh, tuple(settings.items()))

    one, two = {"seed": "1"}, {"seed": "2"}
    rows = [
        Row(point("8x1", **one), measured()),
        Row(point("4x2", **one, **{"precision.remat": "layer"}), measured()),
        Row(point("8x1", **two), measured(losses=(9.0,) * 3)),
        Row(point("4x2", **two, **{"stages.0.accumulation": "2"}), measured(losses=(9.0,) * 3)),
    ]
    references = {result.point: result.reference for result in rank(rows)}
    assert [references[row.point] for row in rows] == [None, rows[0].point, None, rows[2].point]


def planned(seconds: float, gib: float) -> Plan:
    return Plan(
        recipe="mini",
        stage="align",
        topology="v5e:4x2",
        mesh="fsdp=8",
        devices=8,
        device=ACCELERATORS[0],
        rows=8,
        accumulation=2,
        sequence_length=112,
        chunks_per_row=3,
        remat="none",
        peak_hbm_bytes=int(gib * 2**30),
        hbm_by_owner={"llm": 1},
        analytic_flops=1e12,
        counted_flops=1e12,
        collectives={"fsdp": {"all-gather": 1e9}},
        bounds=Bounds(
            compute=seconds / 4, hbm=seconds / 2, interconnect=seconds / 8, steps=seconds
        ),
        compile_seconds=30.0,
    )


def test_plans_are_ranked_by_prediction_or_memory_and_survive_their_file(tmp_path):
    rows = [
        Row(Point("8x1", topology="v5e:4x2"), planned=planned(2.0, 1.0)),
        Row(Point("4x2", topology="v5e:4x2"), planned=planned(1.0, 2.0)),
        Row(
            Point("1x8", topology="v5e:4x2"),
            error="PlanError: does not fit: Used 17G of 15.75G hbm.",
        ),
    ]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(to_tree(r)) + "\n" for r in rows))
    assert read_rows(tmp_path / "trials.jsonl") == rows
    assert order(rows) == ["4x2", "8x1"]
    assert order(rows, "memory") == ["8x1", "4x2"]
    outcomes = rank(rows)
    assert report.winner(outcomes) == rows[1].point
    report.write_csv(tmp_path / "t.csv", rows, outcomes)
    report.plot(tmp_path / "p.png", rows, outcomes)
    first, _, last = read_table(tmp_path / "t.csv")
    assert (first["mesh"], first["predicted_step_seconds"], first["binding"]) == (
        "4x2",
        "1.0",
        "hbm",
    )
    assert "does not fit" in last["error"]


def test_only_fields_that_differ_name_a_point():
    rows = [
        Row(Point("8x1", (("precision.remat", value), ("seed", "1"))), measured())
        for value in ("none", "dots")
    ]
    fields = report.varying(row.point for row in rows)
    assert fields == {"precision.remat": "remat"}
    assert [report.label(row.point, fields) for row in rows] == ["remat=none", "remat=dots"]


def test_the_csv_holds_every_point_and_the_plot_is_drawn(tmp_path):
    rows = rows_of(a=measured(), b="ShardingError: 3 heads\nmore")
    results = rank(rows)
    report.write_csv(tmp_path / "t.csv", rows, results)
    report.plot(tmp_path / "p.png", rows, results)
    first, second = read_table(tmp_path / "t.csv")
    assert (first["rank"], first["mesh"], first["step_seconds"]) == ("1", "a", "0.375")
    assert (first["program_peak_bytes"], first["device_peak_bytes"]) == (str(2**30), "")
    assert (second["rank"], second["error"]) == ("", "ShardingError: 3 heads\nmore")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_shows_what_was_measured_so_far(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        yield Row(Point("1x1", (("seed", "1"),)), measured())
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_sweep", interrupted)
    assert main(["--sweep", "seed=1,2", "--output", str(tmp_path)]) == 75
    said = capsys.readouterr().out
    assert "375 ms" in said
    assert "stopped after 1 of 2 points" in said
    assert read_table(tmp_path / "table.csv")[0]["step_seconds"] == "0.375"


# --- the real thing -------------------------------------------------------------------------------


def command(folder: Path, meshes: str, output: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "llaso_jax.ablate", "--config", str(folder / "tiny.yaml")),
        *("--steps", "3", "--sweep", f"mesh={meshes}", "--output", str(output)),
    ]


def finish(words: list[str]) -> str:
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, str]:
    """A sweep of the tiny recipe, killed after its first point and started again: (folder, what it said then)."""
    folder = tmp_path_factory.mktemp("ablation")
    write_inputs(folder)
    write_recipe(folder, recipe(folder))
    words = command(folder, "1x2,3x1", folder / "out")  # a width of 16 does not split over 3
    with (folder / "first.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    trials, deadline = folder / "out" / "trials.jsonl", time.monotonic() + 500
    while not (trials.is_file() and trials.read_bytes().count(b"\n") == 1):
        assert process.poll() is None, (folder / "first.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (folder / "line").write_bytes(trials.read_bytes())
    return folder, finish(words)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_points_that_are_left(killed):
    folder, _ = killed
    content = (folder / "out" / "trials.jsonl").read_bytes()
    assert content.startswith((folder / "line").read_bytes())
    rows = read_rows(folder / "out" / "trials.jsonl")
    assert content.count(b"\n") == len(rows) == 2
    assert [row.point.mesh for row in rows] == ["1x2", "3x1"]


@pytest.mark.slow
def test_a_mesh_that_the_model_does_not_split_over_is_a_row_that_says_why(killed):
    folder, said = killed
    (_, row) = read_rows(folder / "out" / "trials.jsonl")
    assert "does not split evenly over the 3 devices" in (row.error or "")
    assert "does not split evenly over the 3 devices" in said


@pytest.mark.slow
def test_the_table_holds_the_numbers_of_the_trials(killed):
    folder, _ = killed
    line = (folder / "out" / "trials.jsonl").read_text().splitlines()[0]
    of = json.loads(line)["measured"]
    row, refused = read_table(folder / "out" / "table.csv")
    assert (row["rank"], row["mesh"]) == ("1", "1x2")
    assert (refused["rank"], refused["mesh"]) == ("", "3x1")
    assert of["timed"] == [False, True, True]
    assert float(row["step_seconds"]) == statistics.median(of["step_seconds"][1:]) > 0
    speed = sum(of["samples"][1:]) / sum(of["step_seconds"][1:])
    assert float(row["samples_per_second"]) == speed
    assert float(row["compile_seconds"]) == of["compile_seconds"] > 0
    assert int(row["program_peak_bytes"]) == of["peak_bytes"] > 0
    assert float(row["last_loss"]) == of["losses"][-1]
    assert of["losses"][0] != of["losses"][2], "nothing was trained"
    assert (folder / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_winner_is_a_recipe_that_loads(killed):
    folder, said = killed
    path = folder / "out" / "winner.yaml"
    assert load_config(str(path)) == config(recipe(folder))
    train_it = f"llaso train --config {path} --mesh 1x2"
    assert path.read_text().startswith(f"# {train_it}\n")
    assert train_it in said


@pytest.mark.slow
def test_the_losses_of_a_trial_are_those_of_training_its_winner(killed, tmp_path):
    folder, _ = killed
    tree = to_tree(load_config(str(folder / "out" / "winner.yaml")))
    run(tree, tmp_path / "run", mesh="1x2")
    trained = [record["loss"] for record in records(tmp_path / "run")][:3]
    (row, _) = read_rows(folder / "out" / "trials.jsonl")
    assert row.measured is not None
    assert row.measured.losses == pytest.approx(trained, rel=1e-6)


@pytest.mark.slow
def test_meshes_agree(killed, tmp_path):
    folder, _ = killed
    finish(command(folder, "1x1,'data=2',2x2", tmp_path / "out"))
    outcomes = rank(read_rows(tmp_path / "out" / "trials.jsonl"))
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert outcome.agrees
        difference = max(outcome.loss_difference, outcome.grad_norm_difference)
        # Equal to the bit would mean that one mesh was run three times.
        assert (difference == 0) == (outcome.point.mesh == "1x1")
        assert difference < 1e-5


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config", "nothing", "--sweep", "remat=none,dots"], "there is no recipe 'nothing'"),
        (["--sweep", "remmat=none,dots"], "did you mean precision.remat?"),
        (["--stage", "5", "--sweep", "remat=none,dots"], "has the stages 0 to 1"),
        (["sharding", "--devices", "8", "--sweep", "mesh=8x1,4x2"], "two axes of the sweep"),
    ],
)
def test_a_mistake_is_told_in_words(arguments: list[str], told: str, capsys):
    assert main(arguments) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to sweep"),
        (["sharding"], "sharding needs --devices or --topology"),
        (["sharding", "--devices", "0"], "at least 1"),
        (["--sweep", "remat=none", "--steps", "1"], "at least 2"),
    ],
)
def test_wrong_usage_ends_with_code_2(arguments: list[str], told: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
