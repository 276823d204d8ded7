"""Reading a compiled program: its operations, how often each runs, and the FLOPs of its matrix products.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; here bodies count as often as
they run. Source of the text format: `jax.stages.Compiled.as_text()` (openxla/xla hlo_instruction.cc).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

Shape = tuple[str, tuple[int, ...]]
"""Element type and dimensions, such as ("bf16", (8, 128))."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (\(.*\) -> .*)?\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_DONATED = re.compile(r"\{(\d*)\}: \(\d+, \{")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
_SCOPE_FLOPS = re.compile(r'op_name="[^"]*\bflops=(\d+)/')
_LIBRARY = re.compile(r'custom_call_target="(__(?:cublas|cudnn|onednn)[^"]*)"')
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_DIM_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
# What these run is a sequence of operations of its own; what others call is a part of them.
_STEPS = ("while", "conditional", "call", "async-start")


class HloError(ValueError):
    """A program text that is not understood."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      opcode: "dot", "while", "all-gather", ...
      shapes: what it gives; several for a tuple.
      spaces: the memory each of them is in: 0 is the device's own, 1 a TPU's VMEM, 5 the host's.
      operands: names of what it takes, of the same computation.
      arguments: the text between its parentheses: the value of a constant.
      rest: the text behind the operands: attributes and metadata.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    spaces: tuple[int, ...]
    operands: tuple[str, ...]
    arguments: str
    rest: str

    def sizes(self, attribute: str) -> tuple[int, ...]:
        """The numbers of an attribute such as lhs_contracting_dims={1,2}; () if it is not there."""
        found = re.search(rf"{attribute}=\{{([\d,]*)\}}", self.rest)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its computations by name, and which of them it begins with.

    donated: numbers of the results that take the place of an argument.
    """

    computations: dict[str, dict[str, Operation]]
    entry: str
    donated: frozenset[int] = frozenset()

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs; a branch counts as if it were always taken."""
        counts = dict.fromkeys(self.computations, 0)

        def visit(name: str, times: int) -> None:
            if name not in self.computations:
                return
            counts[name] += times
            for operation in self.computations[name].values():
                for called, factor in self._calls(operation):
                    visit(called, times * factor)

        visit(self.entry, 1)
        return counts

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations that are part of one operation: bodies of fusions, and what a reduction applies."""
        inside: set[str] = set()

        def visit(name: str) -> None:
            if name in inside or name not in self.computations:
                return
            inside.add(name)
            for operation in self.computations[name].values():
                for called, _ in self._calls(operation):
                    visit(called)

        for operations in self.computations.values():
            for operation in operations.values():
                if operation.opcode not in _STEPS:
                    for called, _ in self._calls(operation):
                        visit(called)
        return frozenset(inside)

    def called(self, operation: Operation) -> list[str]:
        """Computations that an operation runs."""
        return [name for name, _ in self._calls(operation) if name in self.computations]

    def body(self, fusion: Operation) -> dict[str, Operation]:
        """What a fusion runs."""
        return self.computations[self.called(fusion)[0]]

    def _calls(self, operation: Operation) -> Iterator[tuple[str, int]]:
        """Computations an operation runs, and how often each time."""
        if operation.opcode in ("async-update", "async-done"):
            return  # they name what async-start runs
        times = self._trips(operation) if operation.opcode == "while" else 1
        for name in _CALLED.findall(operation.rest):
            yield name, times
        if branches := _BRANCHES.search(operation.rest):
            for name in re.findall(r"[\w.\-]+", branches[1]):
                yield name, 1

    def _trips(self, loop: Operation) -> int:
        """As XLA notes them beside a loop, or from its condition `index < N`: loops count up from 0.

        JAX's count by one; those of a product that overlaps with its collective by two (TPU, "windowed_dot_general").

        Raises:
          HloError: neither says.
        """
        if noted := _TRIPS.search(loop.rest):
            return int(noted[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        operations = self.computations[condition[1]] if condition else {}
        last = list(operations.values())[-1:]
        if last and last[0].opcode == "compare" and "direction=LT" in last[0].rest:
            index, *limits = sorted(
                (operations[name] for name in last[0].operands),
                key=lambda o: o.opcode == "constant",
            )
            if limits and limits[-1].opcode == "constant":
                return -(-int(limits[-1].arguments) // self._stride(loop, index))
        raise HloError(f"how often does {loop.name} run? Its condition is not index < constant.")

    def _stride(self, loop: Operation, index: Operation) -> int:
        """What a turn of `loop` adds to `index`, of its condition: 1 unless its body adds another constant."""
        place = re.search(r"\bindex=(\d+)", index.rest)
        body = re.search(r"body=%?([\w.\-]+)", loop.rest)
        if place is None or body is None:
            return 1
        operations = self.computations[body[1]]
        results = results_of(operations)
        after = results[int(place[1])] if int(place[1]) < len(results) else None
        if after is None or after.opcode != "add":
            return 1
        added = (operations[name] for name in after.operands)
        return next((int(one.arguments) for one in added if one.opcode == "constant"), 1)

    def operations(self, *opcodes: str) -> Iterator[tuple[Operation, int]]:
        """Operations with one of `opcodes` (default: all), and how often each runs."""
        for name, times in self.runs.items():
            for operation in self.computations[name].values():
                if times and (not opcodes or operation.opcode in opcodes):
                    yield operation, times

    def shapes(self) -> set[Shape]:
        """Every array that any operation gives."""
        return {shape for operation, _ in self.operations() for shape in operation.shapes}


def parse(text: str) -> Program:
    """The program of `jax.stages.Compiled.as_text()`.

    Raises:
      HloError: a text without an entry computation.
    """
    computations: dict[str, dict[str, Operation]] = {}
    entry = None
    current: dict[str, Operation] = {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif match := _OPERATION.match(line):
            operation = _operation(match[1], match[2])
            current[operation.name] = operation
    if entry is None:
        raise HloError("the text has no ENTRY computation: give jax.stages.Compiled.as_text().")
    header = text.partition("\n")[0].partition("input_output_alias={")[2].partition(") }")[0]
    donated = frozenset(int(n or 0) for n in _DONATED.findall(header))
    return Program(computations, entry, donated)


def root_of(operations: dict[str, Operation]) -> Operation:
    """The operation of a computation that gives its result: the last."""
    return next(reversed(operations.values()))


def results_of(operations: dict[str, Operation]) -> list[Operation]:
    """The operations that give the results of a computation, one by one where it gives a tuple."""
    root = root_of(operations)
    return [operations[name] for name in root.operands] if root.opcode == "tuple" else [root]


def array_bytes(shape: Shape) -> int:
    """Bytes of an array without padding; 0 of a token."""
    kind, sizes = shape
    bits = 8 if kind == "pred" else int((re.findall(r"\d+", kind) or ["0"])[0])
    return -(-math.prod(sizes) * bits // 8)


def count_flops(program: Program) -> float:
    """FLOPs of all matrix products, convolutions and kernels (a multiply-add counts 2), loops unrolled.

    Kernels (custom calls) count what their cost estimate says, convolutions of cuDNN as any other.

    Raises:
      HloError: a product that is a call of a library, as in programs compiled on a GPU, or a loop without an end.
    """
    return sum(
        times * operation_flops(operation, program.computations[name])
        for name, times in program.runs.items()
        if times
        for operation in program.computations[name].values()
    )


def operation_flops(operation: Operation, computation: dict[str, Operation]) -> float:
    """FLOPs of one run of an operation of `computation`, without those of what it calls; as `count_flops`."""
    if operation.opcode == "dot":
        return _dot_flops(operation, computation)
    if operation.opcode == "convolution":
        return _convolution_flops(operation, computation)
    if operation.opcode == "custom-call":
        return _custom_flops(operation, computation)
    return 0.0


def _custom_flops(operation: Operation, computation: dict[str, Operation]) -> float:
    """A kernel's FLOPs by its estimate, or by the name of its scope: "flops=N/" (Triton kernels have no estimate)."""
    if estimate := _KERNEL_FLOPS.search(operation.rest) or _SCOPE_FLOPS.search(operation.rest):
        return float(estimate[1])
    if library := _LIBRARY.search(operation.rest):
        if library[1].startswith("__cudnn$conv"):
            return _convolution_flops(operation, computation)
        raise HloError(
            f"{operation.name} calls {library[1]}, whose products are not in the text of the program."
        )
    return 0.0


def _operation(name: str, text: str) -> Operation:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    result, call = text[:end], text[end:].lstrip()
    opening = call.index("(")
    closing = _closing(call, opening)
    arguments = call[opening + 1 : closing]
    arrays = _arrays(result)
    return Operation(
        name=name,
        opcode=call[:opening],
        shapes=tuple(shape for shape, _ in arrays),
        spaces=tuple(space for _, space in arrays),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        rest=call[closing + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise HloError(f"a parenthesis is not closed: {text[:200]}")


def _arrays(text: str) -> tuple[tuple[Shape, int], ...]:
    """Every array of a result type and its memory; layouts hold tiles and memory: {1,0:T(8,128)S(1)}."""
    found = []
    for kind, sizes, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        shape = (kind, tuple(int(n) for n in sizes.split(",") if n))
        found.append((shape, int(space[1]) if space else 0))
    return tuple(found)


def _dot_flops(operation: Operation, computation: dict[str, Operation]) -> float:
    ((_, left),) = computation[operation.operands[0]].shapes
    ((_, out),) = operation.shapes
    contracted = math.prod(left[axis] for axis in operation.sizes("lhs_contracting_dims"))
    return 2.0 * math.prod(out) * contracted


def _convolution_flops(operation: Operation, computation: dict[str, Operation]) -> float:
    """Multiply-adds with entries that are there: TPU programs write batched products as windows over padding."""
    labels = _DIM_LABELS.search(operation.rest)
    if labels is None:
        raise HloError(f"a convolution without dim_labels: {operation.name}")
    ((_, left),) = computation[operation.operands[0]].shapes
    ((_, right),) = computation[operation.operands[1]].shapes
    (_, out), *_ = operation.shapes  # a library's call has scratch memory too
    fields = _window(operation)
    pairs = 1
    spatial = sorted(label for label in labels[1] if label.isdigit())
    for index, label in enumerate(spatial):
        pairs *= _valid_pairs(
            left[labels[1].index(label)],
            right[labels[2].index(label)],
            out[labels[3].index(label)],
            {name: values[index] for name, values in fields.items()},
        )
    features = right[labels[2].index("i")] * right[labels[2].index("o")]
    return 2.0 * pairs * features * out[labels[3].index("b")]


def _window(operation: Operation) -> dict[str, list[str]]:
    """window={size=3x1 pad=1_1x0_0} as {"size": ["3", "1"], "pad": ["1_1", "0_0"]}."""
    found = _WINDOW.search(operation.rest)
    if found is None:
        return {}
    pairs = (field.split("=") for field in found[1].split())
    return {name: values.split("x") for name, values in pairs}


def _valid_pairs(inner: int, window: int, out: int, fields: dict[str, str]) -> int:
    """(output, window) index pairs along one axis that meet an entry of the input.

    Source: openxla/xla hlo_cost_analysis.cc HandleConvolution.
    """
    stride, dilation = int(fields.get("stride", 1)), int(fields.get("rhs_dilate", 1))
    holes = int(fields.get("lhs_dilate", 1))
    low = int(fields.get("pad", "0_0").split("_")[0])
    count = 0
    for index in range(window):
        # Positions start, start + stride, ... of the input with `holes` - 1 gaps between its entries.
        start = index * dilation - low
        count += sum(
            1
            for o in range(out)
            if 0 <= (at := start + o * stride) <= (inner - 1) * holes and at % holes == 0
        )
    return count
