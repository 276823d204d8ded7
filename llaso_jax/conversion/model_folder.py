"""The model folder: this project's own format, which training, generation and conversion share.

config.json (architecture, parts, the Hugging Face configuration it came from), params/ (Orbax, sharded), and
beside them tokenizer files and generation_config.json as Hugging Face writes them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from llaso_jax.conversion.binding import Pieces
from llaso_jax.conversion.errors import (
    CorruptFileError,
    MissingTensorError,
    TensorShapeError,
    UnmappedParameterError,
    listing,
)
from llaso_jax.conversion.orbax_tensors import StreamedParam, open_arrays, write_arrays
from llaso_jax.conversion.source import read_json
from llaso_jax.conversion.tables import PARTS, part_infos
from llaso_jax.conversion.tensors import target_dtype
from llaso_jax.conversion.weights import Weights
from llaso_jax.conversion.writing import (
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    copy_files,
    new_folder,
    write_json,
)
from llaso_jax.errors import CheckpointError
from llaso_jax.modeling.functional import (
    ParamInfo,
    Params,
    abstract_params,
    flatten,
    param_shardings,
    unflatten,
)
from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.lora import LoraRule
from llaso_jax.modeling.projector import ProjectorConfig
from llaso_jax.modeling.rope import RopeScaling
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.whisper import WhisperConfig

FORMAT = "llaso_jax"
FORMAT_VERSION = 1
CONFIG = "config.json"
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class FolderInfo:
    """config.json of a model folder.

    Attributes:
      cfg: architecture; parts that are not there have default sizes.
      parts: which of tables.PARTS are there.
      hf_config: the Hugging Face config.json the language model came from, empty if none.
    """

    cfg: SpeechLMConfig
    parts: tuple[str, ...]
    hf_config: dict[str, Any]


def is_model_folder(path: str | Path) -> bool:
    """Whether `path` is a folder of this format."""
    config = Path(path) / CONFIG
    return config.is_file() and read_json(config).get("format") == FORMAT


def save_model(
    folder: str | Path,
    cfg: SpeechLMConfig,
    params: Params,
    *,
    tokenizer_files_from: str | Path | None = None,
    hf_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder; nothing of that name is there until all of it is written.

    Args:
      folder: where to.
      cfg: architecture.
      params: nested parameters of all three parts, or of some; sharded arrays are saved as they lie.
      tokenizer_files_from: folder whose tokenizer files and generation_config.json are copied.
      hf_config: Hugging Face config.json to keep for a later export.
      overwrite: replace what is there.

    Returns:
      The folder.

    Raises:
      TargetExistsError: the folder is not empty and `overwrite` is off.
      ConversionError: parameters that are not those of `cfg` (errors.py), or a full disk.
    """
    parts = tuple(part for part in PARTS if part in params)
    check_params(cfg, params, parts)

    def write(path: Path) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, params)

    info = FolderInfo(cfg, parts, dict(hf_config or {}))
    return _write_folder(folder, info, write, tokenizer_files_from, overwrite=overwrite)


