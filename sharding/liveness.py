"""Which arrays a compiled program holds in a device's memory when it holds most.

The program is walked in its schedule. An array is there from the operation that gives it to the last one that takes
it; loops run once, their state lies where it was given, and what is updated in place takes no room of its own
(openxla/xla buffer_assignment.cc, hlo_dataflow_analysis.cc). Padding, fragmentation and scratch memory are not seen.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from llaso_jax.sharding.hlo import Operation, Program, Shape, array_bytes, results_of, root_of

_HBM = 0
_HANDED_ON = ("bitcast", "get-tuple-element", "tuple", "optimization-barrier", "while", "after-all")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_MAY_REUSE = re.compile(
    r"add|multiply|subtract|divide|convert|negate|select|maximum|tanh|all-reduce(-start)?"
)
_ALIASES = re.compile(r"\{(\d*)\}: \((\d+), \{")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array in the device's memory, and the operation that gave it."""

    shape: Shape
    operation: str

    @property
    def size(self) -> int:
        """Bytes, without padding."""
        return array_bytes(self.shape)


# A place in memory, or None for what is not in the device's own.
_Leaves = tuple[int | None, ...]


def buffers_at_peak(program: Program) -> list[Buffer]:
    """What a scheduled program holds besides its arguments when it holds most, largest first."""
    walk = _Walk(program)
    entry = program.computations[program.entry]
    arguments = []
    for operation in entry.values():
        if operation.opcode == "parameter":
            arguments.append(tuple(None for _ in operation.shapes))
    walk.run(program.entry, arguments, dict.fromkeys(program.donated))
    return sorted(walk.peak, key=lambda buffer: -buffer.size)


