"""LoRA adapters in PEFT's layout, merged into the weights they were trained on.

W + scale * B A, scale = alpha / r, or alpha / sqrt(r) with rsLoRA, computed in float32 when W is read.
Sources: peft/utils/save_and_load.py (names), peft/tuners/lora/layer.py `get_delta_weight`, `update_layer`
(scales; embeddings have A and B transposed), peft/tuners/lora/model.py (patterns).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llaso_jax.conversion.errors import (
    ConfigMismatchError,
    MissingTensorError,
    TensorShapeError,
    UnsupportedConfigError,
    listing,
)
from llaso_jax.conversion.source import ADAPTER_CONFIG, Source
from llaso_jax.conversion.tensors import ComputedTensor, Tensor
from llaso_jax.modeling.lora import lora_scale

_WRAPPER = "base_model.model."
_HALF = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<half>[AB])(\.default)?(\.weight)?"
)
_ALTERS_ITS_BASE = ("pissa", "olora", "corda", "loftq")
"""`init_lora_weights` that train against another base than the one on disk."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A [r, in], B [out, r]; of an embedding [V, D]: A [r, V], B [D, r]. `stabilized`: alpha is over sqrt(r)."""

    a: Tensor
    b: Tensor
    embedding: bool
    alpha: float
    stabilized: bool

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return lora_scale(self.alpha, self.rank, self.stabilized)

    @property
    def rank(self) -> int:
        """r, as A has it."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it changes."""
        out, inner = self.b.shape[0], self.a.shape[1]
        return (inner, out) if self.embedding else (out, inner)


def base_of(adapter: Source, candidates: Sequence[Source]) -> Source:
    """The first of `candidates` that has all weights `adapter` changes; the first one if none has.

    Raises:
      ConversionError: as `read_adapter`.
    """
    _check_config(adapter)
    pairs, replaced = _read_names(adapter)
    needed = [f"{module}.weight" for module in pairs] + list(replaced)
    return next((base for base in candidates if _names_in(base, needed)), candidates[0])


def merge_adapter(base: Source, adapter: Source) -> Source:
    """`base` with the changes of `adapter` in it, still not read; its tensors keep their dtypes.

    Raises:
      ConversionError: as `read_adapter`.
    """
    base, pairs = read_adapter(base, adapter)
    changed = {
        name: merged_tensor(
            base.tensors[name], pair.a, pair.b, pair.scale, embedding=pair.embedding
        )
        for name, pair in pairs.items()
    }
    return dataclasses.replace(base, tensors=base.tensors | changed)


def read_adapter(base: Source, adapter: Source) -> tuple[Source, dict[str, Pair]]:
    """What `adapter` has for `base`.

    Args:
      base: the model that was trained.
      adapter: kind "adapter": pairs `lora_A`, `lora_B`, and whole tensors (`modules_to_save`).

    Returns:
      `base` with the whole tensors replaced, and the pairs by the name their weight has in it.

    Raises:
      UnsupportedConfigError: an adapter that is not plain LoRA.
      MissingTensorError: half of a pair, or weights that `base` does not have.
      TensorShapeError: pairs that do not fit their weight.
      ConfigMismatchError: adapter_config.json without lora_alpha.
    """
    found, replaced = _read_names(adapter)
    needed = [f"{module}.weight" for module in found] + list(replaced)
    where = _names_in(base, needed)
    if where is None:
        absent = [name for name in needed if name not in base.tensors]
        trained_on = adapter.config.get("base_model_name_or_path") or "another model"
        raise MissingTensorError(
            f"{adapter.path} changes {len(absent)} tensors that {base.path} does not have:\n"
            f"{listing(absent)}\nIt was trained on {trained_on}."
        )
    tensors = base.tensors | {where[name]: tensor for name, tensor in replaced.items()}
    pairs = {where[f"{module}.weight"]: pair for module, pair in found.items()}
    wrong = [
        f"{name} {tensors[name].shape}: lora_A {pair.a.shape} and lora_B {pair.b.shape} given"
        for name, pair in pairs.items()
        if pair.b.shape[1] != pair.rank or pair.shape != tensors[name].shape
    ]
    if wrong:
        raise TensorShapeError(
            f"{adapter.path}: {len(wrong)} pairs do not fit the weights of {base.path}:\n{listing(wrong)}"
        )
    return dataclasses.replace(base, tensors=tensors), pairs


