"""The training data of one stage on this process: which lanes it reads, where they stand, what was taken."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llaso_jax.config import StageConfig, resolve_data
from llaso_jax.data.batch import empty_batch
from llaso_jax.data.config import AudioLayout, DataConfig
from llaso_jax.data.encoder_cache import EncoderCache
from llaso_jax.data.mixture import source_sizes
from llaso_jax.data.packing import BatchShape
from llaso_jax.data.pipeline import make_lanes
from llaso_jax.data.prompt import PromptConfig
from llaso_jax.data.records import RecordSource
from llaso_jax.sharding.processes import Tally, is_first_process, row_holders, wait_for_all
from llaso_jax.training.feed import Feed, GlobalBatch
from llaso_jax.training.ledger import Ledger
from llaso_jax.training.state import Layout

logger = logging.getLogger(__name__)


class StageData:
    """Batches of a stage and the ledger of what was taken; `close` it when done.

    Attributes:
      config: the stage's data settings, paths resolved.
      sources: records of each source of the mixture, by name.
      cache: where outputs of the stage's frozen encoder are kept, if they are.
      total_samples: of the whole stage: what progress is measured in where no max_steps is set.
    """

    def __init__(
        self,
        stage: StageConfig,
        *,
        output: Path,
        layout: Layout,
        tokenizer: Any,
        audio: AudioLayout,
        prompt: PromptConfig,
        open_cache: Callable[[DataConfig, RecordSource], EncoderCache | None],
    ) -> None:
        """`output`: the run's folder; `audio`: what the model takes of it; `open_cache`: decides on `cache`.

        Raises:
          DataError: data files that are missing, malformed or empty.
        """
        self.config = data = resolve_data(stage.data, index_dir=output / "index")
        self._name, self._mesh, self._lane_count = stage.name, layout.mesh, data.lanes
        # New files are indexed once: by the first process, while the others wait.
        indexed = f"{stage.name}: data files indexed"
        if not is_first_process():
            wait_for_all(indexed)
        records = RecordSource(
            data.training_files, data_root=data.data_root, index_dir=data.index_dir
        )
        if is_first_process():
            wait_for_all(indexed)
        self.total_samples = data.total_samples(len(records)) or len(records)
        sizes = source_sizes(data, records)
        self.sources = {source.name: size for source, size in zip(data.mixture, sizes, strict=True)}
        self.cache = open_cache(data, records)

        held, self._owned = _lanes(stage, layout)
        part = ".{}" if data.lanes > 1 else ""
        datasets = make_lanes(
            data,
            held,
            split="train",
            tokenizer=tokenizer,
            layout=audio,
            prompt=prompt,
            quarantine_files={
                lane: output / f"quarantine_{stage.name}{part.format(lane)}.jsonl"
                for lane in self._owned
            },
            cache=self.cache,
        )
        self._lanes = {lane: iter(dataset) for lane, dataset in datasets.items()}
        pad_id = int(tokenizer.pad_token_id)
        shape = BatchShape.of(data, audio, pad_id=pad_id, lanes=data.lanes)
        self._empty = empty_batch(shape, cache=self.cache, sources=len(data.mixture))
        self._ledger = Ledger(output / "ledger" / stage.name, lanes=data.lanes, owned=self._owned)
        self._drawn: Counter[str] = Counter()  # samples of each source of the mixture
        self._feed: Feed | None = None

    def feed(self, requested: Callable[[], str | None]) -> Feed:
        """Batches from where the stage stands; `requested`: the signal this process was sent, if any."""
        self._feed = Feed(
            self._lanes,
            count=self._lane_count,
            owned=self._owned,
            empty=self._empty,
            tally=Tally(self._mesh),
            requested=requested,
        )
        return self._feed

    def note(self, step: int, batch: GlobalBatch) -> None:
        """Enter the samples of `step` in the ledger."""
        self._ledger.add(step, batch.lane_samples(), batch.digest)
        self._drawn.update(dict(zip(self.sources, batch.stats.sources, strict=True)))

    def passes(self, *, before: GlobalBatch | None = None) -> dict[str, float]:
        """How often each source of the mixture was seen; `before`: the batch noted last, which is not to count."""
        drawn = self._drawn.copy()
        if before is not None:
            drawn.subtract(dict(zip(self.sources, before.stats.sources, strict=True)))
        return {name: drawn[name] / size for name, size in self.sources.items()}

    def progress(self) -> dict[str, Any]:
        """JSON for a checkpoint: place in the data, samples of each source, hash of the ledger, which is on disk then.

        The same for any number of processes; all of them have to call it.
        """
        assert self._feed is not None
        self._ledger.flush()
        position = self._feed.position()
        return {"data": position, "ledger": self._ledger.hash, "drawn": dict(self._drawn)}

    def begin(self) -> None:
        """Start at the first step, with an empty ledger."""
        self._ledger.open()

    def resume(self, step: int, progress: dict[str, Any]) -> None:
        """Go on after `step`, whose checkpoint holds `progress`.

        Raises:
          CheckpointError: the ledger on disk does not say what the checkpoint was made from.
        """
        if is_first_process():
            self._ledger.check(step, progress["ledger"])
        wait_for_all(f"{self._name}: ledger checked")
        self._ledger.open(step, progress["ledger"])
        self._drawn = Counter(progress["drawn"])
        for lane, batches in self._lanes.items():
            batches.set_state(progress["data"][str(lane)])

    def close(self) -> None:
        """End worker processes and close files."""
        for batches in self._lanes.values():
            batches.close()
        self._ledger.close()


def _lanes(stage: StageConfig, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lanes this process reads, and those of them it owns."""
    count, rows = stage.data.lanes, stage.data.rows // stage.accumulation
    holders = row_holders(layout.micro_batches(), rows, count)
    parts = len(set(row_holders(layout.micro_batches(), rows, rows).values()))
    if count % parts and is_first_process():
        logger.warning(
            "stage %s: the %d processes hold %d different parts of a batch, and data.lanes=%d cannot "
            "give each its own: some samples are loaded more than once. In a new run, a multiple of "
            "%d lanes ends that.",
            *(stage.name, len(holders), parts, count, parts),
        )
    this = jax.process_index()
    owner = {lane: process for process in reversed(holders) for lane in holders[process]}
    return holders[this], tuple(lane for lane in holders[this] if owner[lane] == this)
