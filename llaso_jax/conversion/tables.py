"""Which parameter of ours is which tensor of a Hugging Face checkpoint: one table per architecture, two ways.

A row is a Hugging Face name and one of our paths. `{i}` is the layer: ours is stacked along a leading axis.
No row moves data. Heads are an axis of their own here and fused with the head width there (`fused`);
embedding rows may be padded here and never are there (`vocab`).
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

from llaso_jax.conversion.errors import UnmappedParameterError, listing
from llaso_jax.modeling.functional import ParamInfo, abstract_params
from llaso_jax.modeling.projector import ProjectorConfig
from llaso_jax.modeling.speech_lm import SpeechLMConfig

PARTS = ("audio_tower", "projector", "language_model")
"""The three parts of a model, as the first step of every path."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
      hf: Hugging Face name below the prefix of its part, `{i}` = layer.
      ours: path below the part.
      fused: our axes `fused` and `fused + 1` (of one layer) are one axis there.
      vocab: the first axis is the vocabulary, padded here.
    """

    hf: str
    ours: str
    fused: int | None = None
    vocab: bool = False


def _both(name: str, fused: int | None = None) -> list[Row]:
    """Rows of the weight and the bias of module `name`, which has the same name in both."""
    ours = name.replace(".{i}", "").replace(".", "/")
    return [Row(f"{name}.{leaf}", f"{ours}/{leaf}", fused) for leaf in ("weight", "bias")]


def _weight(name: str, fused: int | None = None, *, vocab: bool = False) -> list[Row]:
    """The row of the weight of module `name`, which has no bias."""
    ours = name.replace(".{i}", "").replace(".", "/")
    return [Row(f"{name}.weight", f"{ours}/weight", fused, vocab)]


WHISPER_ENCODER: tuple[Row, ...] = (
    *_both("conv1"),
    *_both("conv2"),
    *_weight("embed_positions"),
    *_both("layers.{i}.self_attn_layer_norm"),
    *_both("layers.{i}.self_attn.q_proj", fused=0),
    *_weight("layers.{i}.self_attn.k_proj", fused=0),
    *_both("layers.{i}.self_attn.v_proj", fused=0),
    Row("layers.{i}.self_attn.out_proj.weight", "layers/self_attn/out_proj/weight", fused=1),
    Row("layers.{i}.self_attn.out_proj.bias", "layers/self_attn/out_proj/bias"),
    *_both("layers.{i}.final_layer_norm"),
    *_both("layers.{i}.fc1"),
    *_both("layers.{i}.fc2"),
    *_both("layer_norm"),
)

LLAMA: tuple[Row, ...] = (
    *_weight("embed_tokens", vocab=True),
    *_weight("layers.{i}.input_layernorm"),
    *_weight("layers.{i}.self_attn.q_proj", fused=0),
    *_weight("layers.{i}.self_attn.k_proj", fused=0),
    *_weight("layers.{i}.self_attn.v_proj", fused=0),
    *_weight("layers.{i}.self_attn.o_proj", fused=1),
    *_weight("layers.{i}.post_attention_layernorm"),
    *_weight("layers.{i}.mlp.gate_proj"),
    *_weight("layers.{i}.mlp.up_proj"),
    *_weight("layers.{i}.mlp.down_proj"),
    *_weight("norm"),
)
LM_HEAD: tuple[Row, ...] = tuple(_weight("lm_head", vocab=True))


def projector_rows(cfg: ProjectorConfig) -> tuple[Row, ...]:
    """`linear` is one Linear; `mlpNx_gelu` a Sequential with the activations at odd indices."""
    modules = [""] if cfg.type == "linear" else [f"{2 * i}." for i in range(cfg.num_layers)]
    return tuple(
        Row(f"{module}{leaf}", f"linear_{i}/{leaf}")
        for i, module in enumerate(modules)
        for leaf in ("weight", "bias")
    )


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """What stands before the names of each table in one kind of checkpoint."""

    audio_tower: str = "model.audio_tower.audio_tower."
    projector: str = "model.mm_audio_aligner.projector."
    language_model: str = "model."
    lm_head: str = ""


LLASO = Prefixes()
WHISPER = Prefixes(audio_tower="encoder.")
"""Of transformers' WhisperModel."""
PEFT_PREFIX = "base_model.model."
"""What peft puts before the names of the model it adapts."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one Hugging Face tensor goes.

    Attributes:
      path: our parameter.
      layer: index along its leading axis, None where it is not stacked.
      shape: shape over there.
      split: the same with heads as an axis: ours, without layers and vocabulary padding.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]
    split: tuple[int, ...]


def part_infos(cfg: SpeechLMConfig, parts: Collection[str]) -> dict[str, ParamInfo]:
    """The parameters of `parts` of the model, by path."""
    return {
        path: info for path, info in abstract_params(cfg).items() if path.split("/")[0] in parts
    }


def base_of(cfg: SpeechLMConfig) -> SpeechLMConfig:
    """`cfg` without its adapters."""
    return dataclasses.replace(cfg, lora=())


def slots(
    cfg: SpeechLMConfig, parts: tuple[str, ...] = PARTS, prefixes: Prefixes = LLASO
) -> dict[str, Slot]:
    """Every tensor a checkpoint of `cfg` has, by Hugging Face name, in the order it is written; no adapters.

    Raises:
      UnmappedParameterError: a parameter of the model that no row names.
    """
    tables: dict[str, list[tuple[str, tuple[Row, ...]]]] = {
        "audio_tower": [(prefixes.audio_tower, WHISPER_ENCODER)],
        "projector": [(prefixes.projector, projector_rows(cfg.projector))],
        "language_model": [
            (prefixes.language_model, LLAMA),
            (prefixes.lm_head, () if cfg.text.tie_word_embeddings else LM_HEAD),
        ],
    }
    layers = {
        "audio_tower": cfg.audio.encoder_layers,
        "language_model": cfg.text.num_hidden_layers,
    }
    infos = part_infos(base_of(cfg), parts)
    result: dict[str, Slot] = {}
    for part in parts:
        for prefix, rows in tables[part]:
            for layer in range(layers.get(part, 0)):
                result |= _expand(part, prefix, rows, layer, infos, cfg.text.vocab_size)
            result |= _expand(part, prefix, rows, None, infos, cfg.text.vocab_size)
    unmapped = infos.keys() - {slot.path for slot in result.values()}
    if unmapped:
        raise UnmappedParameterError(
            f"{len(unmapped)} parameters have no row in conversion/tables.py:\n"
            + listing(sorted(unmapped))
        )
    return result


def adapter_slots(
    cfg: SpeechLMConfig, parts: tuple[str, ...] = PARTS, prefixes: Prefixes = LLASO
) -> dict[str, Slot]:
    """Every tensor of the LoRA adapters of `cfg`, by peft's name; see `slots`.

    `lora_A` is [rank, inputs] and `lora_B` [outputs, rank] there; here heads are an axis of their own.
    """
    infos = part_infos(cfg, parts)
    result: dict[str, Slot] = {}
    for name, slot in slots(cfg, parts, prefixes).items():
        linear, module = slot.path.removesuffix("/weight"), name.removesuffix(".weight")
        for half in ("lora_A", "lora_B"):
            path = f"{linear}/{half}/weight"
            if path not in infos:
                continue
            split = infos[path].shape[0 if slot.layer is None else 1 :]
            rank = split[0 if half == "lora_A" else -1]
            width = math.prod(split) // rank
            shape = (rank, width) if half == "lora_A" else (width, rank)
            result[f"{PEFT_PREFIX}{module}.{half}.weight"] = Slot(path, slot.layer, shape, split)
    return result


def _expand(
    part: str,
    prefix: str,
    rows: tuple[Row, ...],
    layer: int | None,
    infos: Mapping[str, ParamInfo],
    vocab_size: int,
) -> dict[str, Slot]:
    found = {}
    for row in rows:
        if ("{i}" in row.hf) != (layer is not None):
            continue
        path = f"{part}/{row.ours}"
        split = infos[path].shape[0 if layer is None else 1 :]
        if row.vocab:
            split = (vocab_size, *split[1:])
        shape = split
        if row.fused is not None:
            at = row.fused
            shape = (*split[:at], split[at] * split[at + 1], *split[at + 2 :])
        found[prefix + row.hf.replace("{i}", str(layer))] = Slot(path, layer, shape, split)
    return found
