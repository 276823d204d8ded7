"""What is at a path, and is it whole: kind, sizes, tensors against what its configuration says they should be.

Only headers and small JSON files are read, never the values of a tensor. A source is whole if converting it
would bind every tensor; the same functions decide that here and there.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llaso_jax.conversion.adapter_description import ADAPTER, adapter_part
from llaso_jax.conversion.errors import CorruptFileError, listing
from llaso_jax.conversion.inspection_commands import folder_commands, source_commands
from llaso_jax.conversion.llaso_config import check_llaso, check_width, ours_of
from llaso_jax.conversion.model_folder import PARAMS, is_model_folder, read_info, read_metadata
from llaso_jax.conversion.part_description import (
    Part,
    Sizes,
    describe,
    projector_sizes,
    text_sizes,
    tower_sizes,
)
from llaso_jax.conversion.projector_part import (
    projector_config,
    projector_place,
    side_file_place,
)
from llaso_jax.conversion.source import Source, open_source
from llaso_jax.conversion.sources import Place, Record, Sources
from llaso_jax.conversion.tables import PARTS
from llaso_jax.conversion.tensors import FLOAT_DTYPES
from llaso_jax.conversion.text_part import LM_HEAD, text_config, text_place
from llaso_jax.conversion.tokenizer_check import TokenizerCheck, check_tokenizer_files
from llaso_jax.conversion.tower_part import tower_config, tower_place
from llaso_jax.errors import ConversionError
from llaso_jax.modeling.functional import abstract_params
from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.whisper import WhisperConfig

MODEL_FOLDER = "model folder"


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect_source` found.

    Attributes:
      path: what was asked about.
      kind: llaso, whisper, llama, projector, adapter, or model folder.
      format: how the tensors are stored.
      files: number of files they are in.
      nbytes: bytes of those files.
      settings: of the model as a whole.
      parts: in the order of tables.PARTS.
      ignored: tensors that are known, and known not to be needed.
      tokenizer: None where no language model is.
      problems: what is wrong beside what `parts` and `tokenizer` say.
      notes: decisions a conversion would make, one line each.
      commands: what a command makes -> the command; none if it is not whole.
    """

    path: Path
    kind: str
    format: str
    files: int
    nbytes: int
    settings: Mapping[str, Any]
    parts: tuple[Part, ...]
    ignored: tuple[str, ...]
    tokenizer: TokenizerCheck | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    commands: Mapping[str, str]

    @property
    def whole(self) -> bool:
        """Whether nothing is missing or wrong with what there is."""
        return (
            not self.problems
            and all(part.whole for part in self.parts)
            and not (self.tokenizer and self.tokenizer.problems)
        )

    @property
    def parameters(self) -> int:
        """Elements of all tensors that are not ignored."""
        return sum(part.parameters for part in self.parts)


def inspect_source(path: str | Path) -> Inspection:
    """Find out what is at `path` and compare its tensors with its configuration.

    Args:
      path: anything `open_source` reads, or a model folder.

    Raises:
      UnknownSourceError: nothing there, or no weights in a known format.
      ConversionError: a damaged file, in one of its classes (errors.py).
      CheckpointError: a model folder of a later version.
    """
    path = Path(path)
    found = (
        _model_folder(path)
        if path.is_dir() and is_model_folder(path)
        else _source(open_source(path))
    )
    return dataclasses.replace(found, commands={}) if not found.whole else found


def _source(source: Source) -> Inspection:
    record = Record()
    parts: list[Part] = []
    problems: list[str] = []
    tokenizer = None
    if source.kind == "projector":
        parts.append(_projector(side_file_place(source), None, None))
    elif source.kind == "adapter":
        parts.append(adapter_part(source))
    else:
        sources = Sources([source], record)
        text = tower = None
        if source.kind != "whisper":
            part, text = _text(source, text_place(sources, record), record)
            parts.append(part)
            if text is not None:
                tokenizer = check_tokenizer_files(
                    source.path,
                    rows=text.vocab_size,
                    config=source.config,
                    is_llaso=source.kind == "llaso",
                )
        if source.kind == "whisper" or sources.in_llaso("audio_tower"):
            place = tower_place(sources, record)
            assert place is not None
            part, tower = _tower(place, record)
            parts.append(part)
        if source.kind == "llaso":
            problems += _llaso_problems(source, tower)
            place = projector_place(sources, record)
            if place is not None:
                width = tower.d_model if tower else source.config.get("mm_audio_hidden_size")
                parts.append(_projector(place, width, text and text.hidden_size))
    parts.sort(key=lambda part: (*PARTS, ADAPTER).index(part.name))
    return Inspection(
        path=source.path,
        kind=source.kind,
        format=source.format,
        files=len(source.files),
        nbytes=sum(file.stat().st_size for file in source.files),
        settings=_settings(source),
        parts=tuple(parts),
        ignored=tuple(sorted(set(record.ignored))),
        tokenizer=tokenizer,
        problems=tuple(problems),
        notes=tuple(record.notes),
        commands=source_commands(source, {part.name for part in parts}),
    )


def _text(source: Source, place: Place, record: Record) -> tuple[Part, LlamaConfig | None]:
    part = "language_model"
    try:
        cfg = text_config(source, place)
    except ConversionError as error:
        return describe(part, {}, place.tensors, problems=[str(error)]), None
    if cfg.tie_word_embeddings and LM_HEAD in place.tensors:
        record.ignored.append(LM_HEAD)
        record.note(
            f"{LM_HEAD} beside tied embeddings: from-hf compares them, leaves it out if it repeats them "
            "and refuses it if not"
        )
        tensors = {name: tensor for name, tensor in place.tensors.items() if name != LM_HEAD}
        place = dataclasses.replace(place, tensors=tensors)
    return _compare(part, text_sizes(cfg), place, SpeechLMConfig(text=cfg)), cfg