def stream_model(
    folder: str | Path,
    weights: Weights,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    tokenizer_files_from: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """Write a model folder of weights that are not read yet, never holding more than some blocks of them.

    Args:
      folder: where to.
      weights: from `gather_weights` or `open_model`.
      mesh: whose shards the stored chunks shall fit; any other mesh can read them too.
      dtype: of all parameters; default what each source has (f64 becomes f32).
      tokenizer_files_from: as in `save_model`.
      overwrite: replace what is there.
      progress: called with path and bytes after every parameter.

    Returns:
      The folder.

    Raises:
      TargetExistsError: the folder is not empty and `overwrite` is off.
      ConversionError: damaged sources (errors.py), or a full disk.
      ShardingError: parameters that do not split over `mesh`.
    """
    infos = part_infos(weights.cfg, weights.parts)
    shards = param_shardings(weights.cfg, mesh) if mesh is not None else {}
    params = {}
    for path, layers in weights.pieces.items():
        shape, stacked = infos[path].shape, infos[path].stacked
        shard = shards[path].shard_shape(shape) if mesh is not None else shape
        params[path] = StreamedParam(
            shape=shape,
            dtype=target_dtype(layers[0], dtype),
            layers=tuple(layers),
            stacked=stacked,
            shard=(1, *shard[1:]) if stacked else shard,
        )

    def write(path: Path) -> None:
        write_arrays(path, params, progress)

    info = FolderInfo(weights.cfg, weights.parts, weights.hf_config)
    return _write_folder(folder, info, write, tokenizer_files_from, overwrite=overwrite)


def _write_folder(
    folder: str | Path,
    info: FolderInfo,
    write_params: Callable[[Path], None],
    tokenizer_files_from: str | Path | None,
    *,
    overwrite: bool,
) -> Path:
    with new_folder(folder, overwrite=overwrite) as partial:
        write_params(partial / PARAMS)
        if jax.process_index() == 0:
            config = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "parts": list(info.parts),
                "model": dataclasses.asdict(info.cfg),
                "hf_config": info.hf_config,
            }
            write_json(partial / CONFIG, config)
            source = Path(tokenizer_files_from) if tokenizer_files_from is not None else None
            copy_files(source, partial, (*TOKENIZER_FILES, GENERATION_CONFIG))
    return Path(folder).absolute()


def check_params(cfg: SpeechLMConfig, params: Params, parts: tuple[str, ...]) -> None:
    """Raise unless `params` are exactly the parameters of `parts` of the model `cfg`."""
    infos = part_infos(cfg, parts)
    flat = flatten(params)
    _compare(flat.keys(), {path: leaf.shape for path, leaf in flat.items()}, infos, "params")


def read_info(folder: str | Path) -> FolderInfo:
    """What a model folder holds, without reading any weights.

    Raises:
      CheckpointError: not a model folder, or one of a later version.
      CorruptFileError: its config.json is damaged.
    """
    path = Path(folder) / CONFIG
    if not is_model_folder(folder):
        raise CheckpointError(
            f"{folder} is not a model folder (no {CONFIG} with format={FORMAT!r}). Convert Hugging "
            "Face weights with `llaso convert from-hf`."
        )
    config = read_json(path)
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format_version {version}; this version of llaso_jax reads "
            f"{FORMAT_VERSION}. Update llaso_jax."
        )
    try:
        return FolderInfo(
            cfg=config_from_dict(config["model"]),
            parts=tuple(config["parts"]),
            hf_config=config.get("hf_config", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} does not describe a model ({error!r}).") from error


def config_from_dict(config: Mapping[str, Any]) -> SpeechLMConfig:
    """Inverse of `dataclasses.asdict`.

    Raises:
      TypeError, ValueError: unknown fields, or sizes that do not fit together.
    """
    text = dict(config["text"])
    scaling = text.pop("rope_scaling", None)
    lora = tuple(LoraRule(**rule) for rule in config.get("lora", ()))
    return SpeechLMConfig(
        **{
            **config,
            "audio": WhisperConfig(**config["audio"]),
            "projector": ProjectorConfig(**config["projector"]),
            "text": LlamaConfig(**text, rope_scaling=scaling and RopeScaling(**scaling)),
            "lora": lora,
        }
    )


def load_model(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    shardings: Mapping[str, Sharding] | None = None,
    dtype: Any = None,
    parts: tuple[str, ...] = PARTS,
) -> tuple[SpeechLMConfig, Params]:
    """Read a model folder straight into shards, on any mesh.

    Args:
      folder: from `save_model`.
      mesh: shard by the default rules over it.
      shardings: by path, instead of `mesh`. Neither: all on the first device.
      dtype: of all parameters; default as saved.
      parts: which parts to read.

    Returns:
      The architecture, and nested parameters of `parts`.

    Raises:
      CheckpointError: not a model folder, or without one of `parts`.
      ConversionError: parameters that are not those of its config.json (errors.py).
    """
    info, stored = _stored(folder, parts)
    if shardings is None:
        single = SingleDeviceSharding(jax.devices()[0])
        shardings = (
            param_shardings(info.cfg, mesh)
            if mesh is not None
            else dict.fromkeys(abstract_params(info.cfg), single)
        )
    target = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype(dtype or leaf.dtype), sharding=shardings[name]
        )
        for name, leaf in stored.items()
    }
    nested = unflatten(target)
    with ocp.PyTreeCheckpointer() as checkpointer:
        params = checkpointer.restore(
            _params_path(folder),
            args=ocp.args.PyTreeRestore(
                item=nested,
                restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
                partial_restore=True,
            ),
        )
    return info.cfg, params


