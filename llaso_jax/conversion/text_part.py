"""The language model of a conversion: from a LLaSO checkpoint, a Llama folder or a GGUF file."""

import dataclasses

from llaso_jax.conversion.binding import Pieces
from llaso_jax.conversion.errors import ConfigMismatchError, MissingTensorError
from llaso_jax.conversion.hf_config import llama_from_hf
from llaso_jax.conversion.source import Source
from llaso_jax.conversion.sources import Place, Record, Sources, prefix_of
from llaso_jax.conversion.tensors import Tensor, same_values
from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.speech_lm import SpeechLMConfig

LM_HEAD = "lm_head.weight"


def text_part(sources: Sources, record: Record) -> tuple[LlamaConfig, Pieces] | None:
    """Sizes and parameters of the language model, None if no source has one.

    Args:
      sources: what was given.
      record: gets the decisions made.

    Raises:
      ConversionError: tensors or configuration that do not fit (errors.py).
    """
    if sources.text is None:
        return None
    place = text_place(sources, record)
    cfg = text_config(sources.text, place)
    if cfg.tie_word_embeddings and LM_HEAD in place.tensors:
        place = _without_tied_head(place, record)
    return cfg, place.bind("language_model", SpeechLMConfig(text=cfg))


def text_config(source: Source, place: Place) -> LlamaConfig:
    """Sizes of the language model of `source`, whose tensors are in `place`.

    Raises:
      ConfigMismatchError, UnsupportedConfigError: no configuration, or one that does not fit this model.
    """
    if not source.config:
        raise ConfigMismatchError(
            f"{source.path}: no config.json beside the weights. It is needed: the number of heads "
            "and the RoPE settings cannot be read from tensors."
        )
    where = str(source.folder / "config.json")
    return llama_from_hf(place.config, where, has_head=LM_HEAD in place.tensors)


def text_place(sources: Sources, record: Record) -> Place:
    """The tensors of the language model.

    Raises:
      MissingTensorError: a LLaSO checkpoint without any.
    """
    if sources.llaso is not None:
        place = sources.in_llaso("language_model")
        if place is None:
            raise MissingTensorError(f"{sources.llaso.path} has no tensors of a language model.")
        return place
    assert sources.llama is not None
    source = sources.llama
    tensors = record.needed(source.tensors)
    prefix = prefix_of(tensors, ("model.", ""), ("layers.", "embed_tokens.", "norm."))
    return Place(str(source.path), prefix, tensors, source.config)


def _without_tied_head(place: Place, record: Record) -> Place:
    """Drop an lm_head that repeats the embeddings; refuse one that does not."""
    tensors = dict(place.tensors)
    head = tensors.pop(LM_HEAD)
    table = tensors.get(f"{place.prefix}embed_tokens.weight")
    if table is not None and not _same(head, table):
        raise ConfigMismatchError(
            f"{place.where}: the configuration says tie_word_embeddings=true, but {LM_HEAD} "
            f"{head.shape} differs from embed_tokens.weight {table.shape}. Set it to false in "
            "config.json if the head is to be used, or delete the head."
        )
    record.ignored.append(LM_HEAD)
    return dataclasses.replace(place, tensors=tensors)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and len(a.shape) == 2 and same_values(a, b)
