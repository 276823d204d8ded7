"""One file of speech: what is said in it, by whom, and how it was recorded."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import numpy as np

from llaso_jax.data.sound import amplified, level_db
from llaso_jax.errors import ConfigError
from llaso_jax.speech.audio_file import SUFFIXES
from llaso_jax.speech.augment import Augmentation, augment, without_clipping
from llaso_jax.speech.samples import SAMPLE_RATE
from llaso_jax.speech.synthesis import engine_versions, synthesizer
from llaso_jax.speech.voice import Voice

LEVEL_DB = -23.0  # root mean square of every utterance before `gain_db`, dB of full scale
RENDERING = 1  # to be raised when the same description gives another file


@dataclass(frozen=True)
class Utterance:
    """A text, and who speaks it."""

    text: str
    voice: Voice


@dataclass(frozen=True)
class ClipSpec:
    """One file: utterances one after the other with pauses, then changed.

    Attributes:
      path: of the file, relative to the folder; ends in .opus, .flac or .wav.
      utterances: at least one; all are brought to one level.
      pause_seconds: silence between two utterances.
      augmentation: done to the whole.
      seed: of the augmentation.

    Raises:
      ConfigError: a path that leaves the folder or has another ending, or a value that cannot be.
    """

    path: str
    utterances: tuple[Utterance, ...]
    pause_seconds: float = 0.3
    augmentation: Augmentation = Augmentation()
    seed: int = 0

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"clip {self.path!r} must end in one of {', '.join(SUFFIXES)}")
        if path.is_absolute() or ".." in path.parts:
            raise ConfigError(
                f"clip {self.path!r} must lie inside the folder: give a relative path"
            )
        if not self.utterances:
            raise ConfigError(f"clip {self.path!r} has no utterances; at least one is needed")
        if not 0 <= self.pause_seconds < 30:
            raise ConfigError(
                f"clip {self.path!r} has pauses of {self.pause_seconds} s; 0 to 30 is allowed"
            )
        if self.seed < 0:
            raise ConfigError(f"clip {self.path!r} has the seed {self.seed}; 0 or more is needed")

    @property
    def text(self) -> str:
        """All that is said."""
        return " ".join(utterance.text for utterance in self.utterances)

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that speak in it."""
        return tuple(sorted({utterance.voice.engine for utterance in self.utterances}))

    def digest(self) -> str:
        """Hexadecimal SHA-256 of all that decides the file: this description and the engines' versions."""
        versions = [engine_versions(engine) for engine in self.engines]
        described = json.dumps([RENDERING, asdict(self), versions], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()


def clip_samples(spec: ClipSpec) -> np.ndarray:
    """float32[n] at 16 kHz: the utterances at one level, with their pauses, augmented.

    Raises:
      SynthesisError, MissingEngineError: of the engines.
    """
    pause = np.zeros(round(spec.pause_seconds * SAMPLE_RATE), np.float32)
    parts: list[np.ndarray] = []
    for utterance in spec.utterances:
        samples = synthesizer(utterance.voice.engine).speak(utterance.text, utterance.voice)
        parts += [pause, without_clipping(amplified(samples, LEVEL_DB - level_db(samples)))]
    return augment(np.concatenate(parts[1:]), spec.augmentation, seed=spec.seed)