def open_model(folder: str | Path, *, parts: tuple[str, ...] | None = None) -> Weights:
    """A model folder as weights that are read when they are needed, tensor by tensor.

    Args:
      folder: from `save_model` or `stream_model`.
      parts: which parts; default those that are there.

    Raises:
      CheckpointError, ConversionError: as `load_model`.
    """
    info, stored = _stored(folder, parts)
    infos = part_infos(info.cfg, info.parts)
    pieces: Pieces = {}
    for name, tensor in open_arrays(_params_path(folder), list(stored)).items():
        stacked = infos[name].stacked
        pieces[name] = [tensor.layer(i) for i in range(tensor.shape[0])] if stacked else [tensor]
    return Weights(
        cfg=info.cfg,
        parts=info.parts if parts is None else parts,
        pieces=pieces,
        hf_config=info.hf_config,
        ignored=(),
        notes=(),
        source=Path(folder),
    )


def _params_path(folder: str | Path) -> Path:
    return (Path(folder) / PARAMS).absolute()


def _stored(folder: str | Path, parts: tuple[str, ...] | None) -> tuple[FolderInfo, dict[str, Any]]:
    """What a model folder says it holds, and Orbax's metadata of those parameters, which agree."""
    info = read_info(folder)
    parts = info.parts if parts is None else parts
    absent = [part for part in parts if part not in info.parts]
    if absent:
        raise CheckpointError(
            f"{folder} holds {', '.join(info.parts)} only; {', '.join(absent)} is needed too. Convert a "
            "whole model: `llaso convert from-hf` with a Whisper and a Llama."
        )
    stored = {
        name: leaf for name, leaf in read_metadata(folder).items() if name.split("/")[0] in parts
    }
    shapes = {name: leaf.shape for name, leaf in stored.items()}
    _compare(stored.keys(), shapes, part_infos(info.cfg, parts), str(_params_path(folder)))
    return info, stored


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """Orbax's metadata (shape, dtype) of every parameter in a model folder, by path.

    Raises:
      CorruptFileError: there is no whole Orbax checkpoint in it.
    """
    path = _params_path(folder)
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            return flatten(checkpointer.metadata(path).item_metadata.tree)
        except (FileNotFoundError, ValueError, AttributeError) as error:
            raise CorruptFileError(f"{path} is not a whole Orbax checkpoint ({error}).") from error


def _compare(
    names: Any, shapes: Mapping[str, tuple[int, ...]], infos: Mapping[str, ParamInfo], where: str
) -> None:
    if unknown := sorted(set(names) - infos.keys()):
        raise UnmappedParameterError(
            f"{where}: {len(unknown)} parameters are not the model's:\n{listing(unknown)}"
        )
    if missing := sorted(infos.keys() - set(names)):
        raise MissingTensorError(f"{where} lacks {len(missing)} parameters:\n{listing(missing)}")
    wrong = [
        f"{path}: {tuple(shapes[path])} given, {info.shape} needed"
        for path, info in infos.items()
        if tuple(shapes[path]) != info.shape
    ]
    if wrong:
        raise TensorShapeError(
            f"{where}: {len(wrong)} parameters have another shape than the configuration asks for:\n"
            f"{listing(wrong)}"
        )


__all__ = [
    "FolderInfo",
    "is_model_folder",
    "load_model",
    "open_model",
    "read_info",
    "save_model",
    "stream_model",
]
