"""Models from folders: this project's own format, or LLaSO checkpoints in Hugging Face layout."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh, Sharding

from llaso_jax.conversion import (
    Weights,
    gather_weights,
    is_model_folder,
    load_model,
    load_params,
    read_info,
)
from llaso_jax.data.prompt import PROMPT_FILE, PromptConfig
from llaso_jax.errors import CheckpointError, ConfigError
from llaso_jax.modeling.functional import Params, param_shardings
from llaso_jax.modeling.speech_lm import SpeechLMConfig

NEEDED = ("audio_tower", "projector", "language_model")


def find_model(folder: str | Path) -> Path:
    """`folder` if it can hold a model, or the `model` folder of a training run's output.

    Raises:
      CheckpointError: neither is there.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    if is_model_folder(folder / "model"):
        return folder / "model"
    if not folder.exists():
        problem = f"{folder} does not exist"
    elif not folder.is_dir():
        problem = f"{folder} is a file"
    else:
        problem = f"{folder} has no config.json"
    raise CheckpointError(
        f"{problem}: a model folder is needed, as `llaso train` and `llaso convert from-hf` write, or "
        "a LLaSO checkpoint in Hugging Face layout."
    )


def read_config(folder: str | Path) -> SpeechLMConfig:
    """Architecture of the model in `folder`; no weights are read.

    Raises:
      CheckpointError, ConversionError: no whole model there.
    """
    folder = find_model(folder)
    if is_model_folder(folder):
        return read_info(folder).cfg
    return _gather(folder).cfg


def load_pretrained(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    shardings: Mapping[str, Sharding] | None = None,
    dtype: Any = None,
) -> tuple[SpeechLMConfig, Params, dict[str, Any]]:
    """Architecture, parameters and Hugging Face configuration (or {}) of the model in `folder`.

    Args:
      folder: see `find_model`.
      mesh: parameters go straight into their shards on it, by the default rules.
      shardings: by path, instead of `mesh`. Neither: all on the first device.
      dtype: of all parameters; None as stored.

    Raises:
      CheckpointError, ConversionError: no whole model there.
      ShardingError: a dimension that does not divide over the mesh.
    """
    folder = find_model(folder)
    if is_model_folder(folder):
        cfg, params = load_model(folder, mesh=mesh, shardings=shardings, dtype=dtype)
        return cfg, params, read_info(folder).hf_config
    weights = _gather(folder)
    if shardings is None and mesh is not None:
        shardings = param_shardings(weights.cfg, mesh)
    return weights.cfg, load_params(weights, shardings, dtype=dtype), weights.hf_config


def _gather(folder: Path) -> Weights:
    weights = gather_weights(folder)
    absent = [part for part in NEEDED if part not in weights.parts]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {', '.join(absent)}: it is not a whole LLaSO model. Put it together with "
            "`llaso convert from-hf`."
        )
    return weights


def save_prompt_config(folder: str | Path, prompt: PromptConfig) -> None:
    """Note beside a model the prompt it was trained with; `LLaSOProcessor` reads it."""
    text = json.dumps(dataclasses.asdict(prompt), indent=2) + "\n"
    (Path(folder) / PROMPT_FILE).write_text(text, encoding="utf-8")


def load_prompt_config(folder: str | Path) -> PromptConfig:
    """The prompt noted in `folder`; LLaSO's own where nothing is.

    Raises:
      ConfigError: a file that does not describe a prompt.
    """
    path = Path(folder) / PROMPT_FILE
    if not path.is_file():
        return PromptConfig()
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return PromptConfig(**fields)
    except (json.JSONDecodeError, TypeError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(PromptConfig))
        raise ConfigError(f"{path} does not describe a prompt ({error}); keys: {known}.") from error


def end_tokens(folder: str | Path, hf_config: Mapping[str, Any]) -> tuple[int, ...]:
    """EOS ids that generation_config.json or the model's configuration names; () if none do."""
    path = Path(folder) / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = named.get("eos_token_id", hf_config.get("eos_token_id"))
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
