"""The ledger proves which samples every step took; whatever is missing or changed in it is noticed."""

import json

import pytest

from llaso_jax.errors import CheckpointError
from llaso_jax.training.ledger import Ledger, next_hash, read_ledger, sample_digest

STEPS = {1: (["a", "b"], ["c"]), 2: (["d"], []), 3: (["e", "f"], ["a"])}


def write(folder, *, steps=STEPS, step=0, hash_there=None):
    """Two processes of a lane each, in step; returns the hash both have come to."""
    ledgers = [Ledger(folder, lanes=2, owned=[lane]) for lane in (0, 1)]
    for ledger in ledgers:
        ledger.open(step, hash_there)
    for number, lanes in steps.items():
        digest = sample_digest(lanes[0] + lanes[1])
        for lane, ledger in enumerate(ledgers):
            ledger.add(number, {lane: lanes[lane]}, digest)
    for ledger in ledgers:
        ledger.flush()
        ledger.close()
    assert ledgers[0].hash == ledgers[1].hash
    return ledgers[0].hash


def test_a_digest_does_not_depend_on_order_or_parts_but_on_every_sample():
    whole = sample_digest(["a", "b", "c"])
    assert whole == sample_digest(["c", "a", "b"])
    assert whole == (sample_digest(["a"]) + sample_digest(["c", "b"])) % 2**256
    others = (["a", "b"], ["a", "b", "c", "c"], ["a", "b", "d"], ["ab", "c"], ["a", "b", "c", ""])
    assert whole not in {sample_digest(other) for other in others}
    assert sample_digest([]) == 0


def test_the_hash_depends_on_the_steps_and_their_order():
    def run(*steps):
        value = "0" * 64
        for number, samples in enumerate(steps, 1):
            value = next_hash(value, number, sample_digest(samples))
        return value

    assert run("ab", "c") == run("ba", "c")
    assert len({run("ab", "c"), run("c", "ab"), run("a", "bc"), run("ab"), run("ab", "c", "")}) == 5


def test_the_files_hold_what_every_step_took_and_the_hash_proves_it(tmp_path):
    value = write(tmp_path)
    assert list(read_ledger(tmp_path)) == [
        (n, first + second) for n, (first, second) in STEPS.items()
    ]
    Ledger(tmp_path, lanes=2, owned=[]).check(3, value)


def test_a_resumed_run_cuts_the_steps_it_does_again(tmp_path):
    whole = write(tmp_path / "whole")
    until_2 = write(tmp_path / "run", steps={n: STEPS[n] for n in (1, 2)})
    write(tmp_path / "run", steps={3: (["x"], ["y"])}, step=2, hash_there=until_2)
    with (tmp_path / "run" / "1.jsonl").open("a") as file:
        file.write('{"step": 4, "sam')  # killed while it wrote
    assert write(tmp_path / "run", steps={3: STEPS[3]}, step=2, hash_there=until_2) == whole
    assert list(read_ledger(tmp_path / "run")) == list(read_ledger(tmp_path / "whole"))
    Ledger(tmp_path / "run", lanes=2, owned=[]).check(3, whole)


def test_a_run_from_the_start_leaves_no_line_of_an_earlier_try(tmp_path):
    write(tmp_path, steps={1: (["x"], []), 2: (["y"], [])})
    value = write(tmp_path)
    Ledger(tmp_path, lanes=2, owned=[]).check(3, value)
    assert len(list(read_ledger(tmp_path))) == 3


def _replace(folder, number, line):
    lines = (folder / "0.jsonl").read_text().splitlines(keepends=True)
    lines[number - 1] = line
    (folder / "0.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: _replace(f, 2, '{"step": 2, "samples": ["x"]}\n'), "are not those"),
        (lambda f: _replace(f, 2, ""), "no line for step 2 of the 3 .* step 3 is there"),
        (lambda f: _replace(f, 3, ""), "no line for step 3 of the 3 .* the file ends there"),
        (lambda f: _replace(f, 3, '{"step": 3, "sam'), "the file ends there"),
        (lambda f: (f / "1.jsonl").unlink(), r"1\.jsonl has no line for step 1"),
    ],
    ids=["another sample", "a line is missing", "the end is missing", "torn", "a lane is missing"],
)
def test_a_ledger_that_is_not_the_checkpoints_is_refused(tmp_path, damage, told):
    value = write(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{told}.*--overwrite"):
        Ledger(tmp_path, lanes=2, owned=[]).check(3, value)


def test_names_in_any_script_are_kept(tmp_path):
    value = write(tmp_path, steps={1: (["голос-1", "声/2.wav"], [])})
    assert list(read_ledger(tmp_path)) == [(1, ["голос-1", "声/2.wav"])]
    assert json.loads((tmp_path / "0.jsonl").read_text())["samples"][0] == "голос-1"
    Ledger(tmp_path, lanes=2, owned=[]).check(1, value)
