"""Cross-entropy over a large vocabulary: one call, and the plain form it is checked against."""

from llaso_jax.modeling.kernels.cross_entropy.chunked import cross_entropy
from llaso_jax.modeling.kernels.cross_entropy.reference import reference_cross_entropy

__all__ = ["cross_entropy", "reference_cross_entropy"]
