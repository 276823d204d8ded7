"""AdamW over the trainable parameters, and which parameters those are.

Freezing is data: an ordered list of rules, the first pattern that matches a path decides, every parameter must
be covered and every rule must match something. Frozen parameters have no gradient and no optimizer state.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from llaso_jax.errors import ConfigError
from llaso_jax.modeling.functional import Params, flatten, unflatten
from llaso_jax.modeling.lora import adapted_layer


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """What happens to the parameters whose whole path matches a pattern.

    Attributes:
      pattern: regular expression on paths such as "language_model/layers/mlp/up_proj/weight".
      learning_rate_scale: factor on the stage's learning rate; None freezes the parameters.
    """

    pattern: str
    learning_rate_scale: float | None = 1.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"parameters: pattern {self.pattern!r} is not a regular expression ({error})."
            ) from error
        if self.learning_rate_scale is not None and self.learning_rate_scale <= 0:
            raise ConfigError(
                f"parameters: learning_rate_scale={self.learning_rate_scale} of {self.pattern!r} must be "
                f"positive; use null to freeze."
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (defaults: LLaSO stage 1, spec of the published scripts).

    Attributes:
      learning_rate: peak learning rate.
      warmup_ratio: share of the run spent warming up linearly from 0.
      schedule: cosine decays to `final_ratio` of the peak at the end of the run; constant stays.
      final_ratio: learning rate at the end of the run, as a share of the peak.
      b1, b2, eps, weight_decay: AdamW; decay applies to matrices, not to norms and biases.
      clip_norm: largest global gradient norm; larger gradients are scaled down to it.
    """

    learning_rate: float = 1e-3
    warmup_ratio: float = 0.0015
    schedule: Literal["cosine", "constant"] = "cosine"
    final_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be positive.")
        for name in ("warmup_ratio", "final_ratio", "b1", "b2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must lie in 0..1.")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay} must not be negative.")


def learning_rate_at(progress: float, cfg: OptimizerConfig) -> float:
    """Learning rate when `progress` in 0..1 of the stage is done.

    Progress is measured in samples (or in steps where max_steps is set), so packing, batch size and mesh do not
    change the schedule of an epoch.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < cfg.warmup_ratio:
        return cfg.learning_rate * progress / cfg.warmup_ratio
    if cfg.schedule == "constant" or cfg.warmup_ratio == 1:
        return cfg.learning_rate
    done = (progress - cfg.warmup_ratio) / (1 - cfg.warmup_ratio)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return cfg.learning_rate * (cfg.final_ratio + (1 - cfg.final_ratio) * cosine)


def learning_rate_scales(
    paths: Iterable[str], rules: tuple[ParameterRule, ...]
) -> dict[str, float | None]:
    """Learning-rate factor of every parameter; None = frozen.

    Raises:
      ConfigError: a parameter no rule covers, or a rule that decides nothing.
    """
    scales: dict[str, float | None] = {}
    unused = set(rules)
    for path in paths:
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)
        if rule is None:
            raise ConfigError(
                f"no rule of 'parameters' covers {path}. Add one, such as "
                f"{{pattern: '.*', learning_rate_scale: null}} at the end to freeze the rest."
            )
        unused.discard(rule)
        scales[path] = rule.learning_rate_scale
    for rule in rules:
        if rule in unused:
            raise ConfigError(
                f"rule {rule.pattern!r} of 'parameters' decides for no parameter: a misspelt path, "
                f"or an earlier rule already covers it."
            )
    if all(scale is None for scale in scales.values()):
        raise ConfigError("every parameter is frozen by 'parameters': nothing would be trained.")
    return scales


def trains_weights(scales: Mapping[str, float | None], part: str) -> bool:
    """Whether weights of `part` are trained: its own, not only adapters beside them."""
    return any(
        scale is not None and path.startswith(f"{part}/") and adapted_layer(path) is None
        for path, scale in scales.items()
    )


def make_optimizer(
    cfg: OptimizerConfig, scales: dict[str, float | None]
) -> optax.GradientTransformationExtraArgs:
    """The update rule on the trainable tree: clip, Adam, decay, times -learning_rate.

    `update(grads, state, params, learning_rate=f32[])` takes the learning rate from the caller, which
    derives it from the position in the data. Stages that differ in schedule only get the same object.
    """
    return _update_rule(
        cfg.b1, cfg.b2, cfg.eps, cfg.weight_decay, cfg.clip_norm, tuple(sorted(scales.items()))
    )


@functools.lru_cache(maxsize=4)
def _update_rule(
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    scales: tuple[tuple[str, float | None], ...],
) -> optax.GradientTransformationExtraArgs:
    adam = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=_decayed),
    )
    factor_of = dict(scales)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        learning_rate = extra["learning_rate"]
        directions, state = adam.update(updates, state, params)
        paths = flatten(cast(Params, directions))
        factors = unflatten({path: factor_of[path] for path in paths})
        return jax.tree.map(lambda d, f: -learning_rate * f * d, directions, factors), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _decayed(params: Params) -> Params:
    def is_matrix(path: str) -> bool:
        return path.endswith("/weight") and "norm" not in path

    return unflatten({path: is_matrix(path) for path in flatten(params)})


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together, f32[]."""
    return jnp.sqrt(
        sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
    )
