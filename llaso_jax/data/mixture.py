"""Training files drawn by weight: evenly, by number, without a random choice.

Every lane draws its sources in one repeating pattern, in which each has its share of every stretch, give or take a
sample or two. Lanes start at different places of the pattern, so that not all of them draw a rare source at once. A
source hands its samples out in turn, epoch after epoch, each in an order of its own: lane i of L gets numbers i,
i + L, … of them.
"""

import math
import sys
import zlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import grain

from llaso_jax.data.config import DataConfig
from llaso_jax.data.records import RecordSource
from llaso_jax.data.samples import SampleSource
from llaso_jax.errors import ConfigError, DataError


class Turns(grain.transforms.DatasetSelectionMap):
    """Stream position -> (source, how many samples that source handed out before).

    Example, of one lane:
        [Turns([2, 1], lanes=1)[i] for i in range(6)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1)]
    """

    def __init__(self, weights: Sequence[float], *, lanes: int, length: int | None = None) -> None:
        """`length`: of the stream; None for no end."""
        shares = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth
        unit = math.lcm(*(share.denominator for share in shares))
        parts = [int(share * unit) for share in shares]
        self._parts = [part // math.gcd(*parts) for part in parts]
        # Heavy sources first: what they leave is spread evenly, so light ones do not come all together.
        self._order = sorted(range(len(parts)), key=lambda source: -parts[source])
        self._lanes = lanes
        self._length = sys.maxsize if length is None else length
        self._starts = [lane * sum(self._parts) // lanes for lane in range(lanes)]
        self._before = [self.counts(start) for start in self._starts]

    @property
    def sources(self) -> int:
        """Number of sources."""
        return len(self._parts)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        turn, lane = divmod(index, self._lanes)
        now, then = (self.counts(self._starts[lane] + turn + i) for i in (0, 1))
        source = next(i for i, count in enumerate(now) if then[i] > count)
        return source, lane + self._lanes * (now[source] - self._before[lane][source])

    def counts(self, turns: int) -> list[int]:
        """How often each source comes in the first `turns` of the pattern.

        Source by source, its share of what the earlier ones left, rounded up: another turn adds one to exactly one.
        """
        left, parts_left = turns, sum(self._parts)
        counts = [0] * len(self._parts)
        for source in self._order:
            part = self._parts[source]
            rest = left * (parts_left - part) // parts_left
            counts[source] = left - rest
            left, parts_left = rest, parts_left - part
        return counts


def source_sizes(config: DataConfig, records: RecordSource) -> tuple[int, ...]:
    """Records of each source of `config.mixture`, whose files `records` reads one after the other.

    Raises:
        DataError: a source without records.
        ConfigError: so few samples are drawn that a source gets none.
    """
    ends = [0, *accumulate(len(source.files) for source in config.mixture)]
    sizes = tuple(sum(records.file_sizes[start:end]) for start, end in pairwise(ends))
    drawn = math.inf if config.epochs is None else config.epochs * len(records)
    whole = sum(source.weight for source in config.mixture)
    for source, size in zip(config.mixture, sizes, strict=True):
        if not size:
            raise DataError(f"source {source.name!r} of `mixture` holds no records")
        if drawn * source.weight / whole < 1:
            raise ConfigError(
                f"`epochs` = {config.epochs:g} draws {round(drawn)} samples, and with weight {source.weight:g} of "
                f"{whole:g} source {source.name!r} of `mixture` gets none of them: raise one of the two"
            )
    return sizes


def mix(
    samples: SampleSource, records: RecordSource, config: DataConfig
) -> tuple[grain.MapDataset, Turns]:
    """All samples of training in order, and whose each is; nothing is loaded until one is asked for.

    Args:
        samples: of `records`, which are those of all sources, one source after the other.
        records: of `config.training_files`.
        config: the sources, how many samples are drawn, seed, and whether they are shuffled.

    Raises:
        DataError, ConfigError: see `source_sizes`.
    """
    sizes = source_sizes(config, records)
    weights = [source.weight for source in config.mixture]
    length = config.total_samples(len(records))
    turns = Turns(weights, lanes=config.lanes, length=length)
    everything = grain.MapDataset.source(samples)
    sources = []
    for source, (start, end) in zip(config.mixture, pairwise([0, *accumulate(sizes)]), strict=True):
        part = everything.slice(slice(start, end))
        if config.shuffle:
            part = part.shuffle(seed=zlib.crc32(f"{config.seed} {source.name}".encode()))
        sources.append(part.repeat())
    return grain.MapDataset.select_from_datasets(sources, turns), turns
