"""The sources of one conversion, sorted by what they are, and the record of what was decided about them."""

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llaso_jax.conversion.binding import Pieces, bind, is_ignored
from llaso_jax.conversion.errors import DuplicateTensorError, UnknownSourceError
from llaso_jax.conversion.lora_adapter import Pair, base_of, merge_adapter, read_adapter
from llaso_jax.conversion.source import Kind, Source, open_source
from llaso_jax.conversion.tables import LLASO, Slot, slots
from llaso_jax.conversion.tensors import Tensor
from llaso_jax.modeling.speech_lm import SpeechLMConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Record:
    """What a person should know about a conversion.

    Attributes:
      ignored: names in the sources that are known and not needed.
      notes: decisions that were made, one line each.
    """

    ignored: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, line: str) -> None:
        """Add a decision, and log it."""
        self.notes.append(line)
        logger.info("%s", line)

    def needed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` without the names that are known and not needed, which are recorded."""
        self.ignored += [name for name in tensors if is_ignored(name)]
        return {name: tensor for name, tensor in tensors.items() if not is_ignored(name)}


@dataclasses.dataclass(frozen=True)
class Place:
    """Tensors of one part of the model, with the prefix of their names and where they are, for errors."""

    where: str
    prefix: str
    tensors: dict[str, Tensor]
    config: Mapping[str, Any]

    def needed(self, part: str, cfg: SpeechLMConfig) -> dict[str, Slot]:
        """Every tensor that `part` of `cfg` has, under the names of this place."""
        return slots(cfg, (part,), dataclasses.replace(LLASO, **{part: self.prefix}))

    def bind(self, part: str, cfg: SpeechLMConfig) -> Pieces:
        """The parameters of `part`, strictly."""
        return bind(self.where, self.tensors, self.needed(part, cfg))


class Sources:
    """At most one source of each kind.

    Raises:
      DuplicateTensorError: two of one kind, or a LLaSO checkpoint and another language model.
      UnknownSourceError: no source at all, or a projector or an adapter alone.
      ConversionError: a LoRA adapter that does not fit (lora_adapter.py).
    """

    def __init__(
        self, paths: Iterable[str | Path | Source], record: Record, *, keep_adapter: bool = False
    ) -> None:
        """`keep_adapter`: leave the pairs of a LoRA adapter in `adapter_pairs` instead of merging them."""
        self.record = record
        self._by_kind: dict[Kind, Source] = {}
        for path in paths:
            source = path if isinstance(path, Source) else open_source(path)
            other = self._by_kind.setdefault(source.kind, source)
            if other is not source:
                raise DuplicateTensorError(
                    f"{other.path} and {source.path} are both of kind {source.kind!r}: give one."
                )
        if self.llaso and self.llama:
            raise DuplicateTensorError(
                f"{self.llaso.path} is a whole LLaSO checkpoint and {self.llama.path} another language "
                "model: give one of them."
            )
        if not (self.text or self.whisper):
            raise UnknownSourceError(
                "a Whisper, a Llama or a LLaSO checkpoint is needed"
                + (f", besides {given}." if (given := " and ".join(self._by_kind)) else ".")
            )
        self.adapter_pairs: dict[str, Pair] = {}
        self.adapter_base: Kind | None = None
        if self.adapter is not None:
            base = base_of(self.adapter, [s for s in (self.text, self.whisper) if s])
            self.adapter_base = base.kind
            if keep_adapter:
                self._by_kind[base.kind], self.adapter_pairs = read_adapter(base, self.adapter)
            else:
                self._by_kind[base.kind] = merge_adapter(base, self.adapter)
                record.note(f"{self.adapter.path} (LoRA) is merged into {base.path}")

    @property
    def llaso(self) -> Source | None:
        """A LLaSO checkpoint."""
        return self._by_kind.get("llaso")

    @property
    def whisper(self) -> Source | None:
        """A Whisper model."""
        return self._by_kind.get("whisper")

    @property
    def llama(self) -> Source | None:
        """A plain Llama."""
        return self._by_kind.get("llama")

    @property
    def projector(self) -> Source | None:
        """A projector file."""
        return self._by_kind.get("projector")

    @property
    def adapter(self) -> Source | None:
        """A LoRA adapter."""
        return self._by_kind.get("adapter")

    @property
    def text(self) -> Source | None:
        """What the language model comes from."""
        return self.llaso or self.llama

    def in_llaso(self, part: str) -> Place | None:
        """The tensors of `part` inside the LLaSO checkpoint, None if it has none."""
        if self.llaso is None or not (tensors := self._llaso_parts[part]):
            return None
        prefix = getattr(LLASO, part)
        return Place(str(self.llaso.path), prefix, tensors, self.llaso.config)

    @functools.cached_property
    def _llaso_parts(self) -> dict[str, dict[str, Tensor]]:
        assert self.llaso is not None
        parts: dict[str, dict[str, Tensor]] = {
            part: {} for part in ("audio_tower", "projector", "language_model")
        }
        for name, tensor in self.record.needed(self.llaso.tensors).items():
            # The Llama body's prefix is a prefix of the others': what is not theirs is its own.
            part = next(
                (p for p in ("audio_tower", "projector") if name.startswith(getattr(LLASO, p))),
                "language_model",
            )
            parts[part][name] = tensor
        return parts


def prefix_of(tensors: Iterable[str], candidates: Iterable[str], landmarks: Iterable[str]) -> str:
    """The first of `candidates` that stands before one of `landmarks` in a name; "" if none does."""
    names = list(tensors)
    landmarks = tuple(landmarks)
    for prefix in candidates:
        if any(name.startswith(prefix + mark) for name in names for mark in landmarks):
            return prefix
    return ""
