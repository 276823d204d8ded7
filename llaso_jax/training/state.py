"""What a training run holds on its devices: trainable and frozen parameters, optimizer state, their layout."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llaso_jax.modeling.functional import (
    ParamInfo,
    Params,
    abstract_params,
    flatten,
    init_params,
    param_shardings,
    split,
    unflatten,
)
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.rules import FSDP_TENSOR, ShardingRules
from llaso_jax.sharding.strategies import Frozen

logger = logging.getLogger(__name__)


class TrainState(NamedTuple):
    """What a step changes (or the shardings of that). Frozen parameters are not part of it.

    step: i32[] optimizer steps done; trainable: nested f32 parameters; opt_state: optax state.
    """

    step: Any
    trainable: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where things live: mesh, rules and the sharding of every parameter. Compared by identity.

    params: of a parameter that is trained; frozen: of one that is not.
    """

    mesh: Mesh
    rules: ShardingRules
    params: dict[str, NamedSharding]
    frozen: dict[str, NamedSharding]

    @classmethod
    def of(
        cls,
        cfg: SpeechLMConfig,
        mesh: Mesh,
        rules: ShardingRules = FSDP_TENSOR,
        *,
        frozen: Frozen = "sharded",
    ) -> "Layout":
        """Layout of the model `cfg` on `mesh`; raises ShardingError where it does not fit."""
        params = param_shardings(cfg, mesh, rules)
        as_used = frozen == "replicated"
        return cls(mesh, rules, params, param_shardings(cfg, mesh, rules, as_used=as_used))

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, P())

    @property
    def on_cpu(self) -> bool:
        """The mesh is of CPU devices."""
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def batch_shards(self) -> int:
        """Number of parts a batch's rows are split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.activation["batch"])

    def micro_batches(self) -> NamedSharding:
        """Sharding of stacked micro-batches [G, B, ...]: rows over the batch axes."""
        return NamedSharding(self.mesh, P(None, self.rules.activation["batch"]))

    def beside(self, paths: Iterable[str]) -> "Layout":
        """This layout, and at `paths` parameters that are no model's, a copy on every device."""
        more = dict.fromkeys(paths, self.replicated)
        return dataclasses.replace(self, params=self.params | more) if more else self

    def nested(self, params: Params) -> Params:
        """The shardings of the parameters in `params`, in the same nesting."""
        return unflatten({path: self.params[path] for path in flatten(params)})


def random_params(
    cfg: SpeechLMConfig,
    layout: Layout,
    seed: int,
    *,
    wanted: Callable[[str], bool] = lambda path: True,
) -> Params:
    """Random f32 parameters of the `wanted` paths, created in their shards; the same values on every mesh."""
    paths = [path for path in abstract_params(cfg) if wanted(path)]
    shardings = unflatten({path: layout.params[path] for path in paths})
    # The program runs once: on CPU, optimizing it takes four times what it saves (16 s of 20 s).
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    init = jax.jit(
        lambda key: split(init_params(cfg, key), wanted)[0],
        out_shardings=shardings,
        compiler_options=options if layout.on_cpu else None,
    )
    return init(jax.random.key(seed))


def zero_params(infos: Mapping[str, ParamInfo], layout: Layout) -> Params:
    """Parameters of zeros, by path, where `layout` has them."""
    if not infos:
        return {}
    shardings = unflatten({path: layout.params[path] for path in infos})

    def zeros() -> Params:
        return unflatten({path: jnp.zeros(info.shape, info.dtype) for path, info in infos.items()})

    return jax.jit(zeros, out_shardings=shardings)()


def split_params(
    params: Params, scales: dict[str, float | None], frozen_dtype: Any, layout: Layout
) -> tuple[Params, Params]:
    """(trainable f32 masters, frozen in `frozen_dtype`) by learning-rate scale, each where `layout` has it."""
    trainable, frozen = split(params, lambda path: scales[path] is not None)

    def placed(parts: Params, dtype: Any, shardings: dict[str, NamedSharding]) -> Params:
        flat = flatten(parts)
        return unflatten(
            {
                path: jax.device_put(leaf.astype(dtype), shardings[path])
                for path, leaf in flat.items()
            }
        )

    return (
        placed(trainable, jnp.float32, layout.params),
        placed(frozen, frozen_dtype, layout.frozen),
    )


def create_state(
    trainable: Params, optimizer: optax.GradientTransformationExtraArgs, layout: Layout
) -> TrainState:
    """Step 0 with fresh optimizer state, moments sharded like their parameters."""
    shardings = state_shardings(trainable, optimizer, layout)

    def init(trainable: Params) -> tuple[jax.Array, Any]:
        return jnp.zeros((), jnp.int32), optimizer.init(trainable)

    outputs = (shardings.step, shardings.opt_state)
    step, opt_state = jax.jit(init, out_shardings=outputs)(trainable)
    return TrainState(step, trainable, opt_state)


def state_shardings(
    trainable: Params, optimizer: optax.GradientTransformationExtraArgs, layout: Layout
) -> TrainState:
    """Sharding of every leaf of the state, in the state's own structure."""
    params = layout.nested(trainable)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        params,
        transform_non_params=lambda _: layout.replicated,
    )
    return TrainState(layout.replicated, params, opt_state)
