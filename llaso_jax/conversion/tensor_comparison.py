"""Two sets of weights, parameter by parameter; of each side one tensor, or some rows of it, is in memory."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from llaso_jax.conversion.tensors import BLOCK_BYTES, Tensor, row_boxes
from llaso_jax.conversion.weights import Weights

_PIECE = 1 << 20  # elements compared at a time: their f64 copies stay small


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """How a parameter of A differs from that of B.

    Attributes:
      path: which parameter.
      shapes: in A and B, without vocabulary padding; where they differ, only what both have is compared.
      dtypes: in A and B.
      max_abs: largest |a - b|; infinite where only one of them is not a number, or nothing can be compared.
      max_rel: that, over the largest |a|.
      layers: indices of the layers that differ (0 for a parameter that is not stacked).
      rule: what "within" means.
      within: whether that is kept to, with equal shapes.
    """

    path: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    max_abs: float
    max_rel: float
    layers: tuple[int, ...]
    rule: str
    within: bool

    @property
    def bit_equal(self) -> bool:
        """Same shape, same dtype, same bits."""
        return (
            self.shapes[0] == self.shapes[1]
            and self.dtypes[0] == self.dtypes[1]
            and not self.layers
        )


def compare_tensors(
    a: Weights,
    b: Weights,
    *,
    dtype: Any = None,
    tolerance: float | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Iterator[TensorDifference]:
    """Compare the parameters that both sides have, in the order of A.

    Args:
      a, b: sides.
      dtype: both are rounded to it first; default as they are.
      tolerance: largest difference allowed, relative to the largest |a| of the parameter. Default: none if
        the dtypes are the same, else the rounding of the coarser one.
      progress: called with path and bytes of A after every parameter.
    """
    for path, layers in a.pieces.items():
        if path in b.pieces:
            yield _compare(
                path,
                _unpadded(a, path, layers),
                _unpadded(b, path, b.pieces[path]),
                dtype,
                tolerance,
            )
            if progress is not None:
                progress(path, sum(math.prod(t.shape) * t.dtype.itemsize for t in layers))


@dataclasses.dataclass(frozen=True)
class _Side:
    layers: list[Tensor]
    shape: tuple[int, ...]
    dtype: np.dtype


def _unpadded(weights: Weights, path: str, layers: list[Tensor]) -> _Side:
    shape = layers[0].shape
    if path.endswith(("embed_tokens/weight", "lm_head/weight")):
        shape = (min(weights.cfg.text.vocab_size, shape[0]), *shape[1:])
    return _Side(layers, shape, np.dtype(layers[0].dtype))


def _compare(
    path: str, a: _Side, b: _Side, dtype: Any, tolerance: float | None
) -> TensorDifference:
    dtypes = (a.dtype, b.dtype) if dtype is None else (np.dtype(dtype),) * 2
    limit = _limit(dtypes, tolerance)
    shapes = _shape(path, a), _shape(path, b)
    worst = scale = 0.0
    within = shapes[0] == shapes[1]
    differing = []
    if len(a.shape) != len(b.shape) or a.shape[1:] != b.shape[1:]:
        worst, within = math.inf, False
    else:
        common = (min(a.shape[0], b.shape[0]), *a.shape[1:])
        for index, pair in enumerate(zip(a.layers, b.layers, strict=False)):
            equal = True
            # Blocks that the one with larger rows allows; a single one if either has to be computed.
            larger = max(pair, key=lambda tensor: (not tensor.by_rows, tensor.dtype.itemsize))
            for box in row_boxes(larger, common, block_bytes=BLOCK_BYTES):
                x, y = (
                    np.ascontiguousarray(side.read(box).astype(wanted, copy=False)).reshape(-1)
                    for side, wanted in zip(pair, dtypes, strict=True)
                )
                for start in range(0, x.size, _PIECE):
                    found = _differ(x[start : start + _PIECE], y[start : start + _PIECE], limit)
                    worst, scale = max(worst, found.max_abs), max(scale, found.scale)
                    equal &= found.bit_equal
                    within &= found.within
            if not equal:
                differing.append(index)
    relative = 0.0 if worst == 0 else (worst / scale if scale else math.inf)
    if tolerance is not None:
        within = shapes[0] == shapes[1] and relative <= tolerance
    return TensorDifference(
        path=path,
        shapes=shapes,
        dtypes=(str(dtypes[0]), str(dtypes[1])),
        max_abs=worst,
        max_rel=relative,
        layers=tuple(differing),
        rule=limit.rule,
        within=within,
    )


def _shape(path: str, side: _Side) -> tuple[int, ...]:
    return (len(side.layers), *side.shape) if "/layers/" in path else side.shape


@dataclasses.dataclass(frozen=True)
class _Limit:
    """How far apart two values may be: relative * the larger one + absolute; None: they must have the same bits."""

    rule: str
    relative: float | None = None
    absolute: float = 0.0


def _limit(dtypes: tuple[np.dtype, ...], tolerance: float | None) -> _Limit:
    if tolerance is not None:
        return _Limit(f"within {tolerance:g} of its largest entry")
    if dtypes[0] == dtypes[1]:
        return _Limit(f"bit-equal, both {dtypes[0]}")
    infos = [jnp.finfo(dtype) for dtype in dtypes]
    coarser = max(infos, key=lambda info: float(info.eps))
    # Rounding to nearest moves a value by half a unit in the last place, and near zero by half the
    # smallest value there is.
    return _Limit(
        f"within the rounding of {coarser.dtype}, the coarser dtype",
        float(coarser.eps) / 2,
        max(float(info.smallest_subnormal) for info in infos) / 2,
    )


@dataclasses.dataclass(frozen=True)
class _Difference:
    max_abs: float
    scale: float
    bit_equal: bool
    within: bool


def _differ(x: np.ndarray, y: np.ndarray, limit: _Limit) -> _Difference:
    """Flat arrays of one length against each other."""
    equal = x.dtype == y.dtype and bool(np.array_equal(x.view(np.uint8), y.view(np.uint8)))
    x, y = x.astype(np.float64), y.astype(np.float64)
    scale = float(np.abs(x[np.isfinite(x)]).max(initial=0))
    if equal:
        return _Difference(0.0, scale, bit_equal=True, within=True)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(x - y))
    apart = np.where(np.isnan(apart), np.inf, apart)
    within = False
    if limit.relative is not None:
        larger = np.maximum(np.abs(x), np.abs(y))
        within = bool((same | (apart <= limit.relative * larger + limit.absolute)).all())
        within &= bool(np.isfinite(apart).all())
    return _Difference(float(apart.max(initial=0)), scale, bit_equal=False, within=within)
