"""A score as a function of sums over items, so that resampling items is one matrix product."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """f64[..., 2] sums -> f64[...] first over second; NaN where the second is 0."""
    top, bottom = sums[..., 0], sums[..., 1]
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


@dataclass(frozen=True)
class Statistic:
    """A corpus-level score.

    Attributes:
      items: f64[n, k], what each of n items contributes.
      combine: f64[..., k] sums over items -> f64[...] scores.
    """

    items: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray] = ratio_of_sums

    def __len__(self) -> int:
        return len(self.items)

    def value(self) -> float:
        """The score of all items; NaN where it is not defined."""
        return float(self.combine(self.items.sum(0)))


def ratio(top: ArrayLike, bottom: ArrayLike) -> Statistic:
    """Sum of `top` over sum of `bottom`: an error rate."""
    return Statistic(np.column_stack([np.asarray(top, np.float64), np.asarray(bottom, np.float64)]))


def mean(values: Sequence[float]) -> Statistic:
    """The mean of one number an item."""
    return ratio(values, np.ones(len(values)))
