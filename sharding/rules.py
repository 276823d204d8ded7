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
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MeshAxes = tuple[str, ...]
LogicalAxes = tuple[str | None, ...]


class ShardingError(ValueError):
    """A mesh, a rule and a shape that do not fit together. The message carries both numbers."""


Context = Literal["ulysses", "ring"]
"""How attention works on a sequence that lies on several devices (sharding/context.py)."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of every logical axis, for parameters at rest, parameters in use, and activations.

    context: how attention works where "sequence" is split; None where it never is.
    encoder: the speech encoder's own rules; None: these.
    """

    name: str
    storage: Mapping[str, MeshAxes]
    compute: Mapping[str, MeshAxes]
    activation: Mapping[str, MeshAxes]
    context: Context | None = None
    encoder: "ShardingRules | None" = None

    @property
    def mesh_axes(self) -> frozenset[str]:
        """The mesh axes that split activations."""
        return frozenset(axis for axes in self.activation.values() for axis in axes)

    @functools.cached_property
    def whole_rows(self) -> "ShardingRules":
        """These rules with rows, not sequences, over `context`: for generation, which takes a position at a time."""
        if self.context is None:
            return self
        rows = {
            name: self.activation[name] + self.activation["sequence"]
            for name in ("batch", "batch_at_head")
        }
        activation = {**self.activation, **rows, "sequence": (), "answers": ()}
        return dataclasses.replace(self, activation=activation, context=None)


def make_rules(
    *,
    fsdp: bool = False,
    tensor: bool = False,
    context: Context | None = None,
) -> ShardingRules:
    """The rules of a strategy from its parts; `data` splits rows in all of them.

    Args:
      fsdp: rows over `fsdp` too; parameters stored over it and over `context`.
      tensor: heads, ffn and vocabulary over `tensor`.
      context: sequences over `context`, and how attention works on their parts.
    """
    sequence = ("context",) if context else ()
    parts = [name for name, there in (("fsdp", fsdp), ("tensor", tensor)) if there]
    parts += [f"context-{context}"] if context else []
    return _rules(
        "+".join(parts) or "ddp",
        batch=("data", "fsdp") if fsdp else ("data",),
        sequence=sequence,
        stored_over=("fsdp", *sequence) if fsdp else (),
        heads=("tensor",) if tensor else (),
        context=context,
    )


def make_encoder_rules(
    rows: MeshAxes, *, fsdp: bool = False, tensor: bool = False, chunks: bool = False
) -> ShardingRules:
    """The rules of a speech encoder, whose batch are the audio chunks of all rows.

    Args:
      rows: the mesh axes that split rows, and their chunks with them.
      fsdp: parameters stored over `fsdp` and the axes of `chunks`.
      tensor: heads and ffn over `tensor`.
      chunks: each row's chunks are split too, over `context` and, unless `tensor` splits heads, over `tensor`.
    """
    more = ("context",) if tensor else ("context", "tensor")
    more = more if chunks else ()
    parts = [
        name for name, there in (("fsdp", fsdp), ("tensor", tensor), ("chunks", chunks)) if there
    ]
    return _rules(
        "+".join(parts) or "ddp",
        batch=rows + more,
        sequence=(),
        stored_over=("fsdp", *more) if fsdp else (),
        heads=("tensor",) if tensor else (),
    )


def _rules(
    name: str,
    *,
    batch: MeshAxes,
    sequence: MeshAxes,
    stored_over: MeshAxes,
    heads: MeshAxes,
    context: Context | None = None,
) -> ShardingRules:
    # What each logical axis of a parameter means:
    #   embed       width of the residual stream (d_model, hidden_size): the FSDP axis of every matrix
    #   heads, kv_heads, ffn, vocab   split by tensor parallelism
    #   norm, head_dim, mel, kernel, position, rank, layers   never split (small, or scanned over)
    whole = ("norm", "head_dim", "mel", "kernel", "position", "rank", "layers", "embed_out")
    # A trained output head is split over the devices that share its storage, which see each other's answers: no
    # device has all of it or of its gradient (1.6 GB in f32 at 128,256 x 3072).
    shared = tuple(axis for axis in batch if axis in stored_over)
    split = dict.fromkeys(("heads", "kv_heads", "ffn", "vocab"), heads)
    compute: dict[str, MeshAxes] = {"embed": (), **dict.fromkeys(whole, ()), **split}
    return ShardingRules(
        name=name,
        storage={**compute, "embed": stored_over},
        compute=compute,
        activation={
            "batch": batch,
            "sequence": sequence,
            "answers": sequence,
            "batch_at_head": tuple(axis for axis in batch if axis not in shared),
            "vocab_at_head": (*heads, *shared),
            "embed": (),
            "head_dim": (),
            **split,
        },
        context=context,
    )


FSDP_TENSOR = make_rules(fsdp=True, tensor=True)


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


# The part of a strategy that splits something over a mesh axis.
_USED_BY = {"fsdp": "fsdp", "tensor": "tensor", "context": "context-ring or context-ulysses"}


def check_axes(rules: ShardingRules, sizes: Mapping[str, int]) -> None:
    """Raise ShardingError if devices of a mesh of these `sizes` would do the same work as others."""
    for axis, size in sizes.items():
        if size > 1 and axis not in rules.mesh_axes:
            raise ShardingError(
                f"mesh axis {axis} has {size} devices, and strategy {rules.name!r} splits nothing over it: all "
                f"{size} would do the work of 1. Add {_USED_BY.get(axis, axis)} to sharding.strategy, or choose a "
                f"mesh without {axis}."
            )


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


@contextlib.contextmanager
def use_encoder_rules() -> Iterator[None]:
    """While tracing inside, the encoder's rules of the active ones hold; nothing changes where it has none."""
    found = _active.get()
    if found is None or found[1].encoder is None:
        yield
        return
    with use_rules(found[0], found[1].encoder):
        yield


def active_rules() -> tuple[Mesh, ShardingRules] | None:
    """The mesh and the rules that hold where this is traced."""
    return _active.get()


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
    """Bring a stored weight to its layout in use: FSDP's all-gather. Its gradient goes back to the stored layout."""
    active = _active.get()
    if active is None:
        return weight
    mesh, rules = active
    tables = (rules.compute, rules.storage)
    return _moved(weight, *(NamedSharding(mesh, to_spec(logical_axes, t)) for t in tables))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(weight: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight, used)


def _moved_forward(weight: jax.Array, used: NamedSharding, stored: NamedSharding):
    return _moved(weight, used, stored), None


def _moved_backward(used: NamedSharding, stored: NamedSharding, _: None, gradient: jax.Array):
    # A constraint's own transpose would ask for the gradient in the layout in use: whole, on every device.
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_moved.defvjp(_moved_forward, _moved_backward)
