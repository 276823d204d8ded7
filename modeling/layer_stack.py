"""Running a stack of equal layers: one traced layer in a loop, or layer by layer where the stack is taken apart.

XLA:CPU copies what a loop takes out of a stacked array: every pass over the layers copies all their weights, which
costs a step of generation several times its own work. Arrays taken apart are read where they lie.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P


def over_layers(
    step: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, layers: Any, beside: Any
) -> tuple[Any, Any]:
    """`carry, kept = step(carry, layer, beside[i])` for each layer, as jax.lax.scan has it.

    Args:
      step: traced once for stacked layers, and once for each layer where they are apart.
      carry: arrays of the same shapes before and after each step.
      layers: parameters with a leading axis of layers, or taken apart.
      beside: arrays with a leading axis of layers.

    Returns:
      The last carry, and what was kept of each layer, stacked.
    """
    if not _is_apart(layers):
        return jax.lax.scan(lambda carry, xs: step(carry, *xs), carry, (layers, beside))
    kept = []
    for index in range(len(jax.tree.leaves(layers, is_leaf=_is_tuple)[0])):
        carry, of_layer = step(carry, _nth(layers, index), _nth(beside, index))
        kept.append(of_layer)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


def take_apart(stack: jax.Array) -> tuple[jax.Array, ...]:
    """The layers of an array on CPU devices, [L, ...] -> L arrays, sharded as it was.

    Nothing is copied where a layer begins at a multiple of 64 bytes: the arrays look into the memory of `stack`,
    which lives as long as they do.
    """
    sharding = _sharding_of_layers(stack)
    shards = [(shard.device, np.asarray(shard.data)) for shard in stack.addressable_shards]
    return tuple(
        jax.make_array_from_single_device_arrays(
            stack.shape[1:],
            sharding,
            [jax.device_put(values[index], device) for device, values in shards],
        )
        for index in range(stack.shape[0])
    )


def _sharding_of_layers(stack: jax.Array) -> Sharding:
    if not isinstance(stack.sharding, NamedSharding):
        return stack.sharding
    first, *rest = stack.sharding.spec or (None,)
    assert first is None, stack.sharding
    return NamedSharding(stack.sharding.mesh, P(*rest))


def _nth(layers: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], layers, is_leaf=_is_tuple)


def _is_tuple(node: Any) -> bool:
    return isinstance(node, tuple)


def _is_apart(layers: Any) -> bool:
    return _is_tuple(jax.tree.leaves(layers, is_leaf=_is_tuple)[0])
