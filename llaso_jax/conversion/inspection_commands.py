"""Which command converts what was inspected, with the further source it needs."""

import shlex
from collections.abc import Collection
from pathlib import Path

from llaso_jax.conversion.llaso_config import find_tower
from llaso_jax.conversion.source import Source
from llaso_jax.conversion.tables import PARTS


def source_commands(source: Source, parts: Collection[str]) -> dict[str, str]:
    """Commands that convert it; words in capitals stand for what the description names."""
    path = str(source.path)
    if source.kind == "projector":
        made = "a whole model, with the WHISPER and the LLAMA it was trained between"
        return {made: _from_hf("WHISPER", "LLAMA", "--projector", path)}
    if source.kind == "adapter":
        base = source.config.get("base_model_name_or_path")
        return {
            f"its BASE ({base}) with it merged in": _from_hf("BASE", path),
            "BASE and it side by side": _from_hf("BASE", path, "--keep-adapter"),
        }
    if source.kind in ("whisper", "llama"):
        other, part = {
            "whisper": ("LLAMA", "the audio tower"),
            "llama": ("WHISPER", "the language model"),
        }[source.kind]
        return {
            f"a whole model, with a {other} and a new projector": _from_hf(path, other),
            f"{part} alone": _from_hf(path),
        }
    made, further = "a model folder", []
    if "audio_tower" not in parts and find_tower(source.config, source.folder) is None:
        name = source.config.get("mm_audio_tower")
        made += f", with the WHISPER it was trained with (mm_audio_tower says {name!r})"
        further += ["--whisper", "WHISPER"]
    if "projector" not in parts:
        made += ", with its PROJECTOR (mm_audio_aligner.bin)"
        further += ["--projector", "PROJECTOR"]
    return {made: _from_hf(path, *further)}


def _from_hf(*arguments: str) -> str:
    return shlex.join(["llaso", "convert", "from-hf", *arguments, "--output", "MODEL"])


def folder_commands(path: Path, parts: Collection[str], *, adapters: bool) -> dict[str, str]:
    """Commands that export a model folder of `parts`, and its LoRA adapters if it has any."""

    def command(flag: str) -> str:
        return shlex.join(["llaso", "convert", "to-hf", str(path), flag, "FOLDER"])

    made = {}
    if set(parts) == set(PARTS):
        made["a LLaSO folder"] = command("--output")
    if "language_model" in parts:
        made["a stock Llama"] = command("--llama")
    if "audio_tower" in parts:
        made["a stock Whisper encoder"] = command("--whisper")
    if adapters:
        made["its LoRA adapters, for PEFT"] = command("--adapter")
    return made
