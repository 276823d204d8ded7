"""From speech features to the width of the language model: `linear` or `mlpNx_gelu`, after stacking k frames.

Source: LLaSO llaso/model/multimodal_projector/builder.py (k = 1 there).
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx

from llaso_jax.modeling.layers import Linear, gelu, symmetric_uniform


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Shape of the projector.

    Attributes:
      type: `linear`, or `mlpNx_gelu`: N linear layers with exact GELU between them.
      stack: k consecutive frames concatenated before the first layer (k = 1: one LLM position per 20 ms).
      init_gain: factor on the random weights. At 1 they are torch.nn.Linear's, as in LLaSO, whose layers
        shrink a signal to 0.58 of its size each; sqrt(3) keeps it.
    """

    type: str = "mlp2x_gelu"
    stack: int = 1
    init_gain: float = 1.0

    def __post_init__(self) -> None:
        if self.type != "linear" and re.fullmatch(r"mlp[1-9]\d*x_gelu", self.type) is None:
            raise ValueError(
                f"projector type {self.type!r} is unknown: use 'linear' or 'mlpNx_gelu' such as mlp2x_gelu."
            )
        if self.stack < 1:
            raise ValueError(f"projector stack={self.stack} must be at least 1 frame.")

    @property
    def num_layers(self) -> int:
        """Number of linear layers."""
        return 1 if self.type == "linear" else int(self.type[3 : self.type.index("x")])


def stack_frames(features: jax.Array, k: int) -> jax.Array:
    """Concatenate k consecutive frames: [B, T, D] -> [B, ceil(T/k), k*D], zeros past the end."""
    b, t, d = features.shape
    groups = -(-t // k)
    padded = jnp.pad(features, ((0, 0), (0, groups * k - t), (0, 0)))
    return padded.reshape(b, groups, k * d)


class Projector(nnx.Module):
    """`linear_0` .. `linear_{N-1}`: `projector.{2i}` in a LLaSO checkpoint."""

    def __init__(self, cfg: ProjectorConfig, dim_in: int, dim_out: int, *, rngs: nnx.Rngs) -> None:
        width = dim_in * cfg.stack
        for i in range(cfg.num_layers):
            # gain * U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch.nn.Linear's initialisation of weight and bias.
            uniform = symmetric_uniform(cfg.init_gain * width**-0.5)
            layer = Linear(
                (width,),
                (dim_out,),
                in_axes=("embed_out",),
                out_axes=("embed",),
                bias=True,
                init=uniform,
                bias_init=uniform,
                rngs=rngs,
            )
            setattr(self, f"linear_{i}", layer)
            width = dim_out
        self.cfg = cfg

    def __call__(self, features: jax.Array) -> jax.Array:
        """features: [B, T, D_in] -> [B, ceil(T/k), D_out]."""
        x = stack_frames(features, self.cfg.stack)
        for i in range(self.cfg.num_layers):
            x = getattr(self, f"linear_{i}")(gelu(x) if i else x)
        return x
