"""Strategies by name: which axes a model is split over, and how; `fsdp+tensor+context-ring`, for example.

A strategy is one or more parts joined by `+`, in any order:

    ddp               rows over `data` (in every strategy)
    fsdp              rows over `fsdp` too; parameters, gradients and moments stored over it (ZeRO-3)
    tensor            heads, ffn and vocabulary over `tensor`
    context-ulysses   sequences over `context`; attention by all-to-all between sequence and heads
    context-ring      sequences over `context`; attention by keys and values that go round a ring

and, for the speech encoder, in place of the last two:

    chunks            the audio chunks of a row over the axes that split its sequence and the LLM's heads

docs/sharding.md says what each costs and when to choose which.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from llaso_jax.sharding.mesh import MESH_AXES
from llaso_jax.sharding.rules import (
    Context,
    ShardingError,
    ShardingRules,
    make_encoder_rules,
    make_rules,
)

CONTEXTS: dict[str, Context] = {"context-ulysses": "ulysses", "context-ring": "ring"}
PARTS = ("ddp", "fsdp", "tensor", *CONTEXTS)
ENCODER_PARTS = ("ddp", "fsdp", "tensor", "chunks")

Frozen = Literal["sharded", "replicated"]


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """How a model is split over the axes of a mesh. It changes speed and memory, never results.

    Attributes:
      strategy: parts joined by "+": ddp, fsdp, tensor, context-ulysses, context-ring.
      encoder: the speech encoder's own: ddp, fsdp, tensor, chunks. null: the parts of `strategy`, with chunks
        in place of a context part.
      frozen: how frozen weights are stored: sharded as trained ones are, or replicated: as they are used, so that
        nothing is gathered. Trained weights and their moments are sharded either way.
    """

    strategy: str = "fsdp+tensor"
    encoder: str | None = None
    frozen: Frozen = "sharded"

    def __post_init__(self) -> None:
        self.rules()

    def rules(self) -> ShardingRules:
        """The table of this strategy.

        Raises:
          ShardingError: a part that is unknown, named twice, or not for this place.
        """
        return strategy(self.strategy, self.encoder)


def strategy(name: str, encoder: str | None = None) -> ShardingRules:
    """The rules of a strategy; see the module and `ShardingConfig`.

    Raises:
      ShardingError: a part that is unknown, named twice, or not for this place.
    """
    parts = _parts(name, PARTS, "sharding.strategy")
    contexts = [CONTEXTS[part] for part in parts if part in CONTEXTS]
    if len(contexts) > 1:
        raise ShardingError(
            f"sharding.strategy={name!r} has 2 ways to attend over parts of a sequence: choose 1 of "
            f"{' and '.join(sorted(CONTEXTS))}."
        )
    context = contexts[0] if contexts else None
    rules = make_rules(fsdp="fsdp" in parts, tensor="tensor" in parts, context=context)
    if encoder is None:
        inner = (parts - set(CONTEXTS)) | ({"chunks"} if context else set())
    else:
        inner = _parts(encoder, ENCODER_PARTS, "sharding.encoder")
    if inner == parts:
        return rules
    own = make_encoder_rules(
        rules.activation["batch"],
        fsdp="fsdp" in inner,
        tensor="tensor" in inner,
        chunks="chunks" in inner,
    )
    return dataclasses.replace(rules, encoder=own)


def _parts(name: str, known: tuple[str, ...], setting: str) -> set[str]:
    """The parts of a name; `ddp` is in every strategy, and left out."""
    parts = [part.strip() for part in name.split("+")]
    for part in parts:
        if part not in known:
            nearest = difflib.get_close_matches(part, known, n=1, cutoff=0.0)[0]
            raise ShardingError(
                f"{setting}={name!r}: unknown part {part!r}, did you mean {nearest!r}? "
                f"Parts, joined by +: {', '.join(known)}."
            )
        if parts.count(part) > 1:
            raise ShardingError(f"{setting}={name!r} names {part!r} {parts.count(part)} times.")
    return set(parts) - {"ddp"}


class Plan(NamedTuple):
    """A strategy and a mesh that belong together: every part has more than one device, and every device its work."""

    strategy: str
    mesh: str


def plans(devices: int) -> Iterator[Plan]:
    """Every strategy on every mesh of `devices` devices, products included; which of them a model fits, the
    application knows (planning/fit.py).

    Example:
      list(plans(2)) holds ddp on data=2, fsdp on fsdp=2, tensor on tensor=2 and both contexts on context=2.
    """
    for sizes in _meshes(devices, len(MESH_AXES)):
        named = dict(zip(MESH_AXES, sizes, strict=True))
        mesh = ",".join(f"{axis}={size}" for axis, size in named.items() if size > 1) or "data=1"
        parts = [axis for axis in ("fsdp", "tensor") if named[axis] > 1]
        for context in CONTEXTS if named["context"] > 1 else ("",):
            yield Plan("+".join([*parts, *([context] if context else [])]) or "ddp", mesh)


def _meshes(devices: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `devices` as an ordered product of `axes` sizes."""
    if axes == 1:
        yield (devices,)
        return
    for first in range(1, devices + 1):
        if devices % first == 0:
            for others in _meshes(devices // first, axes - 1):
                yield (first, *others)
