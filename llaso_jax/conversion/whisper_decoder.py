"""The decoder of a Whisper, which this project does not run: handed on to a stock Whisper folder as it came."""

import dataclasses
import re
from pathlib import Path

from llaso_jax.conversion.binding import bind
from llaso_jax.conversion.errors import ConfigMismatchError, MissingTensorError
from llaso_jax.conversion.hf_config import Json
from llaso_jax.conversion.source import Source, read_json
from llaso_jax.conversion.tables import Slot
from llaso_jax.conversion.tensors import Tensor, same_values
from llaso_jax.conversion.writing import GENERATION_CONFIG, TOKENIZER_FILES, copy_files, write_json
from llaso_jax.modeling.whisper import WhisperConfig

PREPROCESSOR = "preprocessor_config.json"
_PREFIX = re.compile(r"(model\.)?decoder\.")
_HEAD = "proj_out.weight"
_TABLE = "embed_tokens.weight"
_NORM = ("weight", "bias")
_ENGLISH_ONLY = 51864
"""Entries of an English-only vocabulary; multilingual ones have more (whisper/tokenizer.py)."""


@dataclasses.dataclass(frozen=True)
class WhisperDecoder:
    """A decoder that is whole.

    Attributes:
      tensors: by Hugging Face name below "decoder.".
      config: what config.json says beside the encoder's sizes.
      folder: where it came from, with its tokenizer and generation settings.
    """

    tensors: dict[str, Tensor]
    config: Json
    folder: Path

    def write_files(self, folder: Path, audio: WhisperConfig) -> None:
        """Tokenizer, generation settings and feature extractor into `folder`: copied, or made where they can be."""
        copy_files(self.folder, folder, (*TOKENIZER_FILES, GENERATION_CONFIG, PREPROCESSOR))
        if not (folder / GENERATION_CONFIG).exists():
            write_json(folder / GENERATION_CONFIG, _generation_config(self))
        if not (folder / PREPROCESSOR).exists():
            write_json(
                folder / PREPROCESSOR,
                {
                    "feature_extractor_type": "WhisperFeatureExtractor",
                    "processor_class": "WhisperProcessor",
                    "feature_size": audio.num_mel_bins,
                    "sampling_rate": 16_000,
                    "hop_length": 160,
                    "n_fft": 400,
                    "chunk_length": 30,
                    "padding_value": 0.0,
                    "return_attention_mask": False,
                },
            )


def whisper_decoder(source: Source) -> WhisperDecoder | None:
    """The decoder beside the encoder of a Whisper, None if it has no layers.

    Raises:
      MissingTensorError, UnexpectedTensorError, TensorShapeError, TensorDtypeError: it is not a whole Whisper
        decoder.
      ConfigMismatchError: a head that is not the token table, or a vocabulary whose special tokens are not known.
    """
    tensors = {
        name[match.end() :]: tensor
        for name, tensor in source.tensors.items()
        if (match := _PREFIX.match(name))
    }
    layers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    if not layers:
        return None
    where = str(source.path)
    sizes = _sizes(where, tensors, max(layers) + 1)
    needed = _shapes(sizes, tensors[_TABLE].shape[1])
    bind(
        f"the decoder of {where}",
        tensors,
        {name: Slot(name, None, shape, shape) for name, shape in needed.items()},
    )
    head = source.tensors.get(_HEAD)
    if head is not None and not same_values(head, tensors[_TABLE]):
        raise ConfigMismatchError(
            f"{where}: {_HEAD} differs from the token table, to which every Whisper's head is tied."
        )
    given = dict(source.config)
    if "decoder_start_token_id" not in given:
        given |= _special_ids(where, sizes["vocab_size"])
    heads = given.get("encoder_attention_heads") or tensors[_TABLE].shape[1] // 64
    config = {"decoder_attention_heads": heads, **given, **sizes, "tie_word_embeddings": True}
    return WhisperDecoder({name: tensors[name] for name in needed}, config, source.folder)


