"""What is at a path: which format, which tensors, which configuration. Found out from content, not from names."""

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any, Literal

from llaso_jax.conversion.ctranslate2_file import looks_like_ctranslate2, read_ctranslate2
from llaso_jax.conversion.errors import (
    CorruptFileError,
    DuplicateTensorError,
    MissingShardError,
    UnknownSourceError,
    listing,
)
from llaso_jax.conversion.gguf_file import MAGIC as GGUF_MAGIC
from llaso_jax.conversion.gguf_file import read_gguf
from llaso_jax.conversion.hub import HUB_ID, fetch
from llaso_jax.conversion.safetensors_file import looks_like_safetensors, read_safetensors
from llaso_jax.conversion.tensors import ByteFile, Tensor
from llaso_jax.conversion.torch_file import PICKLE_MAGIC, ZIP_MAGIC, read_torch

logger = logging.getLogger(__name__)

Kind = Literal["llaso", "whisper", "llama", "projector", "adapter"]

ALIGNER = "mm_audio_aligner"
ADAPTER_CONFIG = "adapter_config.json"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_ACCEPTED = (
    "Accepted are folders of transformers or LLaSO (safetensors or .bin, single or sharded), "
    "mm_audio_aligner files, LoRA adapters of PEFT, CTranslate2 Whisper models, GGUF Llama files "
    "and ids of the Hugging Face hub (owner/name)."
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights at a path, not read yet.

    Attributes:
      path: what was asked for.
      kind: which model they are of.
      format: how they are stored.
      tensors: by Hugging Face name.
      config: config.json, or what other metadata says in its terms; empty if there is none.
      files: what the tensors are in.
    """

    path: Path
    kind: Kind
    format: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where tokenizer and configuration files are looked for."""
        return self.path if self.path.is_dir() else self.path.parent


def open_source(path: str | Path) -> Source:
    """Find out what is at `path` and list its tensors.

    Args:
      path: a file, a folder, or an id on the Hugging Face hub (hub.py).

    Raises:
      UnknownSourceError: nothing there, or no weights in a known format.
      ConversionError: a damaged file, in one of its classes (errors.py).
    """
    path = Path(path)
    if not path.exists() and HUB_ID.fullmatch(str(path)):
        path = fetch(str(path))
    if not path.exists():
        raise UnknownSourceError(f"{path} does not exist. {_ACCEPTED}")
    files = [path] if path.is_file() else _weight_files(path)

    if _is_parted(files):
        file_format = "ctranslate2"
        tensors, config = read_ctranslate2(ByteFile(*files))
    else:
        formats = {_sniff(file) for file in files}
        if len(formats) > 1:
            raise UnknownSourceError(
                f"{path} mixes {' and '.join(sorted(formats))}: give one file."
            )
        (file_format,) = formats
        tensors, config = _read(files, file_format)
    adapter = any(".lora_" in name for name in tensors)
    config_name = ADAPTER_CONFIG if adapter else "config.json"
    config_file = (path if path.is_dir() else path.parent) / config_name
    if file_format in ("safetensors", "torch") and config_file.is_file():
        config = read_json(config_file)
    kind = "adapter" if adapter else _kind(path, tensors, config)
    return Source(path, kind, file_format, tensors, config, tuple(files))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      CorruptFileError: not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptFileError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} holds a {type(value).__name__}, not an object.")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The files of `folder` that together are its weights, in the order transformers prefers."""
    for name in (_INDEXES[0], _SINGLES[0], _INDEXES[1], _SINGLES[1]):
        if (folder / name).is_file():
            others = [other for other in (*_INDEXES, *_SINGLES) if (folder / other).is_file()]
            if len(others) > 1:
                logger.info("%s has %s; reading %s", folder, ", ".join(others), name)
            return _shards(folder / name) if name in _INDEXES else [folder / name]
    for name in _ADAPTERS:
        if (folder / name).is_file():
            return [folder / name]
    parts = sorted(folder.glob("model.bin.part*"))
    if parts:
        return parts
    candidates = [
        file
        for pattern in ("*.safetensors", "*.bin", "*.gguf")
        for file in sorted(folder.glob(pattern))
        if file.name != "training_args.bin"
    ]
    if len(candidates) > 1:
        raise UnknownSourceError(
            f"{folder} has several weight files and no index:\n{listing(f.name for f in candidates)}\n"
            "Give the path of one of them."
        )
    if not candidates:
        raise UnknownSourceError(f"{folder} holds no weights. {_ACCEPTED}")
    return candidates


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index} has no weight_map.")
    files = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise CorruptFileError(f"{index} names files outside its folder:\n{listing(outside)}")
    absent = [name for name in files if not (index.parent / name).is_file()]
    if absent:
        raise MissingShardError(
            f"{index} names {len(files)} files, of which {len(absent)} are not there:\n"
            f"{listing(absent)}\nCopy or download them again."
        )
    return [index.parent / name for name in files]


def _is_parted(files: list[Path]) -> bool:
    return ".part" in files[0].name and looks_like_ctranslate2(ByteFile(files[0]))


def _sniff(path: Path) -> str:
    file = ByteFile(path)
    head = bytes(file.read(0, min(4, file.size)))
    if head == GGUF_MAGIC:
        return "gguf"
    if head == ZIP_MAGIC or head[:2] == PICKLE_MAGIC:
        return "torch"
    if looks_like_ctranslate2(file):
        return "ctranslate2"
    # A damaged file is better reported by the reader its name asks for.
    if looks_like_safetensors(file) or path.suffix == ".safetensors":
        return "safetensors"
    raise UnknownSourceError(f"{path} ({file.size} bytes) is in no known format. {_ACCEPTED}")


def _read(files: list[Path], file_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if file_format == "ctranslate2":
        return read_ctranslate2(ByteFile(*files))
    if file_format == "gguf":
        return read_gguf(files[0])
    read = read_safetensors if file_format == "safetensors" else read_torch
    tensors: dict[str, Tensor] = {}
    home: dict[str, str] = {}
    for file in files:
        found = read(file)
        twice = [f"{name}: {home[name]}, {file.name}" for name in found if name in home]
        if twice:
            raise DuplicateTensorError(
                f"{file.parent}: {len(twice)} tensors are in two files:\n{listing(twice)}"
            )
        home |= dict.fromkeys(found, file.name)
        tensors |= found
    return tensors, {}


def _kind(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Kind:
    """Which model these tensors are of, even when some of them are missing or misnamed."""

    def any_like(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in tensors)

    aligner = any_like(rf"(^|\.){ALIGNER}\.|^projector\.")
    if any_like(r"(^|\.)layers\.\d+\.(mlp\.|input_layernorm)"):
        named = config.get("model_type") == "llava_llama"
        return "llaso" if aligner or named or any_like(r"\.audio_tower\.") else "llama"
    if any_like(r"(^|\.)conv[12]\.|(^|\.)layers\.\d+\.(fc1|self_attn_layer_norm)\."):
        return "whisper"
    if aligner:
        return "projector"
    raise UnknownSourceError(
        f"{path} holds {len(tensors)} tensors that are of no Whisper, Llama or LLaSO model:\n"
        f"{listing(tensors)}\n{_ACCEPTED}"
    )
