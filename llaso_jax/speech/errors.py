"""What can go wrong with making speech."""

from llaso_jax.errors import LlasoError


class SpeechError(LlasoError):
    """Speech that cannot be made or understood."""


class MissingEngineError(SpeechError):
    """An engine, a voice or a recognizer that is not installed."""


class SynthesisError(SpeechError):
    """A text that an engine does not speak."""


class RenderError(SpeechError):
    """Files that cannot be rendered as described, or a process that was lost."""