def _sizes(where: str, tensors: dict[str, Tensor], layers: int) -> dict[str, int]:
    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise MissingTensorError(f"the decoder of {where} has no two-dimensional {name}.")
        return tensors[name].shape

    return {
        "decoder_layers": layers,
        "decoder_ffn_dim": shape("layers.0.fc1.weight")[0],
        "vocab_size": shape(_TABLE)[0],
        "max_target_positions": shape("embed_positions.weight")[0],
    }


def _shapes(sizes: dict[str, int], width: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a decoder (transformers modeling_whisper.py WhisperDecoder)."""
    shapes: dict[str, tuple[int, ...]] = {
        _TABLE: (sizes["vocab_size"], width),
        "embed_positions.weight": (sizes["max_target_positions"], width),
        **{f"layer_norm.{leaf}": (width,) for leaf in _NORM},
    }
    ffn = sizes["decoder_ffn_dim"]
    for layer in range(sizes["decoder_layers"]):
        of: dict[str, tuple[int, ...]] = {}
        for attention in ("self_attn", "encoder_attn"):
            of |= {f"{attention}.{p}_proj.weight": (width, width) for p in ("q", "k", "v", "out")}
            of |= {f"{attention}.{p}_proj.bias": (width,) for p in ("q", "v", "out")}
            of |= {f"{attention}_layer_norm.{leaf}": (width,) for leaf in _NORM}
        of |= {f"final_layer_norm.{leaf}": (width,) for leaf in _NORM}
        of |= {"fc1.weight": (ffn, width), "fc1.bias": (ffn,)}
        of |= {"fc2.weight": (width, ffn), "fc2.bias": (width,)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in of.items()}
    return shapes


def _special_ids(where: str, vocab_size: int) -> Json:
    """Of OpenAI's two vocabularies (config.json of openai/whisper-tiny.en and openai/whisper-tiny)."""
    if vocab_size < _ENGLISH_ONLY:
        raise ConfigMismatchError(
            f"{where} does not say which tokens begin and end a transcript, and its vocabulary of "
            f"{vocab_size} is none of OpenAI's ({_ENGLISH_ONLY} or more)."
        )
    if vocab_size == _ENGLISH_ONLY:
        end, start, begin = 50256, 50257, 50257
    else:
        end, start, begin = 50257, 50257, 50258
    return {
        "eos_token_id": end,
        "pad_token_id": end,
        "bos_token_id": start,
        "decoder_start_token_id": begin,
    }


def _generation_config(decoder: WhisperDecoder) -> Json:
    """What CTranslate2 keeps in its config.json, in transformers' terms; ids are those of the tokenizer."""
    config = decoder.config
    made: Json = {
        name: config[name]
        for name in ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
        if config.get(name) is not None
    }
    made |= {"max_length": config["max_target_positions"], "return_timestamps": False}
    theirs = decoder.folder / "config.json"
    kept = read_json(theirs) if theirs.is_file() else {}
    for name, key in (
        ("suppress_tokens", "suppress_ids"),
        ("begin_suppress_tokens", "suppress_ids_begin"),
        ("alignment_heads", "alignment_heads"),
    ):
        if kept.get(key):
            made[name] = kept[key]
    ids = _added_tokens(decoder.folder / "tokenizer.json")
    if "<|notimestamps|>" in ids:
        made["no_timestamps_token_id"] = ids["<|notimestamps|>"]
    if made.get("decoder_start_token_id") != ids.get("<|startoftranscript|>"):
        return made
    made["is_multilingual"] = config["vocab_size"] > _ENGLISH_ONLY
    if made["is_multilingual"]:
        languages = set(kept.get("lang_ids", ()))
        made["lang_to_id"] = {name: i for name, i in ids.items() if i in languages}
        tasks = {task: ids.get(f"<|{task}|>") for task in ("transcribe", "translate")}
        made["task_to_id"] = {task: number for task, number in tasks.items() if number is not None}
    return made


def _added_tokens(tokenizer: Path) -> dict[str, int]:
    if not tokenizer.is_file():
        return {}
    return {token["content"]: token["id"] for token in read_json(tokenizer).get("added_tokens", [])}
