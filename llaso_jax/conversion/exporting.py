"""Hugging Face folders out of parameters: LLaSO layout, stock Llama, stock Whisper, adapters of PEFT.

Tensors leave the devices, or the files they come from, one by one while the file is written.
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llaso_jax.conversion.binding import Pieces
from llaso_jax.conversion.device_tensors import pieces_of
from llaso_jax.conversion.errors import MissingTensorError, TensorDtypeError, listing
from llaso_jax.conversion.hf_config import Json, llama_to_hf, whisper_to_hf
from llaso_jax.conversion.llaso_config import llaso_to_hf
from llaso_jax.conversion.lora_merging import merge_pieces
from llaso_jax.conversion.model_folder import check_params
from llaso_jax.conversion.peft_config import adapter_config
from llaso_jax.conversion.safetensors_file import write_safetensors
from llaso_jax.conversion.source import ADAPTER_CONFIG, ALIGNER
from llaso_jax.conversion.tables import (
    LLASO,
    PARTS,
    WHISPER,
    Prefixes,
    Slot,
    adapter_slots,
    part_infos,
    slots,
)
from llaso_jax.conversion.tensors import (
    FLOAT_DTYPES,
    Tensor,
    array_tensor,
    row_boxes,
    target_dtype,
)
from llaso_jax.conversion.torch_file import write_torch
from llaso_jax.conversion.whisper_decoder import WhisperDecoder
from llaso_jax.conversion.writing import (
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    copy_files,
    new_file,
    new_folder,
    write_json,
)
from llaso_jax.modeling.functional import Params
from llaso_jax.modeling.speech_lm import SpeechLMConfig

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5_000_000_000
Specs = dict[str, tuple[tuple[int, ...], np.dtype]]


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How to write, the same for all layouts.

    Attributes:
      dtype: of the tensors; None keeps each one's.
      max_shard_bytes: size at which the next .safetensors file starts.
      overwrite: replace what is there.
      progress: called with name and bytes after every tensor.
      merge_adapters: write weights with LoRA adapters merged into them; else as they are without.
    """

    dtype: Any = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False
    progress: Callable[[str, int], None] | None = None
    merge_adapters: bool = True


def export_llaso(
    folder: str | Path,
    cfg: SpeechLMConfig,
    params: Params | Pieces,
    *,
    hf_config: Mapping[str, Any] | None = None,
    files_from: str | Path | None = None,
    with_tower: bool = True,
    tower_name: str | None = None,
    options: ExportOptions = ExportOptions(),
) -> Path:
    """Write a LLaSO checkpoint, its side file mm_audio_aligner.bin included.

    Args:
      folder: where to.
      cfg: the model.
      params: nested parameters of all three parts, or tensors that are not read yet (`Weights.pieces`).
      hf_config: config.json the model came from; fields we do not know are kept from it.
      files_from: folder of tokenizer files and generation_config.json to copy.
      with_tower: write the audio tower into the checkpoint; without it, upstream loads `tower_name`.
      tower_name: `mm_audio_tower`: a folder or a hub id; default that of `hf_config`, else "whisper".
      options: dtype, shard size, overwriting, progress.

    Returns:
      The folder.

    Raises:
      TargetExistsError: the folder is not empty and options.overwrite is off.
      ConversionError: parameters that are not those of `cfg` (errors.py), or a full disk.
    """
    parts = PARTS if with_tower else PARTS[1:]
    # HF order: the decoder first, then what LLaSO adds to it.
    table = slots(cfg, ("language_model", *parts[:-1]))
    tensors = _Exporter(cfg, params, PARTS, table, options)
    config = llaso_to_hf(cfg, dtype=tensors.main_dtype, source=hf_config or {}, tower=tower_name)
    with new_folder(folder, overwrite=options.overwrite) as partial:
        tensors.write(partial)
        tensors.write_aligner(partial / f"{ALIGNER}.bin")
        _write_text_files(partial, config, files_from)
    return Path(folder).absolute()


def export_llama(
    folder: str | Path,
    cfg: SpeechLMConfig,
    params: Params | Pieces,
    *,
    hf_config: Mapping[str, Any] | None = None,
    files_from: str | Path | None = None,
    options: ExportOptions = ExportOptions(),
) -> Path:
    """Write the language model as transformers' LlamaForCausalLM; arguments as `export_llaso`."""
    parts = ("language_model",)
    tensors = _Exporter(cfg, params, parts, slots(cfg, parts), options)
    config = llama_to_hf(cfg.text, dtype=tensors.main_dtype, source=hf_config or {})
    with new_folder(folder, overwrite=options.overwrite) as partial:
        tensors.write(partial)
        _write_text_files(partial, config, files_from)
    return Path(folder).absolute()


