"""The pure boundary of the model: parameters are plain nested dicts of arrays, the module a view of them.

Training, sharding, checkpoints and conversion see `abstract_params`, `init_params` and `bind`, never Flax.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.lora import linear_layers
from llaso_jax.modeling.speech_lm import SpeechLM, SpeechLMConfig
from llaso_jax.sharding.rules import (
    FSDP_TENSOR,
    LogicalAxes,
    ShardingRules,
    check_axes,
    named_sharding,
)

Params = dict[str, Any]

ENCODER = "audio_tower/"
"""Where the speech encoder's parameters are."""


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """What a parameter is before it exists: shape, dtype and the meaning of its axes."""

    shape: tuple[int, ...]
    dtype: Any
    logical_axes: LogicalAxes

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether the first axis is the layers."""
        return self.logical_axes[0] == "layers"


@functools.lru_cache(maxsize=16)
def _abstract(cfg: SpeechLMConfig, compute: ComputeConfig) -> tuple[nnx.GraphDef, nnx.State]:
    module = nnx.eval_shape(lambda: SpeechLM(cfg, compute, rngs=nnx.Rngs(0)))
    return nnx.split(module)


def abstract_params(cfg: SpeechLMConfig) -> dict[str, ParamInfo]:
    """Every parameter of the model by its path ("audio_tower/conv1/weight"), without allocating any."""
    _, state = _abstract(cfg, ComputeConfig())
    return {
        "/".join(map(str, path)): ParamInfo(
            tuple(variable.get_value().shape),
            variable.get_value().dtype,
            variable.get_metadata()["logical_axes"],
        )
        for path, variable in nnx.to_flat_state(state)
    }


@functools.lru_cache(maxsize=16)
def linear_paths(cfg: SpeechLMConfig) -> frozenset[str]:
    """Paths of the model's linear layers, which adapters can change."""
    graph, state = _abstract(cfg, ComputeConfig())
    return frozenset(linear_layers(nnx.merge(graph, state)))


def param_shardings(
    cfg: SpeechLMConfig,
    mesh: Mesh | AbstractMesh,
    rules: ShardingRules = FSDP_TENSOR,
    *,
    as_used: bool = False,
) -> dict[str, NamedSharding]:
    """How every parameter of the model is stored on `mesh`, by path; `as_used`: as computation sees it.

    Raises:
      ShardingError: a dimension that does not divide over the mesh, an axis without a rule, or an axis of the mesh
        that splits nothing.
    """
    check_axes(rules, mesh.shape)
    shardings = {}
    for path, info in abstract_params(cfg).items():
        own = rules.encoder if rules.encoder and path.startswith(ENCODER) else rules
        table = own.compute if as_used else own.storage
        shardings[path] = named_sharding(path, info.shape, info.logical_axes, table, mesh)
    return shardings


def count_params(cfg: SpeechLMConfig) -> int:
    """Number of parameters of the model."""
    return sum(info.size for info in abstract_params(cfg).values())


def init_params(cfg: SpeechLMConfig, key: jax.Array) -> Params:
    """Random f32 parameters. Pure: jit it with output shardings to create them in their shards."""
    module = SpeechLM(cfg, ComputeConfig(), rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module))


def bind(cfg: SpeechLMConfig, params: Params, compute: ComputeConfig | None = None) -> SpeechLM:
    """The model over `params`: call its methods inside jit, grad or shard_map like any pure function.

    Example:
      loss = bind(cfg, params).loss_sum(batch)
    """
    graph, _ = _abstract(cfg, compute or ComputeConfig())
    return nnx.merge(graph, nnx.State(params))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> flat dict of "a/b/c" paths, sorted by path."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, child in sorted(node.items()):
            if isinstance(child, Mapping):
                yield from walk(child, f"{prefix}{name}/")
            else:
                yield prefix + name, child

    return dict(walk(params, ""))


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Flat dict of "a/b/c" paths -> nested dict."""
    nested: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def split(params: Params, trainable: Callable[[str], bool]) -> tuple[Params, Params]:
    """Nested params -> (trainable, frozen) nested dicts by a predicate on paths."""
    flat = flatten(params)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if trainable(path)}),
        unflatten({path: leaf for path, leaf in flat.items() if not trainable(path)}),
    )


def merge(*parts: Params) -> Params:
    """Inverse of `split`: disjoint nested dicts -> one."""
    return unflatten({path: leaf for part in parts for path, leaf in flatten(part).items()})


def cast(params: Params, dtype: Any) -> Params:
    """All leaves in `dtype`."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
