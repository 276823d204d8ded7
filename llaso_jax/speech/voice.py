"""Who speaks a text, and how."""

from dataclasses import dataclass
from typing import Literal, get_args

from llaso_jax.errors import ConfigError

Engine = Literal["espeak", "piper"]
Gender = Literal["male", "female"]
RATES = (0.5, 2.5)
PITCHES = (-8.0, 8.0)


@dataclass(frozen=True)
class Voice:
    """Everything that decides the samples of a text, with the labels that tasks ask about.

    Attributes:
      engine: which engine speaks.
      name: the engine's own name of the voice: "en-us+f3", "en_US-joe-medium".
      accent: label, "american", "scottish" and the like.
      gender: label, of the speaker before `pitch` changed anything.
      rate: speed relative to the engine's normal one, 0.5 to 2.5.
      pitch: semitones away from the voice's normal pitch, -8 to 8.
      seed: of the engine's noise.

    Raises:
      ConfigError: a value outside its range.
    """

    engine: Engine
    name: str
    accent: str
    gender: Gender
    rate: float = 1.0
    pitch: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in (("engine", get_args(Engine)), ("gender", get_args(Gender))):
            if getattr(self, field) not in allowed:
                raise ConfigError(
                    f"voice.{field} is {getattr(self, field)!r}; one of {', '.join(allowed)} is needed"
                )
        for field in ("name", "accent"):
            if not getattr(self, field):
                raise ConfigError(f"voice.{field} is empty; see llaso_jax.speech.known_voices")
        for field, (low, high) in (("rate", RATES), ("pitch", PITCHES)):
            if not low <= getattr(self, field) <= high:  # NaN is in no range
                raise ConfigError(
                    f"voice.{field} is {getattr(self, field)}; {low:g} to {high:g} is allowed"
                )
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"voice.seed is {self.seed}; 0 to 2**32 - 1 is allowed")