def export_whisper(
    folder: str | Path,
    cfg: SpeechLMConfig,
    params: Params | Pieces,
    *,
    decoder: WhisperDecoder | None = None,
    options: ExportOptions = ExportOptions(),
) -> Path:
    """Write the audio tower as transformers' WhisperForConditionalGeneration, or as a WhisperModel without layers
    in its decoder.

    There is no stock class for an encoder alone. The tensors such a model must have beside the encoder
    (a token table, a position table, a norm) are written as one row each, so that it loads with
    nothing missing; `WhisperModel.from_pretrained(folder).encoder` is the encoder, as upstream loads it.

    Args:
      folder: where to.
      cfg: the model.
      params: nested parameters, or tensors that are not read yet; with the audio tower at least.
      decoder: goes with it: then the folder transcribes, with tokenizer and generation settings.
      options: dtype, overwriting, progress.
    """
    parts = ("audio_tower",)
    prefix = "model." if decoder else ""
    table = slots(cfg, parts, Prefixes(audio_tower=f"{prefix}{WHISPER.audio_tower}"))
    tensors = _Exporter(cfg, params, parts, table, options)
    rest = decoder.tensors if decoder else _no_decoder(cfg.audio.d_model)
    tensors.extra = {f"{prefix}decoder.{name}": tensor for name, tensor in rest.items()}
    config = {
        **_WITHOUT_DECODER,
        "decoder_attention_heads": cfg.audio.encoder_attention_heads,
        "decoder_ffn_dim": cfg.audio.encoder_ffn_dim,
        **(decoder.config if decoder else {}),
        **whisper_to_hf(cfg.audio),
        "torch_dtype": tensors.main_dtype,
    }
    if decoder:
        config["architectures"] = ["WhisperForConditionalGeneration"]
    with new_folder(folder, overwrite=options.overwrite) as partial:
        tensors.write(partial)
        write_json(partial / "config.json", config)
        if decoder and jax.process_index() == 0:
            decoder.write_files(partial, cfg.audio)
    return Path(folder).absolute()


_WITHOUT_DECODER: Json = {
    "decoder_layers": 0,
    "vocab_size": 1,
    "max_target_positions": 1,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def _no_decoder(width: int) -> dict[str, Tensor]:
    """What a decoder without layers has."""
    shapes = {"embed_tokens": (1, width), "embed_positions": (1, width), "layer_norm": (width,)}
    tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tensors["layer_norm.weight"] += 1
    tensors["layer_norm.bias"] = np.zeros(width, np.float32)
    return {name: array_tensor(values) for name, values in tensors.items()}


def export_projector(
    path: str | Path,
    cfg: SpeechLMConfig,
    params: Params | Pieces,
    *,
    options: ExportOptions = ExportOptions(),
) -> Path:
    """Write the projector alone, as upstream's stage 1 leaves it (mm_audio_aligner.bin); by one process.

    Raises:
      TargetExistsError: the file is there and options.overwrite is off.
      ConversionError: parameters that are not those of `cfg` (errors.py), or a full disk.
    """
    parts = ("projector",)
    tensors = _Exporter(cfg, params, parts, slots(cfg, parts), options)
    with new_file(path, overwrite=options.overwrite) as partial:
        tensors.write_aligner(partial)
    return Path(path).absolute()


def export_adapter(
    folder: str | Path,
    cfg: SpeechLMConfig,
    params: Params | Pieces,
    *,
    parts: tuple[str, ...] = PARTS,
    prefixes: Prefixes = LLASO,
    base_model: str | None = None,
    options: ExportOptions = ExportOptions(),
) -> Path:
    """Write the LoRA adapters of `parts` as peft does (`PeftModel.from_pretrained(base, folder)`).

    Args:
      folder: where to.
      cfg: the model, with adapters.
      params: nested parameters, or tensors that are not read yet.
      parts: whose adapters.
      prefixes: what the base model calls its tensors. Names of a Llama are the same in a LLaSO checkpoint.
      base_model: `base_model_name_or_path`: the model that the adapter changes.
      options: dtype, overwriting, progress.

    Returns:
      The folder.

    Raises:
      UnsupportedConfigError: no adapter in `parts`, or adapters of plain and of rank-stabilized scale.
      TargetExistsError: the folder is not empty and options.overwrite is off.
      ConversionError: parameters that are not those of `cfg` (errors.py), or a full disk.
    """
    table = adapter_slots(cfg, parts, prefixes)
    config = adapter_config(cfg, table, base_model)
    parts = tuple(part for part in parts if any(s.path.startswith(part) for s in table.values()))
    options = dataclasses.replace(options, merge_adapters=False)
    tensors = _Exporter(cfg, params, parts, table, options)
    with new_folder(folder, overwrite=options.overwrite) as partial:
        tensors.write(partial, "adapter_model")
        write_json(partial / ADAPTER_CONFIG, config)
    return Path(folder).absolute()


class _Exporter:
    """The tensors of one folder: their specifications at once, their values one by one."""

    def __init__(
        self,
        cfg: SpeechLMConfig,
        params: Params | Pieces,
        parts: tuple[str, ...],
        table: dict[str, Slot],
        options: ExportOptions,
    ) -> None:
        self.pieces = _pieces(cfg, params, parts)
        if options.merge_adapters:
            self.pieces = merge_pieces(cfg, self.pieces)
        self.table = table
        self.options = options
        self.extra: dict[str, Tensor] = {}
        if options.dtype is not None and jnp.dtype(options.dtype) not in FLOAT_DTYPES:
            raise TensorDtypeError(
                f"dtype {options.dtype!r} cannot be exported; choose one of "
                f"{', '.join(str(dtype) for dtype in FLOAT_DTYPES)}."
            )

    def dtype(self, slot: Slot) -> np.dtype:
        return target_dtype(self.pieces[slot.path][0], self.options.dtype)

    @property
    def main_dtype(self) -> str:
        """Dtype of most elements, which config.json names."""
        sizes: dict[str, int] = {}
        for slot in self.table.values():
            name = str(self.dtype(slot))
            sizes[name] = sizes.get(name, 0) + math.prod(slot.shape)
        return max(sizes, key=lambda name: sizes[name])

    def blocks(self, slot: Slot) -> Iterator[Callable[[], np.ndarray]]:
        """The values of one tensor on the host, in rows that follow each other, read when called."""
        # slot.split leaves rows that pad the vocabulary behind.
        return _blocks(self.pieces[slot.path][slot.layer or 0], slot.split, self.dtype(slot))

    def specs(self) -> Specs:
        specs: Specs = {name: (s.shape, self.dtype(s)) for name, s in self.table.items()}
        return specs | {
            name: (tensor.shape, target_dtype(tensor, self.options.dtype))
            for name, tensor in self.extra.items()
        }

    def values(self, specs: Specs) -> Iterator[np.ndarray]:
        """The values of all of `specs` in their order, in blocks; one is read while another is written."""

        def jobs() -> Iterator[Callable[[], np.ndarray]]:
            for name, (shape, dtype) in specs.items():
                if name in self.extra:
                    yield from _blocks(self.extra[name], shape, dtype)
                else:
                    yield from self.blocks(self.table[name])
                if self.options.progress is not None:
                    self.options.progress(name, math.prod(shape) * dtype.itemsize)

        return _read_ahead(jobs())

    def write(self, folder: Path, stem: str = "model") -> None:
        """One .safetensors file, or several and their index."""
        shards = _shard(self.specs(), self.options.max_shard_bytes)
        names = [
            f"{stem}.safetensors"
            if len(shards) == 1
            else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            for i in range(len(shards))
        ]
        for name, specs in zip(names, shards, strict=True):
            if jax.process_index() == 0:
                write_safetensors(folder / name, specs, self.values(specs))
            else:
                # Gathering is a collective: every process takes part, the first one writes.
                for _ in self.values(specs):
                    pass
        if len(shards) > 1:
            total = sum(math.prod(s) * d.itemsize for specs in shards for s, d in specs.values())
            weight_map = {
                name: file for file, specs in zip(names, shards, strict=True) for name in specs
            }
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / f"{stem}.safetensors.index.json", index)

    def write_aligner(self, path: Path) -> None:
        """The projector alone, as upstream's stage 1 leaves it."""
        tensors = {
            name: np.concatenate([read() for read in self.blocks(slot)]).reshape(slot.shape)
            for name, slot in self.table.items()
            if name.startswith(LLASO.projector)
        }
        if jax.process_index() == 0:
            write_torch(path, tensors)


