"""The LoRA adapter of a conversion, kept apart from the weights it changes."""

import dataclasses
import re

from llaso_jax.conversion.binding import Pieces, bind, is_ignored
from llaso_jax.conversion.errors import UnsupportedConfigError, listing
from llaso_jax.conversion.lora_adapter import Pair
from llaso_jax.conversion.sources import Place, Record, Sources
from llaso_jax.conversion.tables import Slot, adapter_slots
from llaso_jax.conversion.tensors import Tensor
from llaso_jax.conversion.text_part import text_place
from llaso_jax.conversion.tower_part import tower_place
from llaso_jax.modeling.functional import linear_paths
from llaso_jax.modeling.lora import LoraRule
from llaso_jax.modeling.speech_lm import SpeechLMConfig


def adapter_part(
    sources: Sources, record: Record, cfg: SpeechLMConfig, parts: tuple[str, ...]
) -> tuple[tuple[LoraRule, ...], Pieces]:
    """Rules that give the model `cfg` the adapter that was kept, and its parameters.

    Args:
      sources: what was given, with an adapter.
      record: gets the decisions made.
      cfg: the model without adapters.
      parts: which of its parts are there.

    Raises:
      UnsupportedConfigError: pairs on something else than a linear layer, or that differ between the layers
        of a stack, which has one shape and one scale here. Such an adapter can be merged.
      ConversionError: tensors that do not fit (errors.py).
    """
    assert sources.adapter is not None
    where = str(sources.adapter.path)
    weight_slots: dict[str, Slot] = {}
    for part in parts:
        if (place := _place(part, sources, record)) is not None:
            weight_slots |= place.needed(part, cfg)
    pairs = {name: pair for name, pair in sources.adapter_pairs.items() if not is_ignored(name)}
    record.ignored += [f"adapter of {name}" for name in sources.adapter_pairs if name not in pairs]
    if not pairs:
        raise UnsupportedConfigError(
            f"{where} changes nothing that a speech-language model has (a Whisper's decoder is not part of it)."
        )
    linears = linear_paths(cfg)
    by_linear: dict[str, list[Pair]] = {}
    for name, pair in pairs.items():
        slot = weight_slots.get(name)
        linear = slot.path.removesuffix("/weight") if slot else None
        if linear not in linears or pair.embedding:
            raise UnsupportedConfigError(
                f"{where} changes {name}, which is no linear layer of the model: it can only be merged: "
                "leave out --keep-adapter."
            )
        by_linear.setdefault(linear, []).append(pair)
    _check_layers(where, by_linear, weight_slots)
    rules = _rules(by_linear, sources.adapter.config)
    adapted = dataclasses.replace(cfg, lora=rules)
    adapters = adapter_slots(adapted, parts)
    named = {(slot.path, slot.layer): name for name, slot in adapters.items()}
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        slot = weight_slots[name]
        linear = slot.path.removesuffix("/weight")
        tensors[named[f"{linear}/lora_A/weight", slot.layer]] = pair.a
        tensors[named[f"{linear}/lora_B/weight", slot.layer]] = pair.b
    record.note(
        f"{where} (LoRA) is kept apart from the weights: {len(by_linear)} kinds of linear layers"
    )
    return rules, bind(where, tensors, adapters)


def _place(part: str, sources: Sources, record: Record) -> Place | None:
    """Where `part` is, if it is in the source that the adapter changes."""
    if sources.adapter_base == "llaso":
        return sources.in_llaso(part)
    of = {"llama": ("language_model", text_place), "whisper": ("audio_tower", tower_place)}
    assert sources.adapter_base in of, sources.adapter_base
    whose, place = of[sources.adapter_base]
    return place(sources, record) if part == whose else None


def _check_layers(
    where: str, by_linear: dict[str, list[Pair]], weight_slots: dict[str, Slot]
) -> None:
    """Raise unless each kind of linear layer has its pair in every layer, with one rank and one scale."""
    problems = []
    for linear, pairs in by_linear.items():
        layers = sum(slot.path == f"{linear}/weight" for slot in weight_slots.values())
        if len(pairs) < layers:
            problems.append(f"{linear}: in {len(pairs)} of {layers} layers")
        if len({(pair.rank, pair.scale) for pair in pairs}) > 1:
            ranks = ", ".join(sorted({f"r={pair.rank} scale={pair.scale:g}" for pair in pairs}))
            problems.append(f"{linear}: {ranks}")
    if problems:
        raise UnsupportedConfigError(
            f"{where} differs between layers, which are one array here:\n{listing(problems)}\n"
            "It can only be merged: leave out --keep-adapter."
        )


def _rules(by_linear: dict[str, list[Pair]], config: dict) -> tuple[LoraRule, ...]:
    """One rule for all linear layers of one rank and one scale."""
    kinds: dict[tuple[int, float], list[str]] = {}
    for linear, pairs in by_linear.items():
        kinds.setdefault((pairs[0].rank, pairs[0].alpha), []).append(linear)
    stabilized = bool(config.get("use_rslora"))
    return tuple(
        LoraRule(
            pattern="|".join(re.escape(linear) for linear in sorted(linears)),
            rank=rank,
            alpha=alpha,
            dropout=float(config.get("lora_dropout") or 0.0),
            rank_stabilized=stabilized,
        )
        for (rank, alpha), linears in sorted(kinds.items())
    )
