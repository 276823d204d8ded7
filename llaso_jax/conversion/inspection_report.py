"""An inspection as a person reads it, and as a program does."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llaso_jax.conversion.errors import listing
from llaso_jax.conversion.inspection import Inspection
from llaso_jax.conversion.part_description import Part, Sizes
from llaso_jax.conversion.tokenizer_check import TokenizerCheck

KINDS = {
    "llaso": "LLaSO checkpoint",
    "whisper": "Whisper",
    "llama": "Llama",
    "projector": "projector of a LLaSO model",
    "adapter": "LoRA adapter",
    "model folder": "model folder of llaso_jax",
}


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Everything the report says, as one JSON object."""
    parts = [dataclasses.asdict(part) | {"whole": part.whole} for part in inspection.parts]
    return dataclasses.asdict(inspection) | {
        "path": str(inspection.path),
        "whole": inspection.whole,
        "parameters": inspection.parameters,
        "parts": parts,
    }


def print_report(inspection: Inspection, console: Console) -> None:
    """Print the report, long lines unbroken so that commands and names can be copied."""
    for item in _items(inspection):
        console.print(item, soft_wrap=isinstance(item, Text))


def _items(found: Inspection) -> Iterator[RenderableType]:
    files = "1 file" if found.files == 1 else f"{found.files} files"
    yield Text.assemble(
        (str(found.path), "bold"),
        f": {KINDS[found.kind]}, {found.format}, {files}, {_bytes(found.nbytes)}",
    )
    for name, value in found.settings.items():
        yield Text(f"  {name}: {value}")
    yield _table(found)
    for part in found.parts:
        if part.sizes:
            yield Text(f"  {part.name}: {_SENTENCES[part.name](part.sizes)}")
    if found.tokenizer is not None:
        yield from _tokenizer(found.tokenizer)
    if found.ignored:
        yield Text(
            f"  ignored: {len(found.ignored)} known tensors that no model here needs "
            f"({found.ignored[0]} ... {found.ignored[-1]})"
        )
    for note in found.notes:
        yield Text(f"  note: {note}")
    yield from _problems(found)
    for made, command in found.commands.items():
        yield Group(Text(f"to make {made}:"))
        yield Text(f"  {command}", style="cyan")


def _table(found: Inspection) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column("part")
    for column in ("tensors", "parameters", "bytes"):
        table.add_column(column, justify="right")
    table.add_column("stored as")
    table.add_column("state")
    for part in found.parts:
        kinds = part.dtypes
        stored = ", ".join(
            kind if len(kinds) == 1 else f"{count} {kind}" for kind, count in kinds.items()
        )
        state = Text("whole", style="green") if part.whole else Text("not whole", style="red")
        table.add_row(
            part.name,
            f"{part.tensors:,}",
            f"{part.parameters:,}",
            _bytes(part.nbytes),
            stored,
            state,
        )
    if len(found.parts) > 1:
        tensors = sum(part.tensors for part in found.parts)
        nbytes = sum(part.nbytes for part in found.parts)
        table.add_row("total", f"{tensors:,}", f"{found.parameters:,}", _bytes(nbytes), "", "")
    return table


def _problems(found: Inspection) -> Iterator[Text]:
    lines = [line for part in found.parts for line in _part_problems(part)]
    lines += [*found.problems, *(found.tokenizer.problems if found.tokenizer else ())]
    if not lines:
        yield Text("whole: every tensor is there, has its place and fits", style="green")
        return
    yield Text("not whole; no command converts it as it is", style="red")
    for line in lines:
        yield Text(line, style="red")


def _part_problems(part: Part) -> Iterator[str]:
    yield from (f"{part.name}: {problem}" for problem in part.problems)
    wrong = [f"{w.name}: {w.given} given, {w.needed} needed" for w in part.wrong_shape]
    for what, names in (
        ("missing", part.missing),
        ("unused, for which this architecture has no place", part.unused),
        ("of another shape than the configuration asks for", wrong),
    ):
        if names:
            count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
            yield f"{part.name}: {count} {what}:\n{listing(names)}"


def _tokenizer(check: TokenizerCheck) -> Iterator[Text]:
    if check.file is None:
        yield Text(f"  tokenizer: none here ({check.rows:,} embedding rows)")
    else:
        length = "an unknown number of" if check.length is None else f"{check.length:,}"
        yield Text(f"  tokenizer: {length} tokens, {check.rows:,} embedding rows ({check.file})")
    if check.length is not None:
        for what, tokens in (
            ("LLaSO's tokens", check.added_tokens),
            ("tokens of its chat template", check.template_tokens),
        ):
            has = [f"{token}={id}" for token, id in tokens.items() if id is not None]
            lacks = [token for token, id in tokens.items() if id is None]
            has_line = f"has {', '.join(has)}" if has else ""
            lacks_line = f"lacks {', '.join(lacks)}" if lacks else ""
            yield Text(f"    {what}: {'; '.join(filter(None, (has_line, lacks_line)))}")
        yield Text(f"    chat template of its own: {'yes' if check.chat_template else 'no'}")
    if check.eos:
        ends = (str(id) if token is None else f"{id} {token}" for id, token in check.eos.items())
        yield Text(f"  answers end at: {', '.join(ends)}")


def _tower(sizes: Sizes) -> str:
    return (
        "{encoder_layers} layers, width {d_model}, {encoder_attention_heads} heads of {head_dim}, "
        "feed-forward {encoder_ffn_dim}, {num_mel_bins} mel bins, {max_source_positions} positions"
    ).format(**sizes)


def _projector(sizes: Sizes) -> str:
    stack = {None: "", 1: ", frame by frame"}.get(sizes["stack"], ", {stack} frames at a time")
    return ("{type}, {reads} -> {writes}" + stack).format(**sizes)


def _text(sizes: Sizes) -> str:
    scaling = sizes["rope_scaling"]
    rope = "unscaled" if scaling is None else f"llama3 scaling x{scaling['factor']:g}"
    padded = sizes.get("padded_vocab_size", sizes["vocab_size"])
    padding = f" (stored as {padded:,})" if padded != sizes["vocab_size"] else ""
    head = "tied head" if sizes["tie_word_embeddings"] else "head of its own"
    return (
        "{num_hidden_layers} layers, width {hidden_size}, {num_attention_heads} heads of {head_dim}, "
        "{num_key_value_heads} key/value heads, feed-forward {intermediate_size}, "
        "vocabulary {vocab_size:,}{padding}, {head}, norm eps {rms_norm_eps:g}, "
        "RoPE {rope_theta:g} {rope}"
    ).format(**sizes, padding=padding, head=head, rope=rope)


def _adapter(sizes: Sizes) -> str:
    kind = "rsLoRA" if sizes["use_rslora"] else "LoRA"
    line = "{pairs} pairs of rank {r}, alpha {lora_alpha}, trained on {base_model_name_or_path}"
    return f"{kind}, {line.format(**sizes)}"


_SENTENCES: dict[str, Callable[[Sizes], str]] = {
    "audio_tower": _tower,
    "projector": _projector,
    "language_model": _text,
    "adapter": _adapter,
}


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
