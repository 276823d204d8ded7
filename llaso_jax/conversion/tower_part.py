"""The audio tower of a conversion: inside a LLaSO checkpoint, from a Whisper folder, or from CTranslate2."""

import re
from collections.abc import Mapping
from typing import Any

from llaso_jax.conversion.binding import Pieces
from llaso_jax.conversion.errors import ConfigMismatchError, MissingTensorError
from llaso_jax.conversion.hf_config import whisper_from_hf
from llaso_jax.conversion.llaso_config import check_llaso, check_width, find_tower, ours_of
from llaso_jax.conversion.source import open_source, read_json
from llaso_jax.conversion.sources import Place, Record, Sources, prefix_of
from llaso_jax.conversion.tensors import Tensor
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.whisper import WhisperConfig

HEADS = "encoder_attention_heads"
HEAD_DIM = 64  # of every Whisper that was released
_SIZES = {
    "d_model",
    "num_mel_bins",
    "max_source_positions",
    "encoder_ffn_dim",
    "encoder_layers",
}
_PREFIXES = (
    "model.encoder.",
    "encoder.",
    "",
)  # ForConditionalGeneration, WhisperModel, the encoder


def tower_part(sources: Sources, record: Record) -> tuple[WhisperConfig, Pieces] | None:
    """Sizes and parameters of the audio tower, None if no source has or names one.

    Raises:
      MissingTensorError: a LLaSO checkpoint without tower, whose Whisper is neither given nor found.
      ConversionError: tensors or configuration that do not fit (errors.py).
    """
    llaso = sources.llaso
    if llaso is not None:
        check_llaso(llaso.config, str(llaso.folder / "config.json"))
    place = tower_place(sources, record)
    if place is None:
        return None
    cfg = tower_config(place, record)
    if llaso is not None:
        check_width(llaso.config, str(llaso.folder / "config.json"), cfg.d_model)
    return cfg, place.bind("audio_tower", SpeechLMConfig(audio=cfg))


def tower_place(sources: Sources, record: Record) -> Place | None:
    """The tensors of the audio tower and what is said of its sizes, None if no source has or names one.

    Raises:
      MissingTensorError: a LLaSO checkpoint without tower, whose Whisper is neither given nor found.
    """
    inside = sources.in_llaso("audio_tower")
    return _with_hints(sources, inside, record) if inside else _outside(sources, record)


def _with_hints(sources: Sources, place: Place, record: Record) -> Place:
    """The tower inside a checkpoint; what shapes do not tell is looked up where it came from."""
    assert sources.llaso is not None
    hints: Mapping[str, Any] = ours_of(sources.llaso.config).get("audio", {})
    folder = find_tower(sources.llaso.config, sources.llaso.folder)
    if sources.whisper is not None:
        hints = sources.whisper.config
        record.note(
            f"{sources.whisper.path} is used for the tower's sizes only: "
            f"{sources.llaso.path} has its own tower"
        )
    elif not hints and folder is not None and (folder / "config.json").is_file():
        hints = read_json(folder / "config.json")
        record.note(f"sizes of the audio tower are from {folder / 'config.json'}")
    return Place(place.where, place.prefix, place.tensors, hints)


def _outside(sources: Sources, record: Record) -> Place | None:
    source = sources.whisper
    if source is None and sources.llaso is not None:
        name = sources.llaso.config.get("mm_audio_tower")
        folder = find_tower(sources.llaso.config, sources.llaso.folder)
        if folder is None:
            raise MissingTensorError(
                f"{sources.llaso.path} holds no audio tower; it was saved to be used with {name!r}, "
                "which is not on this machine. Give that Whisper folder too (--whisper DIR)."
            )
        record.note(f"the audio tower is {folder}, which the checkpoint's mm_audio_tower names")
        source = open_source(folder)
    if source is None:
        return None
    tensors = record.needed(source.tensors)
    prefix = prefix_of(tensors, _PREFIXES, ("layers.", "conv1.", "conv2."))
    return Place(str(source.path), prefix, tensors, source.config)


def tower_config(place: Place, record: Record) -> WhisperConfig:
    """Sizes of the audio tower in `place`: what its configuration says, else what shapes tell.

    Raises:
      MissingTensorError: neither says.
      ConfigMismatchError, UnsupportedConfigError: a configuration that does not fit this model.
    """
    config = {k: v for k, v in place.config.items() if v is not None}
    if not config.keys() >= _SIZES:
        config = {**_sizes(place), **config}
    if HEADS not in config:
        width = config["d_model"]
        if width % HEAD_DIM:
            raise ConfigMismatchError(
                f"{place.where}: the tower's d_model={width} is no multiple of {HEAD_DIM}, the head "
                "width of the released Whispers, and no configuration says how many heads it has. "
                "Give the Whisper folder it came from (--whisper DIR)."
            )
        config[HEADS] = width // HEAD_DIM
        record.note(
            f"the audio tower is taken to have {config[HEADS]} heads ({width} / {HEAD_DIM}, as all "
            "released Whispers); give its folder with --whisper if it is another"
        )
    return whisper_from_hf(config, place.where)


def _sizes(place: Place) -> dict[str, int]:
    """What shapes say about an encoder."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        tensor: Tensor | None = place.tensors.get(place.prefix + name)
        if tensor is None or len(tensor.shape) != rank:
            raise MissingTensorError(
                f"{place.where} has no {rank}-dimensional {place.prefix}{name}, which gives the sizes "
                "of the audio tower."
            )
        return tensor.shape

    pattern = re.compile(re.escape(place.prefix) + r"layers\.(\d+)\.")
    layers = [int(match[1]) for name in place.tensors if (match := pattern.match(name))]
    d_model, mels, _ = shape("conv1.weight", 3)
    return {
        "d_model": d_model,
        "num_mel_bins": mels,
        "max_source_positions": shape("embed_positions.weight", 2)[0],
        "encoder_ffn_dim": shape("layers.0.fc1.weight", 2)[0],
        "encoder_layers": max(layers) + 1,
    }