def merged_tensor(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, *, embedding: bool = False
) -> ComputedTensor:
    """`weight` [*out, *in] + scale * B A, computed in float32 when it is read, in the dtype of `weight`.

    Args:
      weight: may have several input or output axes.
      a: [rank, *in].
      b: [*out, rank].
      scale: factor on B A.
      embedding: `weight` is [*in, *out] instead, both of them one axis.
    """

    def compute() -> np.ndarray:
        change = np.tensordot(b.read().astype(np.float32), a.read().astype(np.float32), axes=1)
        change = (change.T if embedding else change) * np.float32(scale)
        return (weight.read().astype(np.float32) + change).astype(weight.dtype)

    return ComputedTensor(weight.shape, weight.dtype, compute)


def _check_config(adapter: Source) -> None:
    where = adapter.folder / ADAPTER_CONFIG
    config = adapter.config
    if config.get("peft_type", "LORA") != "LORA":
        raise UnsupportedConfigError(
            f"{where}: peft_type={config['peft_type']!r}; only LORA can be merged here. Merge it with "
            "peft (merge_and_unload) first."
        )
    for flag in ("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "megatron_config"):
        if config.get(flag):
            raise UnsupportedConfigError(
                f"{where}: {flag}={config[flag]!r} is more than plain LoRA. Merge it with peft "
                "(merge_and_unload) first."
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_ALTERS_ITS_BASE):
        raise UnsupportedConfigError(
            f"{where}: init_lora_weights={start!r} changed the base model before training, so the "
            "adapter does not fit the weights on disk. Convert it to plain LoRA with peft "
            "(save_pretrained with path_initial_model_for_weight_conversion) first."
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ConfigMismatchError(
            f"{where} has no lora_alpha: the scale of the adapter is not known."
        )


def _read_names(adapter: Source) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Pairs by module, and tensors that replace whole ones, as the base model names them."""
    halves: dict[tuple[str, bool], dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        short = name.removeprefix(_WRAPPER)
        if match := _HALF.fullmatch(short):
            key = (match["module"], match["kind"] is not None)
            halves.setdefault(key, {})[match["half"]] = tensor
        else:
            # An embedding with an adapter is saved with its own weight too (save_embedding_layers).
            replaced[short.replace(".base_layer.", ".")] = tensor
    lonely = [
        f"{module}: lora_{next(iter(found))} only"
        for (module, _), found in halves.items()
        if len(found) < 2
    ]
    if lonely:
        raise MissingTensorError(
            f"{adapter.path}: {len(lonely)} modules have half of a pair:\n{listing(lonely)}"
        )
    pairs = {
        module: Pair(
            found["A"],
            found["B"],
            embedding,
            _alpha(adapter.config, module),
            bool(adapter.config.get("use_rslora")),
        )
        for (module, embedding), found in halves.items()
    }
    return pairs, replaced


def _names_in(base: Source, needed: list[str]) -> dict[str, str] | None:
    """What `base` calls each tensor: some checkpoints leave the first `model.` out, others add it."""
    for old, new in (("", ""), ("model.", ""), ("", "model.")):
        names = {name: new + name.removeprefix(old) for name in needed}
        if all(name in base.tensors for name in names.values()):
            return names
    return None


def _alpha(config: Mapping[str, Any], module: str) -> float:
    patterns = config.get("alpha_pattern") or {}
    return next(
        (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)),
        config["lora_alpha"],
    )