class _Walk:
    """The state of a walk: what is live, and what was when most was."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.live: dict[int, Buffer] = {}
        self.references: Counter[int] = Counter()
        self.total = self.most = 0
        self.peak: list[Buffer] = []
        self.created = 0

    def run(
        self, name: str, arguments: Sequence[_Leaves], results: dict[int, int | None]
    ) -> _Leaves:
        """Walk one computation.

        Args:
          name: of the computation.
          arguments: where its parameters lie.
          results: where some of its results go, by their number: to the state of a loop, into donated arguments.

        Returns:
          Where its results lie, held once for the caller.
        """
        operations = self.program.computations[name]
        root = root_of(operations)
        places = _destinations(operations, root, results)
        uses = Counter(n for op in operations.values() for n in op.operands)
        values: dict[str, _Leaves] = {}
        for operation in operations.values():
            if operation.opcode == "parameter":
                leaves = arguments[int(operation.arguments)]
            else:
                leaves = self._leaves(operation, operations, values, uses, places)
            values[operation.name] = leaves
            self._hold(leaves)
            if operation.opcode in ("while", "call", "conditional"):
                self._release(leaves)  # held by its own run
            for operand in operation.operands:
                uses[operand] -= 1
                if not uses[operand] and operand != root.name:
                    self._release(values[operand])
            if not uses[operation.name] and operation is not root:
                self._release(leaves)
                uses[operation.name] = -1
        return values[root.name]

    def _leaves(
        self,
        operation: Operation,
        operations: dict[str, Operation],
        values: dict[str, _Leaves],
        uses: Counter[str],
        places: dict[tuple[str, int], int | None],
    ) -> _Leaves:
        given = [values[name] for name in operation.operands]
        opcode = operation.opcode
        if opcode == "tuple":
            return tuple(leaf for leaves in given for leaf in leaves)
        if opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", operation.rest)
            return (given[0][int(index[1])],) if index else given[0]
        if opcode == "while":
            return self._loop(operation, given[0])
        if opcode in ("call", "conditional"):
            return self._call(operation, given)
        if opcode.endswith("-done"):
            return _arrived(operation, operations[operation.operands[0]], given[0])
        if opcode in _HANDED_ON:
            return given[0] if given else ()
        shared = self._shared(operation, operations, given)
        leaves: list[int | None] = []
        for index, (shape, space) in enumerate(
            zip(operation.shapes, operation.spaces, strict=True)
        ):
            if space != _HBM or opcode in ("constant", "iota", "partition-id", "replica-id"):
                leaves.append(None)
            elif (operation.name, index) in places:
                leaves.append(places[operation.name, index])
            elif index in shared:
                leaves.append(shared[index])
            else:
                leaves.append(
                    self._reuse(operation, shape, given, uses) or self._allocate(operation, shape)
                )
        return tuple(leaves)

    def _loop(self, loop: Operation, state: _Leaves) -> _Leaves:
        body = re.search(r"body=%?([\w.\-]+)", loop.rest)
        assert body is not None
        self._hold(state)
        # Each turn leaves its results where the state lies.
        self._release(self.run(body[1], [state], dict(enumerate(state))))
        return state

    def _call(self, call: Operation, given: list[_Leaves]) -> _Leaves:
        called = self.program.called(call)
        if call.opcode == "call":
            return self.run(called[0], given, {})
        for branch, arguments in zip(called, given[1:], strict=True):
            leaves = self.run(branch, [arguments], {})
            self._release(leaves)
        leaves = tuple(
            self._allocate(call, shape) if space == _HBM else None
            for shape, space in zip(call.shapes, call.spaces, strict=True)
        )
        self._hold(leaves)
        return leaves

    def _shared(
        self, operation: Operation, operations: dict[str, Operation], given: list[_Leaves]
    ) -> dict[int, int | None]:
        """Results that lie where an operand does, by their number."""
        if operation.opcode in _IN_PLACE:
            return {0: given[0][0]}
        if operation.opcode == "custom-call":
            aliases = operation.rest.partition("output_to_operand_aliasing=")[2].partition(")}")[0]
            return {int(i or 0): given[int(n)][0] for i, n in _ALIASES.findall(aliases)}
        if operation.opcode in ("copy-start", "collective-permute-start", "all-gather-start"):
            return {(1 if operation.opcode == "copy-start" else 0): given[0][0]}
        if operation.opcode == "slice-start":
            return {0: given[0][0]}
        if operation.opcode != "fusion":
            return {}
        body = self.program.body(operation)
        root = root_of(body)
        if "AsyncCollectiveStart" in root.rest:
            return {0: given[0][0]}
        if "AsyncCollectiveDone" in root.rest:
            return {0: given[1][0]}
        parts = results_of(body)
        if len(parts) != len(operation.shapes):
            return {}
        shared = {}
        for index, part in enumerate(parts):
            number = _in_place(part, body)
            if number is not None and number < len(given) and given[number]:
                shared[index] = given[number][0]
        return shared

    def _reuse(
        self, operation: Operation, shape: Shape, given: list[_Leaves], uses: Counter[str]
    ) -> int | None:
        """The place of an operand that nothing needs any more, for a result of its size."""
        if not _MAY_REUSE.fullmatch(operation.opcode) and "kind=kLoop" not in operation.rest:
            return None
        for name, leaves in zip(operation.operands, given, strict=True):
            if uses[name] == 1 and len(leaves) == 1 and leaves[0] is not None:
                place = leaves[0]
                alone = self.references[place] == 1
                if alone and place in self.live and self.live[place].size == array_bytes(shape):
                    self.live[place] = Buffer(shape, operation.name)
                    return place
        return None

    def _allocate(self, operation: Operation, shape: Shape) -> int:
        self.created += 1
        buffer = Buffer(shape, operation.name)
        self.live[self.created] = buffer
        self.total += buffer.size
        if self.total > self.most:
            self.most, self.peak = self.total, list(self.live.values())
        return self.created

    def _hold(self, leaves: _Leaves) -> None:
        for place in leaves:
            if place is not None:
                self.references[place] += 1

    def _release(self, leaves: _Leaves) -> None:
        for place in leaves:
            if place is not None:
                self.references[place] -= 1
                if not self.references[place]:
                    self.total -= self.live.pop(place).size


def _destinations(
    operations: dict[str, Operation], root: Operation, results: dict[int, int | None]
) -> dict[tuple[str, int], int | None]:
    """(operation, number of its result) that gives a result of the computation, and where that goes."""
    places: dict[tuple[str, int], int | None] = {}
    for number, place in results.items():
        if root.opcode == "tuple":
            value = operations[root.operands[number]]
        else:
            places[root.name, number] = place
            continue
        index = 0
        while value.opcode in ("bitcast", "get-tuple-element", "copy-done"):
            if found := re.search(r"index=(\d+)", value.rest):
                index = int(found[1]) if value.opcode == "get-tuple-element" else index
            value = operations[value.operands[0]]
        if value.opcode not in ("parameter", "while", "tuple"):
            places[value.name, index] = place
    return places


def _arrived(done: Operation, start: Operation, given: _Leaves) -> _Leaves:
    """What an asynchronous operation has moved: the results of its start that have the shape of its done."""
    if len(given) == 1:
        return given
    leaves, at = [], 0 if start.opcode == "copy-start" else 1
    for shape in done.shapes:
        matching = [i for i in range(len(given)) if start.shapes[i] == shape and i >= at]
        leaves.append(given[matching[0]] if matching else None)
    return tuple(leaves)


def _in_place(value: Operation, body: dict[str, Operation]) -> int | None:
    """Number of the parameter whose place a result of a fusion takes, if it does."""
    while value.opcode in ("bitcast", *_IN_PLACE):
        value = body[value.operands[0]]
    if value.opcode == "parameter":
        return int(value.arguments)
    return (
        1 if "chain_id=" in value.rest else None
    )  # goes on in the next fusion: (shard, whole, ...)