def _tower(place: Place, record: Record) -> tuple[Part, WhisperConfig | None]:
    part = "audio_tower"
    try:
        cfg = tower_config(place, record)
    except ConversionError as error:
        return describe(part, {}, place.tensors, problems=[str(error)]), None
    return _compare(part, tower_sizes(cfg), place, SpeechLMConfig(audio=cfg)), cfg


def _projector(place: Place, width_in: int | None, width_out: int | None) -> Part:
    """The projector between widths that may not be known: its own tensors then say them."""
    part, known = "projector", width_in is not None
    first = [place.tensors.get(f"{place.prefix}{name}") for name in ("weight", "0.weight")]
    shape = next((tensor.shape for tensor in first if tensor is not None), ())
    if len(shape) == 2:
        width_out, width_in = width_out or shape[0], width_in or shape[1]
    try:
        if not (width_in and width_out):
            raise CorruptFileError(
                f"{place.where} has no matrix {place.prefix}weight or {place.prefix}0.weight, which "
                "gives the widths of the projector."
            )
        cfg = SpeechLMConfig(
            audio=WhisperConfig(d_model=width_in, encoder_attention_heads=1),
            text=LlamaConfig(
                hidden_size=width_out, num_attention_heads=1, num_key_value_heads=1, head_dim=2
            ),
        )
        projector = projector_config(place, cfg)
    except (ConversionError, ValueError) as error:
        return describe(part, {}, place.tensors, problems=[str(error)])
    cfg = dataclasses.replace(cfg, projector=projector)
    sizes = projector_sizes(cfg)
    if not known:
        sizes["stack"] = None  # how many frames make up its input, a lone file does not say
    return _compare(part, sizes, place, cfg)


def _compare(part: str, sizes: Sizes, place: Place, cfg: SpeechLMConfig) -> Part:
    needed = {name: slot.shape for name, slot in place.needed(part, cfg).items()}
    described = describe(part, sizes, place.tensors, needed)
    if not described.whole:
        return described
    try:
        place.bind(part, cfg)  # dtypes, and whatever else a conversion checks
    except ConversionError as error:
        return dataclasses.replace(described, problems=(str(error),))
    return described


def _llaso_problems(source: Source, tower: WhisperConfig | None) -> list[str]:
    """Where config.json says something else than the audio tower, or than this model computes."""
    where = str(source.folder / "config.json")
    problems = []
    try:
        check_llaso(source.config, where)
        if tower is not None:
            check_width(source.config, where, tower.d_model)
    except ConversionError as error:
        problems.append(str(error))
    return problems


def _settings(source: Source) -> Sizes:
    if source.kind != "llaso":
        return {}
    return {
        "audio_mode": ours_of(source.config).get("audio_mode", "padded"),
        "mm_audio_tower": source.config.get("mm_audio_tower"),
    }


def _adapters(cfg: SpeechLMConfig) -> Sizes:
    """What the LoRA adapters of a model are, if it has any."""
    return {
        f"lora {rule.pattern}": f"rank {rule.rank}, alpha {rule.alpha:g}"
        + (", rank-stabilized" if rule.rank_stabilized else "")
        for rule in cfg.lora
    }


def _model_folder(path: Path) -> Inspection:
    info = read_info(path)
    tensors = read_metadata(path)
    needed = {name: leaf.shape for name, leaf in abstract_params(info.cfg).items()}
    cfg = info.cfg
    sizes = {
        "audio_tower": tower_sizes(cfg.audio),
        "projector": projector_sizes(cfg),
        "language_model": text_sizes(cfg.text) | {"padded_vocab_size": cfg.text.padded_vocab_size},
    }

    def of(part: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
        return {name: leaf for name, leaf in leaves.items() if name.split("/")[0] == part}

    parts = []
    for part in info.parts:
        described = describe(part, sizes[part], of(part, tensors), of(part, needed))
        wrong = [
            f"{name}: {leaf.dtype}"
            for name, leaf in of(part, tensors).items()
            if np.dtype(leaf.dtype) not in FLOAT_DTYPES
        ]
        if wrong:
            line = f"{len(wrong)} parameters are not floating point:\n{listing(wrong)}"
            described = dataclasses.replace(described, problems=(*described.problems, line))
        parts.append(described)
    unknown = [name for name in tensors if name.split("/")[0] not in info.parts]
    files = [file for file in (path / PARAMS).rglob("*") if file.is_file()]
    has_text = "language_model" in info.parts
    return Inspection(
        path=path,
        kind=MODEL_FOLDER,
        format="orbax",
        files=len(files),
        nbytes=sum(file.stat().st_size for file in files),
        settings={"audio_mode": cfg.audio_mode} | _adapters(cfg),
        parts=tuple(parts),
        ignored=(),
        tokenizer=check_tokenizer_files(
            path, rows=cfg.text.vocab_size, config=info.hf_config, is_llaso=True
        )
        if has_text
        else None,
        problems=(
            (f"parameters of parts that config.json does not name:\n{listing(unknown)}",)
            if unknown
            else ()
        ),
        notes=(),
        commands=folder_commands(path, info.parts, adapters=bool(cfg.lora)),
    )
