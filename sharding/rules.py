"""Logical axes -> mesh axes, for stored parameters, parameters in use, and activations.

A model names what an axis *is* ("heads", "ffn", "vocab"); a `ShardingRules` table says over which mesh
axes it is split. Two tables for parameters give FSDP (ZeRO-3) in two lines: `storage` splits the
"embed" axis over `fsdp`, `compute` does not, so each layer is gathered where it is used and
gradients are reduce-scattered back.

There is no catch-all: a logical axis without an entry is an error.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MeshAxes = tuple[str, ...]
LogicalAxes = tuple[str | None, ...]


class ShardingError(ValueError):
    """A mesh, a rule and a shape that do not fit together. The message carries both numbers."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of every logical axis, for parameters at rest, parameters in use, and activations."""

    name: str
    storage: Mapping[str, MeshAxes]
    compute: Mapping[str, MeshAxes]
    activation: Mapping[str, MeshAxes]


# What each logical axis of a parameter means:
#   embed       width of the residual stream (d_model, hidden_size): the FSDP axis of every matrix
#   heads, kv_heads, ffn, vocab   split by tensor parallelism
#   head_dim, mel, kernel, position, rank, layers   never split (small, or scanned over)
_UNSPLIT: dict[str, MeshAxes] = dict.fromkeys(
    ("norm", "head_dim", "mel", "kernel", "position", "rank", "layers"), ()
)
_TENSOR: dict[str, MeshAxes] = dict.fromkeys(("heads", "kv_heads", "ffn", "vocab"), ("tensor",))

FSDP_TENSOR = ShardingRules(
    name="fsdp+tensor",
    storage={"embed": ("fsdp",), "embed_out": (), **_TENSOR, **_UNSPLIT},
    compute={"embed": (), "embed_out": (), **_TENSOR, **_UNSPLIT},
    activation={
        "batch": ("data", "fsdp"),
        "sequence": (),
        "embed": (),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "ffn": ("tensor",),
        "vocab": ("tensor",),
    },
)


def to_spec(logical_axes: LogicalAxes, table: Mapping[str, MeshAxes]) -> P:
    """PartitionSpec of an array whose dimensions are `logical_axes` (None = never split).

    Raises:
      ShardingError: a name without a rule, or one mesh axis used for two dimensions.
    """
    entries: list[MeshAxes | None] = []
    used: dict[str, str] = {}
    for axis in logical_axes:
        if axis is None:
            entries.append(None)
            continue
        if axis not in table:
            raise ShardingError(
                f"logical axis {axis!r} of {logical_axes} has no sharding rule; known axes: "
                f"{', '.join(sorted(table))}. Add it to the rules in sharding/rules.py."
            )
        for mesh_axis in table[axis]:
            if mesh_axis in used:
                raise ShardingError(
                    f"mesh axis {mesh_axis!r} would split both {used[mesh_axis]!r} and {axis!r} of "
                    f"{logical_axes}: an axis can split one dimension of an array only."
                )
            used[mesh_axis] = axis
        entries.append(table[axis] or None)
    return P(*entries)


def mesh_axes_of(entry: str | MeshAxes | None) -> MeshAxes:
    """Mesh axes in an entry of a PartitionSpec, which holds one axis as its bare name and none as None."""
    return (entry,) if isinstance(entry, str) else entry or ()


def check_divisible(
    name: str,
    shape: tuple[int, ...],
    logical_axes: LogicalAxes,
    spec: P,
    mesh: Mesh | AbstractMesh,
) -> None:
    """Raise ShardingError unless each dimension of `shape` divides evenly over its mesh axes."""
    for size, axis, entry in zip(shape, logical_axes, spec, strict=True):
        names = mesh_axes_of(entry)
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            split = "x".join(names)
            hint = " or set model.text.vocab_multiple_of" if axis == "vocab" else ""
            raise ShardingError(
                f"{name} has {size} along {axis!r} (shape {shape}), which does not split evenly over "
                f"the {parts} devices of mesh axis {split}. Choose a mesh whose {split} size divides "
                f"{size}{hint}."
            )


