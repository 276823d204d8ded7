"""What each operation of a compiled program costs a device: FLOPs, and bytes between its memory and its cores.

Bytes are those of the arrays in the device's own memory that an operation reads and writes, without what stays in a
TPU's VMEM. A fusion reads of an operand only what its slices take, and writes of a result that it updates in place
only the update. Collectives count what they read and write here; what they send is in `collectives`.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from llaso_jax.sharding.hlo import (
    Operation,
    Program,
    array_bytes,
    operation_flops,
    results_of,
    root_of,
)

_FREE = re.compile(
    r"parameter|constant|iota|partition-id|replica-id|after-all|optimization-barrier|tuple|get-tuple-element|"
    r"bitcast|while|conditional|call|async-(start|update|done)|.*-done"
)
_SLICES = ("dynamic-slice", "slice", "gather")
_UNMOVED_CALLS = ("AllocateBuffer", "AsyncCollectiveDone", "ConcatBitcast")
_HBM = 0


@dataclasses.dataclass(frozen=True)
class Cost:
    """One operation: what each of its runs costs, and how often it runs."""

    name: str
    flops: float
    hbm_bytes: int
    times: int


def operation_costs(program: Program) -> Iterator[Cost]:
    """Every operation that a device starts by itself: fusions count as one, loops by what is in them.

    Raises:
      HloError: as `count_flops`.
    """
    for name, times in program.runs.items():
        if not times or name in program.fused:
            continue
        for operation in program.computations[name].values():
            if not _FREE.fullmatch(operation.opcode):
                flops = _flops(program, name, operation)
                moved = _moved(program, program.computations[name], operation)
                if flops or moved:
                    yield Cost(operation.name, flops, moved, times)


def _flops(program: Program, computation: str, operation: Operation) -> float:
    total = operation_flops(operation, program.computations[computation])
    if operation.opcode == "fusion":
        for called in program.called(operation):
            inside = program.computations[called].values()
            total += sum(_flops(program, called, part) for part in inside)
    return total


def _moved(program: Program, computation: dict[str, Operation], operation: Operation) -> int:
    results = _sizes(operation)
    if operation.opcode == "fusion":
        return _fusion_moved(program, computation, operation)
    if operation.opcode in ("copy-start", "slice-start"):
        # (destination, source, ...) or ((source), destination, ...): the moved part is the smaller one.
        (first, second) = zip(operation.shapes[:2], operation.spaces[:2], strict=True)
        size = min(array_bytes(first[0]), array_bytes(second[0]))
        return size * sum(space == _HBM for _, space in (first, second))
    if operation.opcode == "custom-call" and any(n in operation.rest for n in _UNMOVED_CALLS):
        return 0
    if operation.opcode in _SLICES:
        source = computation[operation.operands[0]]
        return sum(results) + (_whole(operation) if source.spaces[0] == _HBM else 0)
    if operation.opcode in ("dynamic-update-slice", "scatter"):
        update = computation[operation.operands[1 if operation.opcode[0] == "d" else -1]]
        return 2 * sum(_sizes(update))
    return sum(results) + sum(
        sum(_sizes(computation[n])) for n in dict.fromkeys(operation.operands)
    )


def _fusion_moved(program: Program, computation: dict[str, Operation], fusion: Operation) -> int:
    body = program.body(fusion)
    if "AsyncCollectiveDone" in root_of(body).rest:
        return 0  # what arrived was counted where it started
    read = 0
    for index, name in enumerate(fusion.operands):
        held = sum(_sizes(computation[name]))
        if held:
            read += min(held, _read(program, body, _parameter(body, index)))
    return read + _written(program, body, fusion)


def _read(program: Program, body: dict[str, Operation], value: Operation) -> int:
    """Bytes of a value inside a fusion that its users take."""
    total = 0
    for user in body.values():
        if value.name not in user.operands or user.opcode == "tuple":
            continue  # a tuple hands it on
        first = user.operands[0] == value.name
        if user.opcode in _SLICES and first:
            total += _whole(user)
        elif user.opcode == "dynamic-update-slice" and first:
            continue  # updated in place
        elif user.opcode == "bitcast":
            total += _read(program, body, user)
        elif user.opcode == "fusion":
            inner = program.body(user)
            for index, name in enumerate(user.operands):
                if name == value.name:
                    total += _read(program, inner, _parameter(inner, index))
        else:
            return _whole(value)
    return min(total, _whole(value))


def _written(program: Program, body: dict[str, Operation], fusion: Operation) -> int:
    parts = results_of(body)
    if len(parts) != len(fusion.spaces):
        return sum(_sizes(fusion))  # a kernel that gives several results at once
    return sum(
        _result(program, part, body)
        for part, space in zip(parts, fusion.spaces, strict=True)
        if space == _HBM
    )


def _result(program: Program, value: Operation, body: dict[str, Operation]) -> int:
    """Bytes that giving this value writes."""
    if value.opcode == "bitcast":
        return _result(program, body[value.operands[0]], body)
    if value.opcode == "parameter" or "chain_id=" in value.rest:
        return 0  # handed on: a collective that goes on in the next fusion
    if value.opcode == "dynamic-update-slice":
        return _whole(body[value.operands[1]])
    if value.opcode == "fusion":
        return _written(program, program.body(value), value)
    return _whole(value)


def _parameter(body: dict[str, Operation], index: int) -> Operation:
    return next(
        op for op in body.values() if op.opcode == "parameter" and int(op.arguments) == index
    )


def _sizes(operation: Operation) -> Sequence[int]:
    """Bytes of what an operation gives, of each array in the device's memory."""
    pairs = zip(operation.shapes, operation.spaces, strict=True)
    return [array_bytes(shape) for shape, space in pairs if space == _HBM]


def _whole(operation: Operation) -> int:
    return sum(array_bytes(shape) for shape in operation.shapes)
