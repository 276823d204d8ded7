"""One interface to every engine that turns text into samples."""

import functools
from importlib import metadata
from typing import Protocol

import numpy as np

from llaso_jax.errors import ConfigError
from llaso_jax.speech import espeak, piper
from llaso_jax.speech.samples import SAMPLE_RATE as SAMPLE_RATE
from llaso_jax.speech.voice import Voice

_ENGINES = {"espeak": espeak, "piper": piper}


class Synthesizer(Protocol):
    """An engine, loaded."""

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """float32[n] mono at 16 kHz, silence at the ends trimmed; the same for the same arguments.

        Raises:
          SynthesisError: the engine has no such voice, or the text gives no sound.
        """
        ...


@functools.cache
def synthesizer(engine: str) -> Synthesizer:
    """The engine of that name, loaded once in a process.

    Raises:
      MissingEngineError: it is not installed; names the extra that brings it.
      ConfigError: there is no such engine.
    """
    return _module(engine).load()


def known_voices(engine: str) -> tuple[Voice, ...]:
    """Voices of an engine at normal rate and pitch; the engine need not be installed.

    Raises:
      ConfigError: there is no such engine.
    """
    return _module(engine).known_voices()


@functools.cache
def engine_versions(engine: str) -> dict[str, str]:
    """Versions of the installed packages that decide what an engine says."""
    return {name: metadata.version(name) for name in _module(engine).PACKAGES}


def _module(engine: str):
    if engine not in _ENGINES:
        raise ConfigError(f"there is no engine {engine!r}; {' and '.join(_ENGINES)} are known")
    return _ENGINES[engine]