def named_sharding(
    name: str,
    shape: tuple[int, ...],
    logical_axes: LogicalAxes,
    table: Mapping[str, MeshAxes],
    mesh: Mesh | AbstractMesh,
) -> NamedSharding:
    """Checked NamedSharding of the array called `name`.

    Raises:
      ShardingError: axes and shape differ in length, an axis has no rule or does not divide.
    """
    if len(shape) != len(logical_axes):
        raise ShardingError(
            f"{name}: shape {shape} has {len(shape)} axes, {logical_axes} names others."
        )
    spec = to_spec(logical_axes, table)
    check_divisible(name, shape, logical_axes, spec, mesh)
    return NamedSharding(mesh, spec)


_active: contextvars.ContextVar[tuple[Mesh, ShardingRules] | None] = contextvars.ContextVar(
    "active_sharding_rules", default=None
)


@contextlib.contextmanager
def use_rules(mesh: Mesh, rules: ShardingRules) -> Iterator[None]:
    """While tracing inside this context, `constrain` and `gather` place arrays on `mesh`."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pin activation `x` to the active rules' layout; the identity when no rules are active.

    Raises:
      ShardingError: number of axes differs from x.ndim, or an axis has no rule.
    """
    if len(logical_axes) != x.ndim:
        raise ShardingError(f"{logical_axes} does not name the {x.ndim} axes of {x.shape}.")
    active = _active.get()
    if active is None:
        to_spec(logical_axes, FSDP_TENSOR.activation)  # a misspelt axis fails on one device too
        return x
    mesh, rules = active
    spec = to_spec(logical_axes, rules.activation)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def parts_of(logical_axis: str) -> int:
    """How many parts the active rules cut an activation's axis into; 1 when no rules are active.

    Raises:
      ShardingError: the axis has no rule.
    """
    active = _active.get()
    mesh, rules = active or (None, FSDP_TENSOR)
    (entry,) = to_spec((logical_axis,), rules.activation)
    return math.prod(mesh.shape[name] for name in mesh_axes_of(entry)) if mesh is not None else 1


def target_device() -> tuple[str, str]:
    """Platform ("cpu", "gpu", "tpu") and kind of the devices that is traced for: the active mesh's, else JAX's default.

    A mesh of a TPU that is not there, from jax.experimental.topologies, counts as that TPU.
    """
    active = _active.get()
    device = jax.devices()[0] if active is None else active[0].devices.flat[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return platform, device.device_kind


def per_device(
    function: Callable[..., jax.Array],
    inputs: Sequence[LogicalAxes],
    output: LogicalAxes,
) -> Callable[..., jax.Array]:
    """`function` of arrays with the axes `inputs`, run on every device over its own part of them (jax.shard_map).

    For what the partitioner cannot split, such as a Pallas kernel; `function` itself when no rules are active. An
    argument may be None.

    Raises (when called):
      ShardingError: a dimension that does not split evenly over its mesh axes.
    """
    active = _active.get()
    if active is None:
        return function
    mesh, rules = active

    def split(*arrays: jax.Array | None) -> jax.Array:
        specs = tuple(to_spec(axes, rules.activation) for axes in inputs)
        for array, axes, spec in zip(arrays, inputs, specs, strict=True):
            if array is not None:
                check_divisible("an argument", jnp.shape(array), axes, spec, mesh)
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=specs,
            out_specs=to_spec(output, rules.activation),
            check_vma=False,  # a Pallas call does not say over which axes its results vary
        )(*arrays)

    return split


def gather(weight: jax.Array, logical_axes: LogicalAxes) -> jax.Array:
    """Bring a stored weight to its layout in use (FSDP all-gather; its gradient is reduce-scattered)."""
    active = _active.get()
    if active is None:
        return weight
    mesh, rules = active
    return jax.lax.with_sharding_constraint(
        weight, NamedSharding(mesh, to_spec(logical_axes, rules.compute))
    )
