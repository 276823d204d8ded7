"""How close is equal: the one table of tolerances of the suite. Edits to it are reviewed alone.

A difference is measured against the largest entry of the expected array, so that small gradients
are held as tightly as large activations.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

LEAF = 1e-5  # one f32 module, or two computations of ours that should be the same
COMPOSED = 1e-4  # f32 through a whole stack of modules, against another library
BFLOAT16 = 1e-2  # a kernel whose weights and results are rounded to bf16 (2**-9 each), against f32

logger = logging.getLogger(__name__)


def difference(actual: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute expected entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = float(np.abs(expected).max())
    assert np.isfinite(scale), "the expected array is not finite"
    assert scale > 0, "the expected array is zero: nothing would be compared"
    return float(np.abs(actual - expected).max()) / scale


def assert_close(actual: Any, expected: Any, tolerance: float, name: str = "output") -> None:
    """Assert that arrays, or nested dicts of arrays with the same keys, agree.

    pytest -o log_cli=true --log-cli-level=INFO lists every difference.
    """
    if isinstance(expected, Mapping):
        assert set(actual) == set(expected), f"{name}: {set(actual) ^ set(expected)}"
        for key in expected:
            assert_close(actual[key], expected[key], tolerance, f"{name}/{key}")
        return
    found = difference(actual, expected)
    logger.info("%s: %.2e (tolerance %.0e)", name, found, tolerance)
    assert found <= tolerance, f"{name}: relative difference {found:.3e} exceeds {tolerance:.0e}"
