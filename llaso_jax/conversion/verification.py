"""Are two sets of weights the same model? Tensor by tensor, then by what both make of a clip."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llaso_jax.conversion.errors import ConfigMismatchError
from llaso_jax.conversion.lora_merging import merge_weights
from llaso_jax.conversion.model_folder import is_model_folder, open_model
from llaso_jax.conversion.output_comparison import (
    OutputDifference,
    compare_outputs,
    default_clip,
)
from llaso_jax.conversion.tables import PARTS
from llaso_jax.conversion.tensor_comparison import TensorDifference, compare_tensors
from llaso_jax.conversion.weights import Weights, gather_weights
from llaso_jax.modeling.speech_lm import SpeechLMConfig

HARMLESS = ("init_std", "conv_gain", "init_gain", "initializer_range", "vocab_multiple_of")
"""Fields of a configuration that change no answer: how new weights are drawn, how tables are padded."""
_FIELDS = {"audio_tower": "audio", "projector": "projector", "language_model": "text"}


@dataclasses.dataclass(frozen=True)
class ConfigDifference:
    """A field of the configuration that A and B differ in; `matters` if answers depend on it."""

    name: str
    a: Any
    b: Any
    matters: bool


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
      a, b: the two sides, as they were given.
      parts: of tables.PARTS that both have, which were compared.
      alone: part -> the side that alone has it; not compared.
      config: fields that differ.
      tensors: every parameter both have.
      only_a, only_b: parameters of `parts` that one side alone has.
      outputs: None if they were not compared.
      why_no_outputs: the reason then.
      tolerance: that was asked for.
    """

    a: str
    b: str
    parts: tuple[str, ...]
    alone: Mapping[str, str]
    config: tuple[ConfigDifference, ...]
    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    outputs: OutputDifference | None
    why_no_outputs: str | None
    tolerance: float | None

    @property
    def bit_equal(self) -> bool:
        """Whether both compute the very same function."""
        return self.tensors_within and all(tensor.bit_equal for tensor in self.tensors)

    @property
    def tensors_within(self) -> bool:
        """Whether every parameter is there on both sides and within its rule, and no setting differs."""
        return (
            not (self.only_a or self.only_b)
            and all(tensor.within for tensor in self.tensors)
            and not any(field.matters for field in self.config)
        )

    @property
    def outputs_limit(self) -> float | None:
        """Largest relative difference of the logits that counts as equal; None if they decide nothing.

        Equal weights must give equal logits. Rounded ones give logits whose difference no bound is known
        for, so without a tolerance only the weights decide.
        """
        if self.tolerance is not None:
            return self.tolerance
        return 0.0 if self.bit_equal else None

    @property
    def outputs_within(self) -> bool:
        """Whether the logits, if they were compared and decide anything, are equal."""
        if self.outputs is None or self.outputs_limit is None:
            return True
        return self.outputs.logits.max_rel <= self.outputs_limit

    @property
    def equal(self) -> bool:
        """The verdict."""
        return self.tensors_within and self.outputs_within


def open_weights(paths: Sequence[str | Path]) -> Weights:
    """One side: a model folder, or sources as `llaso convert from-hf` takes them; nothing is read yet.

    A projector is never made up: a Whisper and a Llama are those two parts.

    Raises:
      ConversionError, CheckpointError: sources that do not convert (errors.py).
    """
    if len(paths) == 1 and Path(paths[0]).is_dir() and is_model_folder(paths[0]):
        return open_model(paths[0])
    return gather_weights(*paths, new_projector=False)


def verify(
    a: Sequence[str | Path],
    b: Sequence[str | Path],
    *,
    clip: str | Path | None = None,
    dtype: Any = None,
    tolerance: float | None = None,
    outputs: bool = True,
    progress: Callable[[str, int], None] | None = None,
) -> Verification:
    """Compare two sides, LoRA adapters merged; see `open_weights` for what a side may be.

    Args:
      a, b: paths of each.
      clip: recording both are run on; default one of the mini corpus.
      dtype: both sides are rounded to it first.
      tolerance: largest difference allowed, relative to the largest entry of a parameter, or to the largest
        logit. Default: bit-equal where dtypes are the same, else the rounding of the coarser dtype.
      outputs: whether to run the models; needs memory for one of them at a time.
      progress: called with path and bytes of A after every parameter.

    Raises:
      ConversionError, CheckpointError: a side that does not convert.
      ConfigMismatchError: the sides have no part in common.
      AudioError: a clip that cannot be read.
    """
    one, two = merge_weights(open_weights(a)), merge_weights(open_weights(b))
    names = " + ".join(map(str, a)), " + ".join(map(str, b))
    parts = tuple(part for part in PARTS if part in one.parts and part in two.parts)
    if not parts:
        raise ConfigMismatchError(
            f"{names[0]} holds {', '.join(one.parts)} and {names[1]} {', '.join(two.parts)}: there is "
            "nothing to compare. Give two sides that have a part in common."
        )
    alone = {
        part: name
        for name, mine, other in ((names[0], one, two), (names[1], two, one))
        for part in mine.parts
        if part not in other.parts
    }
    one, two = _of(one, parts), _of(two, parts)
    tensors = tuple(compare_tensors(one, two, dtype=dtype, tolerance=tolerance, progress=progress))
    why = _why_no_outputs(parts, tensors, wanted=outputs)
    return Verification(
        a=names[0],
        b=names[1],
        parts=parts,
        alone=alone,
        config=tuple(_config_differences(one.cfg, two.cfg, parts)),
        tensors=tensors,
        only_a=tuple(path for path in one.pieces if path not in two.pieces),
        only_b=tuple(path for path in two.pieces if path not in one.pieces),
        outputs=None if why else compare_outputs(one, two, clip or default_clip(), dtype=dtype),
        why_no_outputs=why,
        tolerance=tolerance,
    )


def _part(path: str) -> str:
    return path.split("/", maxsplit=1)[0]


def _of(weights: Weights, parts: tuple[str, ...]) -> Weights:
    """`weights` of `parts` only, in the order of tables.PARTS."""
    paths = sorted(weights.pieces, key=lambda path: PARTS.index(_part(path)))
    pieces = {path: weights.pieces[path] for path in paths if _part(path) in parts}
    return dataclasses.replace(weights, parts=parts, pieces=pieces)


def _config_differences(
    a: SpeechLMConfig, b: SpeechLMConfig, parts: tuple[str, ...]
) -> list[ConfigDifference]:
    pairs = {} if parts != PARTS else {"audio_mode": (a.audio_mode, b.audio_mode)}
    for part in parts:
        one, two = (dataclasses.asdict(getattr(cfg, _FIELDS[part])) for cfg in (a, b))
        pairs |= {f"{part}.{name}": (one[name], two[name]) for name in one}
    return [
        ConfigDifference(name, one, two, name.split(".")[-1] not in HARMLESS)
        for name, (one, two) in pairs.items()
        if one != two
    ]


def _why_no_outputs(
    parts: tuple[str, ...], tensors: tuple[TensorDifference, ...], *, wanted: bool
) -> str | None:
    if not wanted:
        return "not asked for"
    if parts != PARTS:
        return f"only {', '.join(parts)} can be compared; a whole model is needed on both sides"
    tables = ("embed_tokens/weight", "lm_head/weight")  # a longer vocabulary hides no differences
    other = [t.path for t in tensors if t.shapes[0] != t.shapes[1] and not t.path.endswith(tables)]
    if other:
        return f"the models are of different sizes ({other[0]})"
    return None
