"""How sure a score is: items are drawn again with replacement, and the score computed of each draw."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llaso_jax.evaluation.metrics.statistic import Statistic

BLOCK = 1 << 21  # draws times items counted together: 16 MB an array


@dataclass(frozen=True)
class Bootstrap:
    """A percentile bootstrap.

    Draws depend on the seed, the file's name and its number of items only: two models that answered the
    same items are drawn alike, so the difference of their draws is a paired bootstrap.

    Attributes:
      samples: draws; 0 for none.
      seed: of the draws.
      confidence: of the intervals.
    """

    samples: int = 1000
    seed: int = 0
    confidence: float = 0.95

    def weights(self, file: str, items: int) -> Iterator[np.ndarray]:
        """f64[draws, items]: how often each draw holds each item; a block of draws at a time."""
        rng = np.random.default_rng([self.seed, zlib.crc32(file.encode())])
        most = max(1, BLOCK // items)
        for start in range(0, self.samples, most):
            draws = min(most, self.samples - start)
            drawn = rng.integers(items, size=(draws, items))
            drawn += np.arange(draws)[:, None] * items
            counts = np.bincount(drawn.ravel(), minlength=draws * items)
            yield counts.reshape(draws, items).astype(np.float64)

    def draws(self, file: str, statistics: Mapping[str, Statistic]) -> dict[str, np.ndarray]:
        """f64[samples] of every statistic of one file's items, all of the same draws."""
        if not statistics or not self.samples:
            return {}
        columns = np.concatenate([s.items for s in statistics.values()], axis=1)
        sums = np.concatenate([block @ columns for block in self.weights(file, len(columns))])
        draws, start = {}, 0
        for name, statistic in statistics.items():
            width = statistic.items.shape[1]
            draws[name] = statistic.combine(sums[:, start : start + width])
            start += width
        return draws

    def interval(self, draws: np.ndarray) -> tuple[float, float] | None:
        """Lower and upper bound; None where no draw has a score."""
        if not np.isfinite(draws).any():
            return None
        tail = (1 - self.confidence) / 2
        low, high = np.nanquantile(draws, [tail, 1 - tail])
        return float(low), float(high)
