"""What a compiled program sends between devices: every collective, its bytes, and the mesh axes it runs along.

Bytes are those that each device sends, by the ring algorithms (a device receives as many). Of n devices that each hold
b bytes of operands:

    all-gather           (n - 1) b         every other shard passes through once
    reduce-scatter       (n - 1) / n b
    all-reduce         2 (n - 1) / n b     a reduce-scatter and an all-gather
    all-to-all           (n - 1) / n b     all but what a device keeps
    collective-permute   b                 times the share of devices that send to another

An operation in a loop counts as often as the loop runs. Groups are read in all forms that XLA writes:
{{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), mesh['x'=2,'y'=4] {'x'} (openxla/xla replica_group.cc, mesh_and_axis.cc).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from llaso_jax.sharding.hlo import HloError, Operation, Program, array_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_UNKNOWN = ("collective-broadcast", "ragged-all-to-all", "send", "recv")

Groups = tuple[tuple[int, ...], ...]

_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?)\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of KINDS.
      operand_bytes: what each device gives to it.
      groups: devices that take part together, as places in the mesh's order; for a permute, (source, target) pairs.
      times: how often it runs.
    """

    kind: str
    operand_bytes: int
    groups: Groups
    times: int

    def sent_bytes(self, devices: int) -> float:
        """Bytes that each of `devices` devices sends over all runs; the mean over devices for a permute."""
        if self.kind == "collective-permute":
            moving = sum(source != target for source, target in self.groups)
            return self.times * self.operand_bytes * moving / devices
        n = len(self.groups[0]) if self.groups else devices
        share = {
            "all-gather": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": (n - 1) / n,
            "all-to-all": (n - 1) / n,
        }[self.kind]
        return self.times * self.operand_bytes * share


def collectives(program: Program) -> list[Collective]:
    """Every collective of a compiled program.

    A start and its done count once; so do the pieces that a TPU's asynchronous all-gather is fused into. An
    all-reduce fused with the slice of its result is a reduce-scatter (TPU).

    Raises:
      HloError: a collective or a form of groups that is not known here.
    """
    found: dict[object, Collective] = {}
    for computation, operation, times in _operations(program):
        opcode = operation.opcode.removesuffix("-start")
        if opcode in _UNKNOWN:
            raise HloError(f"bytes of {operation.opcode} ({operation.name}) are not known.")
        if opcode not in KINDS:
            continue
        operations = program.computations[computation]
        if opcode == "all-reduce" and _is_scattered(program, computation, operation):
            opcode = "reduce-scatter"
        size = sum(
            array_bytes(shape) for name in operation.operands for shape in operations[name].shapes
        )
        collective = Collective(opcode, size, _groups(operation), times)
        chain = _CHAIN.search(operation.rest)
        key: object = (computation, operation.name)
        if (
            chain
        ):  # one operation in several pieces, which overlap with what else is in their fusions
            channel = _CHANNEL.search(operation.rest)
            key = (chain[1], channel and channel[1])
        if (
            key not in found or found[key].times > times
        ):  # a piece may lie in a loop of the work beside it
            found[key] = collective
    return list(found.values())


def collective_bytes(program: Program, mesh: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Bytes that each device sends in one run of the program, by mesh axis and kind of collective.

    Args:
      program: compiled for the devices of the mesh, in its order.
      mesh: sizes of its axes, in order. A collective along several is under "fsdp+tensor".

    Raises:
      HloError: groups that are not of these devices.
    """
    devices = math.prod(mesh.values())
    total: dict[str, dict[str, float]] = {}
    for collective in collectives(program):
        axes = axes_of(collective.groups, mesh)
        sent = collective.sent_bytes(devices)
        if axes and sent:
            kinds = total.setdefault("+".join(axes), {})
            kinds[collective.kind] = kinds.get(collective.kind, 0.0) + sent
    return {axis: dict(sorted(kinds.items())) for axis, kinds in sorted(total.items())}


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ; no groups means all devices.

    Raises:
      HloError: a device that the mesh does not have.
    """
    sizes = tuple(mesh.values())
    devices = math.prod(sizes)
    groups = groups or (tuple(range(devices)),)
    differs = np.zeros(len(sizes), bool)
    for group in groups:
        if max(group) >= devices:
            raise HloError(f"device {max(group)} is not in a mesh of {devices} devices.")
        places = np.stack(np.unravel_index(np.array(group), sizes))
        differs |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, one in zip(mesh, differs, strict=True) if one)


def _operations(program: Program) -> Iterator[tuple[str, Operation, int]]:
    for name, times in program.runs.items():
        for operation in program.computations[name].values() if times else ():
            yield name, operation, times


def _is_scattered(program: Program, computation: str, reduced: Operation) -> bool:
    """Whether a fusion keeps only a slice of an all-reduce."""
    if computation not in program.fused:
        return False
    users = [op for op in program.computations[computation].values() if reduced.name in op.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _groups(operation: Operation) -> Groups:
    if pairs := _PAIRS.search(operation.rest):
        return _numbers(pairs[1])
    if listed := _LISTED.search(operation.rest):
        return _numbers(listed[1])
    if iota := _IOTA.search(operation.rest):
        shape, ids = _ints(iota[1]), _permuted(iota[2], iota[3])
        return tuple(tuple(map(int, row)) for row in ids.reshape(shape))
    if mesh := _MESH.search(operation.rest):
        return _mesh_groups(*mesh.groups())
    raise HloError(f"which devices take part in {operation.name}? {operation.rest[:160]}")


def _mesh_groups(axes: str, order: str | None, grouped: str) -> Groups:
    """mesh['x'=2,'y'=4] {'x'}: devices that differ in x; {'y':(2)2} is the part of y behind its first factor of 2."""
    names = [axis.split("=")[0] for axis in axes.split(",")]
    sizes = [int(axis.split("=")[1]) for axis in axes.split(",")]
    if order is None:
        ids = np.arange(math.prod(sizes))
    elif iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        ids = _permuted(iota[1], iota[2])
    else:
        ids = np.array(_ints(order))
    # Each axis as (before, part, behind): a whole axis is (1, size, 1).
    parts = {name: (1, size, 1) for name, size in zip(names, sizes, strict=True)}
    chosen: list[int] = []
    for axis in grouped.split(","):
        name, _, part = axis.partition(":")
        if 3 * names.index(name) + 1 in chosen:
            raise HloError(
                f"two parts of one axis in mesh[{axes}] {{{grouped}}} are not understood."
            )
        chosen.append(3 * names.index(name) + 1)
        if part:
            before, size = (int(n) for n in re.findall(r"\d+", part))
            parts[name] = (before, size, parts[name][1] // (before * size))
    split = ids.reshape([n for name in names for n in parts[name]])
    rest = [axis for axis in range(split.ndim) if axis not in chosen]
    rows = split.transpose(*rest, *chosen).reshape(
        -1, math.prod(split.shape[axis] for axis in chosen)
    )
    return tuple(tuple(map(int, row)) for row in rows)


def _permuted(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (ids.transpose(_ints(order)) if order else ids).reshape(-1)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _numbers(text: str) -> Groups:
    return tuple(_ints(group) for group in re.findall(r"\{([\d,]+)\}", text))
