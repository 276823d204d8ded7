"""Matching the tensors of a source with the parameters of the model: all of them, or an error that lists them."""

import re
from collections.abc import Iterable, Mapping

from llaso_jax.conversion.errors import (
    MissingTensorError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedTensorError,
    listing,
)
from llaso_jax.conversion.tables import Slot
from llaso_jax.conversion.tensors import FLOAT_DTYPES, Tensor, Tensors

Pieces = dict[str, list[Tensor]]
"""Our path -> its layers in order (one tensor if it is not stacked), heads split, vocabulary not padded."""

IGNORED = (
    r"(model\.)?decoder\..*",  # Whisper's decoder: LLaSO uses the encoder only
    r"proj_out\.weight",  # Whisper's head, tied to that decoder
    r"(.*\.)?rotary_emb\.inv_freq",  # a buffer old transformers saved; computed from the configuration
)
"""Names that are known, and known not to be needed. Reported, never silent."""


def is_ignored(name: str) -> bool:
    """Whether `name` is one that no model of ours needs."""
    return any(re.fullmatch(pattern, name) for pattern in IGNORED)


def bind(where: str, tensors: Tensors, slots: Mapping[str, Slot]) -> Pieces:
    """Put every tensor into its slot.

    Args:
      where: what the tensors are from, for errors.
      tensors: tensors by Hugging Face name, without the ignored ones.
      slots: all that is needed, by Hugging Face name.

    Raises:
      MissingTensorError, UnexpectedTensorError, TensorShapeError, TensorDtypeError: with the names.
    """
    missing = [name for name in slots if name not in tensors]
    unexpected = [name for name in tensors if name not in slots]
    if missing:
        also = (
            f"\nIt has {len(unexpected)} unknown ones:\n{listing(unexpected)}" if unexpected else ""
        )
        raise MissingTensorError(
            f"{where} lacks {len(missing)} of {len(slots)} tensors:\n{listing(missing)}{also}"
        )
    if unexpected:
        raise UnexpectedTensorError(
            f"{where} has {len(unexpected)} tensors besides the {len(slots)} this architecture has:\n"
            f"{listing(unexpected)}\nCheck that its config.json belongs to these weights."
        )
    check_shapes(where, ((name, tensors[name], slot) for name, slot in slots.items()))
    pieces: Pieces = {}
    for name, slot in slots.items():
        pieces.setdefault(slot.path, []).append(tensors[name].reshape(slot.split))
    _check_dtypes(where, tensors, slots, pieces)
    return pieces


def check_shapes(where: str, triples: Iterable[tuple[str, Tensor, Slot]]) -> None:
    """Raise TensorShapeError unless every tensor has the shape of its slot."""
    wrong = [
        f"{name}: {tensor.shape} given, {slot.shape} needed"
        for name, tensor, slot in triples
        if tensor.shape != slot.shape
    ]
    if wrong:
        raise TensorShapeError(
            f"{where}: {len(wrong)} tensors have another shape than its configuration asks for:\n"
            f"{listing(wrong)}\nCorrect config.json, or take the one that belongs to these weights."
        )


def _check_dtypes(
    where: str, tensors: Tensors, slots: Mapping[str, Slot], pieces: Mapping[str, list[Tensor]]
) -> None:
    wrong = [
        f"{name}: {tensors[name].dtype}"
        for name in slots
        if tensors[name].dtype not in FLOAT_DTYPES
    ]
    if wrong:
        raise TensorDtypeError(
            f"{where}: {len(wrong)} tensors are not "
            f"{', '.join(str(dtype) for dtype in FLOAT_DTYPES)}:\n{listing(wrong)}\n"
            "Quantized weights must be dequantized first."
        )
    mixed = [
        f"{path}: {', '.join(sorted(dtypes))}"
        for path, layers in pieces.items()
        if len(dtypes := {str(layer.dtype) for layer in layers}) > 1
    ]
    if mixed:
        raise TensorDtypeError(
            f"{where}: layers of one parameter differ in dtype:\n{listing(mixed)}\n"
            "They are stored as one array: save the checkpoint in one dtype first."
        )