def _blocks(
    tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[Callable[[], np.ndarray]]:
    for box in row_boxes(tensor, shape):
        yield lambda box=box: tensor.read(box).astype(dtype, copy=False)


def _pieces(cfg: SpeechLMConfig, params: Params | Pieces, parts: tuple[str, ...]) -> Pieces:
    """The tensors of `parts`, one per layer.

    Raises:
      ConversionError: other parameters than `cfg` has (errors.py).
    """
    infos = part_infos(cfg, parts)
    if not all(isinstance(value, list) for value in params.values()):
        nested = {part: params[part] for part in parts if part in params}
        check_params(cfg, nested, parts)
        stacked = {path for path, info in infos.items() if info.stacked}
        return pieces_of(nested, stacked)
    if missing := [path for path in infos if path not in params]:
        raise MissingTensorError(
            f"{len(missing)} parameters are not there:\n{listing(missing)}\nGive a source of every part."
        )
    return {path: params[path] for path in infos}


def _read_ahead(jobs: Iterator[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """Results in order. One thread runs them: where processes gather an array, all keep to one order."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: collections.deque[Future[np.ndarray]] = collections.deque()
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _shard(specs: Specs, max_bytes: int) -> list[Specs]:
    """Cut into files of at most `max_bytes`; a tensor larger than that has its own."""
    shards: list[Specs] = [{}]
    size = 0
    for name, (shape, dtype) in specs.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, dtype)
        size += nbytes
    return shards


def _write_text_files(folder: Path, config: Json, files_from: str | Path | None) -> None:
    if jax.process_index() != 0:
        return
    write_json(folder / "config.json", config)
    source = Path(files_from) if files_from is not None else None
    copy_files(source, folder, (*TOKENIZER_FILES, GENERATION_CONFIG))
    if not (folder / GENERATION_CONFIG).exists():
        ids = {
            k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config
        }
        write_json(folder / GENERATION_CONFIG, {**ids, "do_sample": False})
