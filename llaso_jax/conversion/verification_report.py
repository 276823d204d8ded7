"""A verification as a person reads it."""

from collections import Counter
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from llaso_jax.conversion.errors import listing
from llaso_jax.conversion.output_comparison import OutputDifference
from llaso_jax.conversion.tables import PARTS
from llaso_jax.conversion.tensor_comparison import TensorDifference
from llaso_jax.conversion.verification import Verification

_MOST_TENSORS = 20
_MOST_LAYERS = 8


def print_report(found: Verification, console: Console) -> None:
    """Print the report, long lines unbroken."""
    for item in _items(found):
        console.print(item, soft_wrap=isinstance(item, Text))


def _items(found: Verification) -> Iterator[RenderableType]:
    yield Text(f"A: {found.a}")
    yield Text(f"B: {found.b}")
    for part, side in found.alone.items():
        yield Text(f"not compared: {part}, which only {side} has", style="yellow")
    for field in found.config:
        note = "" if field.matters else " (changes no answer)"
        style = "red" if field.matters else ""
        yield Text(
            f"configuration: {field.name} is {field.a} in A, {field.b} in B{note}", style=style
        )
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            yield Text(
                f"{len(names)} parameters are in {side} only:\n{listing(names)}", style="red"
            )
    yield from _tensors(found.tensors)
    if found.outputs is not None:
        yield from _outputs(found, found.outputs)
    else:
        yield Text(f"outputs: not compared: {found.why_no_outputs}")
    yield _verdict(found)


def _tensors(tensors: tuple[TensorDifference, ...]) -> Iterator[RenderableType]:
    for part in PARTS:
        mine = [tensor for tensor in tensors if tensor.path.startswith(f"{part}/")]
        if mine:
            equal = sum(tensor.bit_equal for tensor in mine)
            within = sum(tensor.within for tensor in mine)
            line = f"{part}: {len(mine)} parameters, {equal} bit-equal, {within} within the rule"
            yield Text(line, style="" if within == len(mine) else "red")
    for rule, count in Counter(tensor.rule for tensor in tensors).items():
        yield Text(f"  rule of {count} parameters: {rule}")
    # What breaks its rule first, then the largest differences.
    apart = sorted(
        (tensor for tensor in tensors if not tensor.bit_equal),
        key=lambda tensor: (tensor.within, -tensor.max_rel),
    )
    if not apart:
        return
    shown = apart[:_MOST_TENSORS]
    width = max(len(tensor.path) for tensor in shown)
    yield Text(f"  {'parameter':<{width}}  max |a-b|   relative")
    for tensor in shown:
        line = f"  {tensor.path:<{width}}  {tensor.max_abs:9.3g}  {tensor.max_rel:9.2e}  {_remark(tensor)}"
        yield Text(line.rstrip(), style="" if tensor.within else "red")
    if len(apart) > _MOST_TENSORS:
        yield Text(f"  ... and {len(apart) - _MOST_TENSORS} more that differ")


def _remark(tensor: TensorDifference) -> str:
    """What else is to be said of a parameter that differs."""
    a, b = tensor.shapes
    said = []
    if a != b:
        said.append(f"{a} in A, {b} in B")
    if "/layers/" in tensor.path and 0 < len(tensor.layers) < a[0]:
        shown = ", ".join(map(str, tensor.layers[:_MOST_LAYERS]))
        said.append(f"layers {shown}" + (", ..." if len(tensor.layers) > _MOST_LAYERS else ""))
    if not tensor.within:
        said.append("breaks the rule")
    return "; ".join(said)


def _outputs(found: Verification, outputs: OutputDifference) -> Iterator[RenderableType]:
    yield Text(f"outputs for {outputs.clip}")
    yield Text(f"  prompt: {outputs.prompt}")
    limit = found.outputs_limit
    judged = (
        "not judged: the weights decide (--tolerance judges both)"
        if limit is None
        else f"at most {limit:g} allowed"
    )
    yield Text(
        f"  logits: max |a-b| {outputs.logits.max_abs:.3g}, relative {outputs.logits.max_rel:.2e} ({judged}); "
        f"same next token at {outputs.same_argmax} of {outputs.positions} text positions",
        style="" if found.outputs_within else "red",
    )
    if outputs.first is None:
        yield Text("  every hidden state is bit-equal")
        return
    yield Text(f"  first difference: {outputs.first.name}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column("after")
    for column in ("max |a-b|", "relative"):
        table.add_column(column, justify="right")
    for state in outputs.states:
        mark = "bold" if state is outputs.first else ""
        table.add_row(state.name, f"{state.max_abs:.3g}", f"{state.max_rel:.2e}", style=mark)
    yield table


def _verdict(found: Verification) -> Text:
    parts = ", ".join(found.parts)
    if not found.equal:
        return Text(f"not equal: {parts}", style="red")
    how = "bit for bit" if found.bit_equal else "within the rules above"
    return Text(f"equal {how}: {parts}", style="green")
