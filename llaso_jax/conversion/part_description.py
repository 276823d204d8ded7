"""One part of a model in numbers: its sizes, its tensors, and how they differ from what they should be."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.whisper import WhisperConfig

Sizes = dict[str, Any]


class Described(Protocol):
    """A tensor of which shape and dtype are all that is asked."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> Any:
        """Its dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class WrongShape:
    """A tensor whose shape is not the one the configuration asks for."""

    name: str
    given: tuple[int, ...]
    needed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of tables.PARTS.

    Attributes:
      name: which.
      sizes: under the names of its configuration; empty if there is no usable one.
      tensors: number of tensors.
      parameters: number of their elements.
      nbytes: bytes they take up, once dequantized.
      dtypes: how they are stored -> number of tensors.
      missing: tensors the configuration asks for that are not there.
      unused: tensors that are there and have no place in this architecture.
      wrong_shape: tensors of another shape than it asks for.
      problems: anything else that keeps it from being converted.
    """

    name: str
    sizes: Sizes
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    wrong_shape: tuple[WrongShape, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every tensor is there, is used and fits."""
        return not (self.missing or self.unused or self.wrong_shape or self.problems)


def describe(
    part: str,
    sizes: Sizes,
    tensors: Mapping[str, Described],
    needed: Mapping[str, tuple[int, ...]] | None = None,
    problems: Sequence[str] = (),
) -> Part:
    """`tensors` in numbers and, where it is known what is needed, against that."""
    count = [int(np.prod(tensor.shape)) for tensor in tensors.values()]
    widths = [np.dtype(tensor.dtype).itemsize for tensor in tensors.values()]
    stored = (getattr(tensor, "stored", None) or str(tensor.dtype) for tensor in tensors.values())
    found = Part(
        name=part,
        sizes=sizes,
        tensors=len(tensors),
        parameters=sum(count),
        nbytes=sum(size * width for size, width in zip(count, widths, strict=True)),
        dtypes=dict(Counter(stored).most_common()),
        problems=tuple(problems),
    )
    if needed is None:
        return found
    layers = _layers(tensors), _layers(needed)
    if layers[0] != layers[1]:
        line = f"the configuration says {layers[1]} layers, the tensors are those of {layers[0]}"
        found = dataclasses.replace(found, problems=(*found.problems, line))
    return dataclasses.replace(
        found,
        missing=tuple(name for name in needed if name not in tensors),
        unused=tuple(name for name in tensors if name not in needed),
        wrong_shape=tuple(
            WrongShape(name, tuple(tensors[name].shape), tuple(shape))
            for name, shape in needed.items()
            if name in tensors and tuple(tensors[name].shape) != tuple(shape)
        ),
    )


def _layers(names: Iterable[str]) -> int:
    found = (re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def tower_sizes(cfg: WhisperConfig) -> Sizes:
    """Of the audio tower."""
    names = (
        *("encoder_layers", "d_model", "encoder_attention_heads", "head_dim"),
        *("encoder_ffn_dim", "num_mel_bins", "max_source_positions"),
    )
    return {name: getattr(cfg, name) for name in names}


def projector_sizes(cfg: SpeechLMConfig) -> Sizes:
    """Of the projector, and the widths it stands between."""
    return {
        "type": cfg.projector.type,
        "stack": cfg.projector.stack,
        "reads": cfg.audio.d_model * cfg.projector.stack,
        "writes": cfg.text.hidden_size,
    }


def text_sizes(cfg: LlamaConfig) -> Sizes:
    """Of the language model."""
    names = (
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings", "rms_norm_eps"),
        "rope_theta",
    )
    scaling = cfg.rope_scaling
    return {name: getattr(cfg, name) for name in names} | {
        "rope_scaling": None if scaling is None else dataclasses.asdict(scaling)
    }
