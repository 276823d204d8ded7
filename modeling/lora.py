"""LoRA: low-rank changes of linear layers, chosen by pattern (arXiv 2106.09685).

y = W x + b + scale * B A dropout(x), scale = alpha / rank, or alpha / sqrt(rank) rank-stabilized (arXiv 2312.03732).
`lora_A` starts as peft's (uniform in +-1/sqrt(inputs)), `lora_B` as zeros: a new adapter changes nothing.
"""

import dataclasses
import math
import re

import jax
from flax import nnx

from llaso_jax.modeling.layers import Linear, LowRank, symmetric_uniform
from llaso_jax.sharding.rules import LogicalAxes


class LoraError(ValueError):
    """Rules that do not fit the model."""


@dataclasses.dataclass(frozen=True)
class LoraRule:
    """Linear layers that get an adapter. Raises ValueError for values that make none.

    Attributes:
      pattern: regular expression on whole paths of linear layers, such as
        "language_model/layers/self_attn/(q|v)_proj" or ".*/layers/.*". All layers of a stack are one path.
      rank: rows of A, columns of B.
      alpha: numerator of the scale.
      dropout: share of the adapter's inputs zeroed in training.
      rank_stabilized: divide alpha by sqrt(rank) instead of rank.
    """

    pattern: str
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"lora pattern {self.pattern!r} is not a regular expression ({error})."
            ) from error
        if self.rank < 1:
            raise ValueError(f"lora rank={self.rank} must be at least 1.")
        if self.alpha <= 0:
            raise ValueError(f"lora alpha={self.alpha} must be positive: with 0 nothing is learnt.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout={self.dropout} must be at least 0 and below 1.")

    @property
    def scale(self) -> float:
        """Factor on B A x."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilized)


def lora_scale(alpha: float, rank: int, rank_stabilized: bool) -> float:
    """Factor on B A x: alpha / rank, or alpha / sqrt(rank) if `rank_stabilized`."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def adapted_layer(path: str) -> str | None:
    """The linear layer whose adapter the parameter at `path` belongs to, None if it is of no adapter."""
    linear, mark, _ = path.partition("/lora_")
    return linear if mark else None


def rule_for(path: str, rules: tuple[LoraRule, ...]) -> LoraRule | None:
    """The first of `rules` that matches the linear layer at `path`, None if none does."""
    return next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)


def linear_layers(model: nnx.Module) -> dict[str, Linear]:
    """Every linear layer of `model` by its path; the layers of a stack are one."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }


def add_lora(model: nnx.Module, rules: tuple[LoraRule, ...], rngs: nnx.Rngs) -> None:
    """Give every linear layer of `model` that a rule matches its adapter; the first rule that matches decides.

    Raises:
      LoraError: a rule that decides for no linear layer.
    """
    linears = linear_layers(model)
    used = set()
    for path, linear in sorted(linears.items()):
        rule = rule_for(path, rules)
        if rule is not None:
            used.add(id(rule))
            _add(linear, path, rule, rngs)
    for rule in rules:
        if id(rule) not in used:
            raise LoraError(
                f"lora pattern {rule.pattern!r} decides for no linear layer (or an earlier rule does). "
                f"The linear layers are: {', '.join(sorted(linears))}."
            )


def _add(linear: Linear, path: str, rule: LoraRule, rngs: nnx.Rngs) -> None:
    """Parameters of the shape and axes of the weight, which may be a stack of layers."""
    axes: LogicalAxes = linear.weight.get_metadata()["logical_axes"]
    shape = linear.weight.get_value().shape
    stacked = axes[:1] == ("layers",)
    layers, shape, axes = shape[:stacked], shape[stacked:], axes[stacked:]
    inner = len(shape) - linear.num_in
    bound = math.prod(shape[inner:]) ** -0.5

    def weight(initializer, shape: tuple[int, ...], axes: LogicalAxes) -> nnx.Dict:
        value = initializer(rngs.params(), (*layers, *shape), jax.numpy.float32)
        return nnx.Dict(weight=nnx.Param(value, logical_axes=(*(("layers",) * stacked), *axes)))

    linear.lora_A = weight(
        symmetric_uniform(bound), (rule.rank, *shape[inner:]), ("rank", *axes[inner:])
    )
    linear.lora_B = weight(
        jax.nn.initializers.zeros, (*shape[:inner], rule.rank), (*axes[:inner], "rank")
    )
    linear.low_rank = LowRank(path, rule.scale, rule.dropout)
