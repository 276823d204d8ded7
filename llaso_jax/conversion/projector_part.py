"""The projector of a conversion: a side file, inside a LLaSO checkpoint, or random."""

import dataclasses
import re

import jax
import numpy as np
from flax import nnx

from llaso_jax.conversion.binding import Pieces
from llaso_jax.conversion.errors import ConfigMismatchError, MissingTensorError, TensorShapeError
from llaso_jax.conversion.llaso_config import ours_of
from llaso_jax.conversion.source import ALIGNER, Source, open_source
from llaso_jax.conversion.sources import Place, Record, Sources
from llaso_jax.conversion.tensors import array_tensor
from llaso_jax.modeling.functional import flatten
from llaso_jax.modeling.projector import Projector, ProjectorConfig
from llaso_jax.modeling.speech_lm import SpeechLMConfig

DEFAULT_TYPE = "mlp2x_gelu"


def projector_part(
    sources: Sources,
    record: Record,
    cfg: SpeechLMConfig,
    *,
    projector_type: str | None,
    stack: int | None,
    seed: int,
) -> tuple[ProjectorConfig, Pieces]:
    """Shape and parameters of the projector between the towers of `cfg`.

    Args:
      sources: what was given.
      record: gets the decisions made.
      cfg: sizes of both towers.
      projector_type: of a random projector; a given one must be of it.
      stack: frames stacked before it; a given one must have it.
      seed: of a random projector.

    Raises:
      ConfigMismatchError: the projector found is of another type, stack or width.
      ConversionError: tensors that do not fit (errors.py).
    """
    place = projector_place(sources, record)
    if place is None:
        if sources.llaso is not None:
            raise MissingTensorError(
                f"{sources.llaso.path} has no projector (model.{ALIGNER}.projector.…): give its "
                f"{ALIGNER}.bin too (--projector FILE)."
            )
        projector = ProjectorConfig(projector_type or DEFAULT_TYPE, stack or 1)
        record.note(f"the projector ({projector.type}) is random, seed {seed}")
        return projector, random_projector(projector, cfg, seed)
    projector = projector_config(place, cfg)
    for setting, asked, given in (
        ("projector_type", projector_type, projector.type),
        ("stack", stack, projector.stack),
    ):
        if asked not in (None, given):
            raise ConfigMismatchError(
                f"{setting}={asked} is asked for, but the projector in {place.where} has "
                f"{setting}={given}. Leave {setting} out, or leave the projector out for a random one."
            )
    return projector, place.bind("projector", dataclasses.replace(cfg, projector=projector))


def random_projector(projector: ProjectorConfig, cfg: SpeechLMConfig, seed: int) -> Pieces:
    """A projector as torch would initialise it (see modeling/projector.py), f32."""
    rngs = nnx.Rngs(params=jax.random.key(seed))
    module = Projector(projector, cfg.audio.d_model, cfg.text.hidden_size, rngs=rngs)
    flat = flatten(nnx.to_pure_dict(nnx.state(module)))
    return {f"projector/{path}": [array_tensor(np.asarray(leaf))] for path, leaf in flat.items()}


def projector_place(sources: Sources, record: Record) -> Place | None:
    """The tensors of the projector: a side file before what is inside the checkpoint; None if there are none."""
    inside = sources.in_llaso("projector")
    source = sources.projector
    if source is None and inside is None and sources.llaso is not None:
        side_files = [
            file
            for suffix in (".bin", ".safetensors")
            if (file := sources.llaso.folder / f"{ALIGNER}{suffix}").is_file()
        ]
        if side_files:
            record.note(f"the projector is {side_files[0]}")
            source = open_source(side_files[0])
    if source is None:
        return inside
    if inside is not None:
        record.note(f"{source.path} replaces the projector of {inside.where}")
    return side_file_place(source)


def side_file_place(source: Source) -> Place:
    """The tensors of a projector file, whatever stands in front of their names."""
    # DeepSpeed, PEFT and upstream differ in what they put in front; upstream reads any prefix.
    match = next(filter(None, (re.match(r"(.*\b)?projector\.", name) for name in source.tensors)))
    # A side file knows its shape; the checkpoint's own claim about the projector it replaces does not matter.
    return Place(str(source.path), match[0], source.tensors, {})


def projector_config(place: Place, cfg: SpeechLMConfig) -> ProjectorConfig:
    """Type and stack from names and shapes.

    Raises:
      ConfigMismatchError: the configuration says another type.
      TensorShapeError: its input does not fit the audio tower of `cfg`.
    """
    names = [name.removeprefix(place.prefix) for name in place.tensors]
    indices = [int(match[1]) for name in names if (match := re.match(r"(\d+)\.", name))]
    kind = f"mlp{max(indices) // 2 + 1}x_gelu" if indices else "linear"
    said = place.config.get("audio_projector_type", kind)
    if said != kind:
        try:
            ProjectorConfig(said)
        except ValueError as error:
            raise ConfigMismatchError(f"{place.where}: audio_projector_type: {error}") from error
        if not (indices and said.startswith("mlp") and not _complete(names)):
            raise ConfigMismatchError(
                f"{place.where}: config.json says audio_projector_type={said!r}, but the tensors are "
                f"those of {kind!r}."
            )
        kind = said  # layers are missing: binding will name them
    first = place.tensors.get(f"{place.prefix}{'0.' if indices else ''}weight")
    stack = int(ours_of(place.config).get("stack", 1))
    if first is not None and len(first.shape) == 2:
        width = first.shape[1]
        if width % cfg.audio.d_model:
            raise TensorShapeError(
                f"{place.where}: the projector reads {width} features, but the audio tower gives "
                f"{cfg.audio.d_model}: they belong to different models."
            )
        stack = width // cfg.audio.d_model
    return ProjectorConfig(kind, stack)


def _complete(names: list[str]) -> bool:
    modules = {int(name.split(".")[0]) for name in names if name[0].isdigit()}
    return modules == set(range(0, 2 * len(modules), 2))
