"""Everything a model needs, gathered from one or several sources and checked, but not read yet."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, cast

from llaso_jax.conversion.adapter_part import adapter_part
from llaso_jax.conversion.binding import Pieces
from llaso_jax.conversion.errors import ConfigMismatchError
from llaso_jax.conversion.llaso_config import ours_of
from llaso_jax.conversion.projector_part import projector_part
from llaso_jax.conversion.source import Source
from llaso_jax.conversion.sources import Record, Sources
from llaso_jax.conversion.tables import PARTS
from llaso_jax.conversion.text_part import text_part
from llaso_jax.conversion.tower_part import tower_part
from llaso_jax.conversion.vocabulary import GrownRows
from llaso_jax.modeling.frames import AudioMode
from llaso_jax.modeling.speech_lm import SpeechLMConfig

logger = logging.getLogger(__name__)

_TABLES = ("language_model/embed_tokens/weight", "language_model/lm_head/weight")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of a whole model, or of one tower, ready for `load_params` and `stream_model`.

    Attributes:
      cfg: the model; parts that are not there have default sizes.
      parts: which of tables.PARTS are there.
      pieces: our path -> its layers.
      hf_config: config.json of the language model, kept for export.
      ignored: names in the sources that are known and not needed.
      notes: decisions a person should see, one line each.
      source: path of the language model, beside which its tokenizer is looked for.
      whisper: the Whisper that was given, whose decoder `export_whisper` can hand on.
    """

    cfg: SpeechLMConfig
    parts: tuple[str, ...]
    pieces: Pieces
    hf_config: dict[str, Any]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    source: Path | None
    whisper: Source | None = None

    @property
    def folder(self) -> Path | None:
        """Folder of the language model."""
        return self.source.parent if self.source and self.source.is_file() else self.source


def gather_weights(
    *paths: str | Path | Source,
    audio_mode: str | None = None,
    projector_type: str | None = None,
    stack: int | None = None,
    seed: int = 0,
    new_projector: bool = True,
    vocab_size: int | None = None,
    vocab_multiple_of: int = 1,
    keep_adapter: bool = False,
) -> Weights:
    """Gather a model from Hugging Face, LLaSO, CTranslate2 and GGUF sources, given in any order.

    A LLaSO checkpoint stands alone; a Whisper beside it gives the tower if the checkpoint has none. A
    Whisper and a Llama make a new model with a random projector. A projector file overrides both. A LoRA
    adapter is merged into the weights it was trained on, or kept apart from them as adapters of the model.
    One Whisper or one Llama alone gives that part.

    Args:
      paths: folders or files, told apart by their content, or what `open_source` found there.
      audio_mode: what reaches the language model; default what the checkpoint says, else "padded".
      projector_type: of a random projector (default mlp2x_gelu); a given one must be of it.
      stack: frames stacked before it (default 1); a given one must have it.
      seed: of a random projector.
      new_projector: make one where a Whisper and a Llama come without; else they stay two parts.
      vocab_size: embedding rows needed: new ones are the mean of the old. Never fewer than there are.
      vocab_multiple_of: pad the embedding rows with zeros to a multiple of it.
      keep_adapter: do not merge a LoRA adapter.

    Raises:
      ConversionError: in one of its classes (errors.py), for sources that are damaged, given twice,
        incomplete, or contradict each other.
    """
    record = Record()
    sources = Sources(paths, record, keep_adapter=keep_adapter)
    cfg = SpeechLMConfig()
    pieces: Pieces = {}
    parts = []
    text = text_part(sources, record)
    if text is not None:
        cfg = dataclasses.replace(cfg, text=text[0])
        pieces |= text[1]
        parts.append("language_model")
    tower = tower_part(sources, record)
    if tower is not None:
        cfg = dataclasses.replace(cfg, audio=tower[0])
        pieces |= tower[1]
        parts.append("audio_tower")
    if len(parts) == 2 and (new_projector or sources.llaso or sources.projector):
        projector, found = projector_part(
            sources, record, cfg, projector_type=projector_type, stack=stack, seed=seed
        )
        cfg = dataclasses.replace(cfg, projector=projector)
        pieces |= found
        parts.append("projector")
    elif len(parts) == 1 and sources.projector is not None:
        raise ConfigMismatchError(
            f"{sources.projector.path} is a projector, but only one of its two sides was given: give a "
            "Whisper and a Llama with it."
        )
    if keep_adapter and sources.adapter is not None:
        rules, found = adapter_part(sources, record, cfg, tuple(parts))
        cfg = dataclasses.replace(cfg, lora=rules)
        pieces |= found
    source = sources.text
    hf_config = source.config if source else {}
    mode = audio_mode or ours_of(hf_config).get("audio_mode")
    if mode is not None:
        try:
            cfg = dataclasses.replace(cfg, audio_mode=cast(AudioMode, mode))
        except ValueError as error:
            raise ConfigMismatchError(str(error)) from error
    weights = Weights(
        cfg=cfg,
        parts=tuple(part for part in PARTS if part in parts),
        pieces=pieces,
        hf_config=hf_config,
        ignored=tuple(sorted(set(record.ignored))),
        notes=tuple(record.notes),
        source=source.path if source else None,
        whisper=sources.whisper,
    )
    return grow_vocabulary(weights, vocab_size or 0, multiple_of=vocab_multiple_of)


def grow_vocabulary(weights: Weights, vocab_size: int, *, multiple_of: int = 1) -> Weights:
    """`weights` with at least `vocab_size` embedding rows, the new ones the mean of the old.

    The stored table is padded with zero rows to a multiple of `multiple_of`, which exports leave out.
    """
    old = weights.cfg.text.vocab_size
    if "language_model" not in weights.parts or (vocab_size <= old and multiple_of == 1):
        return weights
    text = dataclasses.replace(
        weights.cfg.text, vocab_size=max(old, vocab_size), vocab_multiple_of=multiple_of
    )
    grown = {
        path: [GrownRows(weights.pieces[path][0], text.vocab_size - old, text.padded_vocab_size)]
        for path in _TABLES
        if path in weights.pieces
    }
    notes = weights.notes
    if text.vocab_size > old:
        line = f"embeddings grow from {old} to {text.vocab_size} rows: the mean of the old ones"
        logger.info(line)
        notes = (*notes, line)
    return dataclasses.replace(
        weights,
        cfg=dataclasses.replace(weights.cfg, text=text),
        pieces={**weights.pieces, **grown},
        notes=notes,
    )
