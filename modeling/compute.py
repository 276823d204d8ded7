"""How the model is computed: choices that change speed and memory, never what is computed."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.attention.api import Implementation

RematPolicy = Literal["none", "dots", "layer"]


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Compute choices shared by encoder and decoder.

    Attributes:
      dtype: dtype of activations and matrix products. float32 on CPU (XLA:CPU bf16 is 2.5-12.7x
        slower), bfloat16 on accelerators; norms, softmax, RoPE and loss are f32 always.
      remat: what the backward pass recomputes inside a layer. none: nothing; dots: everything but
        the outputs of matrix products; layer: the whole layer.
      attention: implementation of attention, in training and generation (docs/kernels.md). auto: the platform's
        Pallas kernel on TPU and GPU, on CPU scores in chunks, or all at once where they are few.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: RematPolicy = "none"
    attention: Implementation = "auto"

    @property
    def jnp_dtype(self) -> Any:
        """`dtype` as a JAX dtype."""
        return jnp.dtype(self.dtype)


def rematerialize(body: Callable, policy: RematPolicy) -> Callable:
    """Wrap the body of a scan over layers in the named rematerialization policy."""
    if policy == "none":
        return body
    saved = (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        if policy == "dots"
        else jax.checkpoint_policies.nothing_saveable
    )
    # Inside scan the barrier against common-subexpression elimination is not needed (jax.checkpoint docs).
    return jax.checkpoint(body, policy=saved, prevent_cse=False)
