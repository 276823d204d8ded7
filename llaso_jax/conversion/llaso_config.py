"""The `llava_llama` config.json of a LLaSO checkpoint.

Its Llama fields are transformers' own (hf_config.py). What only this project knows (audio mode, stacked
frames, sizes of the tower) is kept under the key `llaso_jax`, which upstream ignores.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llaso_jax.conversion.errors import ConfigMismatchError, UnsupportedConfigError
from llaso_jax.conversion.hf_config import Json, llama_to_hf
from llaso_jax.modeling.speech_lm import SpeechLMConfig

OURS = "llaso_jax"
DEFAULT_TOWER = "whisper"
_UPSTREAM_DEFAULTS: Json = {
    "mm_audio_select_layer": -1,
    "mm_audio_select_feature": "patch",
    "language": "English",
    "task": "transcribe",
}


def check_llaso(config: Mapping[str, Any], where: str) -> None:
    """Refuse settings that would make upstream compute something else than this model.

    Raises:
      UnsupportedConfigError: features taken from another layer than the last.
    """
    layer = config.get("mm_audio_select_layer", -1)
    if layer != -1:
        raise UnsupportedConfigError(
            f"{where}: mm_audio_select_layer={layer} is not supported; the encoder's last hidden "
            "state (-1) is used."
        )


def ours_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an export of this project noted for itself; empty for other checkpoints."""
    return config.get(OURS) or {}


def check_width(config: Mapping[str, Any], where: str, d_model: int) -> None:
    """Raise ConfigMismatchError unless `mm_audio_hidden_size` is the width of the tower found."""
    width = config.get("mm_audio_hidden_size")
    if width not in (None, d_model):
        raise ConfigMismatchError(
            f"{where} says mm_audio_hidden_size={width}, but the audio tower has d_model={d_model}: "
            "it is another Whisper than this checkpoint was trained with."
        )


def find_tower(config: Mapping[str, Any], folder: Path) -> Path | None:
    """The folder `mm_audio_tower` names, if it is on this machine: as given, or relative to `folder`."""
    name = config.get("mm_audio_tower")
    if not name:
        return None
    for candidate in (folder / name, Path(name)):
        if candidate.is_dir():
            return candidate
    return None


def llaso_to_hf(
    cfg: SpeechLMConfig, *, dtype: str, source: Mapping[str, Any], tower: str | None
) -> Json:
    """A config.json for upstream LLaSO.

    Args:
      cfg: the model.
      dtype: dtype of the weights written.
      source: the config.json it came from; its other fields are kept.
      tower: value of `mm_audio_tower`; None keeps the source's.
    """
    kept = {
        key: value
        for key, value in source.items()
        # Forms of transformers 5 for what is written below in the form both read.
        if key not in ("rope_parameters", "dtype")
    }
    ours = {
        "audio_mode": cfg.audio_mode,
        "stack": cfg.projector.stack,
        "audio": dataclasses.asdict(cfg.audio),
    }
    return {
        **_UPSTREAM_DEFAULTS,
        **kept,
        **llama_to_hf(cfg.text, dtype=dtype, source=source),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_audio_tower": tower or source.get("mm_audio_tower") or DEFAULT_TOWER,
        "audio_projector_type": cfg.projector.type,
        "mm_audio_hidden_size": cfg.audio.d_model,
        OURS: ours,
    }
