"""How the model is computed: choices that change speed and memory, never what is computed."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llaso_jax.modeling.dropout import layer_keys, use_dropout
from llaso_jax.modeling.kernels.attention.api import Implementation
from llaso_jax.modeling.kernels.attention.residuals import RESIDUALS
from llaso_jax.modeling.kernels.product import PRODUCT

RematPolicy = Literal["none", "dots", "layer", "offload"]
_LAYER_INPUT = "layer_input"


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Compute choices shared by encoder and decoder.

    Attributes:
      dtype: dtype of activations and matrix products; norms, softmax, RoPE and loss are f32 always. bfloat16 on
        accelerators; on a CPU it is faster where weights are frozen (kernels/product.py), and slower in generation.
      remat: what the backward pass recomputes inside a layer. none: nothing; dots: everything but
        the outputs of matrix products and of attention; layer: the whole layer; offload: the whole layer, its inputs
        waiting in the host's memory.
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


def scan_layers(
    body: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    layers: Any,
    policy: RematPolicy,
) -> tuple[jax.Array, Any]:
    """Run `x` through a stack of layers: `body(x, layer)` gives the next x and what is kept of the layer.

    Args:
      body: traced once. Its dropout, if any is active, has a key of its own for each layer.
      x: input of the first layer.
      layers: parameters with a leading axis of layers.
      policy: what the backward pass recomputes.

    Returns:
      The output of the last layer, and what was kept, stacked.
    """
    num = jax.tree.leaves(layers)[0].shape[0]

    def step(x: jax.Array, scanned: tuple[Any, jax.Array | None]):
        layer, key = scanned
        if policy == "offload":
            x = checkpoint_name(x, _LAYER_INPUT)
        with use_dropout(key):
            return body(x, layer)

    return jax.lax.scan(_rematerialize(step, policy), x, (layers, layer_keys(num)))


def _rematerialize(body: Callable, policy: RematPolicy) -> Callable:
    if policy == "none":
        return body
    policies = jax.checkpoint_policies
    saved = {
        # The kernels' and loops' own products are inside attention, whose results are all that is kept of it.
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(RESIDUALS, PRODUCT),
        ),
        "layer": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]
    # Inside scan the barrier against common-subexpression elimination is not needed (jax.checkpoint docs).
    return jax.checkpoint(body, policy=saved, prevent_cse=False)
