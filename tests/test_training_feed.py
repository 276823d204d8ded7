"""Lanes become one batch: whatever process reads them, in whatever lanes the data ends first."""

from typing import Any

import jax
import numpy as np
import pytest

from llaso_jax.data.batch import Batch, BatchStats
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.processes import Tally, gather_bytes, row_holders
from llaso_jax.sharding.rules import FSDP_TENSOR
from llaso_jax.training.feed import Feed
from llaso_jax.training.ledger import sample_digest
from llaso_jax.training.state import Layout
from llaso_jax.training.step import place_batch, place_lanes

ROWS = 4  # of a lane


def batch(*samples: str) -> Batch:
    """A lane's rows, the first of which holds `samples`; those with a capital are of the second source."""
    stats = BatchStats(
        samples=len(samples),
        tokens=10 * len(samples),
        token_capacity=400,
        answers=3 * len(samples),
        chunks=len(samples),
        chunk_capacity=8,
        audio_seconds=1.25 * len(samples),
        seconds_dropped=0.0,
        tokens_dropped=0,
        quarantined=0,
        epoch=0.5,
        chunks_to_encode=2 * len(samples),
        sources=(sum(map(str.islower, samples)), sum(map(str.isupper, samples))),
    )
    rows = (tuple(samples), *((),) * (ROWS - 1))
    return Batch({"tokens": np.zeros((ROWS, 2), np.int32)}, rows, stats)


class Lane:
    """An iterator with a position, as Grain's."""

    def __init__(self, *batches: Batch) -> None:
        self.batches, self.at = batches, 0

    def __next__(self) -> Batch:
        if self.at == len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]

    def get_state(self) -> dict[str, Any]:
        return {"at": self.at, "quarantined": 2 * self.at}


def feed(*lanes: Lane, requested=lambda: None) -> Feed:
    return Feed(
        dict(enumerate(lanes)),  # type: ignore[arg-type]
        count=len(lanes),
        owned=tuple(range(len(lanes))),
        empty=batch(),
        tally=Tally(make_mesh("8x1")),
        requested=requested,
    )


def test_a_batch_ends_with_the_last_lane_and_counts_all_of_them():
    ours = feed(Lane(batch("a", "b"), batch("c")), Lane(batch("d")))
    first, second = ours.take(), ours.take()
    assert first is not None
    assert second is not None
    assert first.lane_samples() == {0: ["a", "b"], 1: ["d"]}
    assert second.lane_samples() == {0: ["c"], 1: []}
    assert ours.take() is None
    assert ours.take() is None
    assert first.stats.samples == 3
    assert first.stats.tokens == 30
    assert first.stats.audio_seconds == 3.75
    assert first.stats.token_capacity == 800
    assert (first.stats.quarantined, second.stats.quarantined) == (4, 6)
    assert first.digest == sample_digest(["d", "a", "b"])
    assert second.digest == sample_digest("c")


def test_counts_of_sources_and_of_chunks_to_encode_are_those_of_all_lanes():
    ours = feed(Lane(batch("a", "B"), batch("C")), Lane(batch("D")))
    first, second = ours.take(), ours.take()
    assert first is not None
    assert second is not None
    assert (first.stats.sources, second.stats.sources) == ((1, 2), (0, 1))
    assert (first.stats.chunks_to_encode, second.stats.chunks_to_encode) == (6, 2)


def test_the_position_is_that_of_the_batch_taken_last_not_of_what_was_read_ahead():
    lane = Lane(batch("a"), batch("b"), batch("c"))
    ours = feed(lane)
    assert ours.position()["0"]["at"] == 0
    ours.take()
    assert lane.at == 2
    assert ours.position()["0"]["at"] == 1
    while ours.take() is not None:
        pass
    assert ours.position()["0"]["at"] == 3


def test_one_process_stops_at_once():
    signals = iter([None, None, None, "SIGTERM"])
    ours = feed(Lane(batch("a"), batch("b")), requested=lambda: next(signals))
    ours.take()  # reads two batches
    assert ours.stop() is None
    assert ours.stop() == "SIGTERM"


def test_rows_name_their_samples_in_micro_batches():
    lanes = [
        Batch({}, tuple((f"{lane}.{row}",) for row in range(ROWS)), batch().stats)
        for lane in (0, 1)
    ]
    taken = feed(Lane(lanes[0]), Lane(lanes[1])).take()
    assert taken is not None
    # Two micro-batches of 4 rows: the first two of each are of lane 0.
    names = [[taken.row_samples(g, row, 2) for row in range(4)] for g in (0, 1)]
    assert names == [
        [("0.0",), ("0.1",), ("1.0",), ("1.1",)],
        [("0.2",), ("0.3",), ("1.2",), ("1.3",)],
    ]


@pytest.mark.parametrize("mesh", ["8x1", "2x4", "1x1"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_lanes_are_placed_as_the_batch_they_are_part_of(mesh: str, count: int):
    """A lane has its place in every micro-batch; a device may hold a part of it, or several."""
    micro = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    layout = Layout(make_mesh(mesh), FSDP_TENSOR, {}, {})
    parts = np.split(micro, count, axis=1)
    lanes = {i: {"tokens": part.reshape(-1, 3)} for i, part in enumerate(parts)}
    placed = place_lanes(lanes, count, 2, layout)["tokens"]
    np.testing.assert_array_equal(placed, micro)
    assert placed.sharding.is_equivalent_to(layout.micro_batches(), 3)
    whole = place_batch({"tokens": micro.reshape(-1, 3)}, 2, layout)["tokens"]
    np.testing.assert_array_equal(whole, micro)


def test_one_process_holds_every_part_of_the_rows():
    layout = Layout(make_mesh("4x2"), FSDP_TENSOR, {}, {})
    assert row_holders(layout.micro_batches(), 8, 4) == {jax.process_index(): (0, 1, 2, 3)}
    assert gather_bytes(b"alone") == [b"alone"]
