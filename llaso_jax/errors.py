"""Every error this package raises on purpose.

A message says what was given, what was needed, which setting controls it and what to try.
"""


class LlasoError(Exception):
    """Base of all errors raised by llaso_jax."""


class ConfigError(LlasoError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(LlasoError, ValueError):
    """A record or a data file that cannot be used.

    Attributes:
        sample_id: the sample it is about, if known.
        position: where its record is: "record 12 (byte 8812) of train.json", if known.
    """

    def __init__(
        self, message: str, *, sample_id: str | None = None, position: str | None = None
    ) -> None:
        super().__init__(message)
        self.sample_id = sample_id
        self.position = position

    def __str__(self) -> str:
        where = ", ".join(
            part
            for part in (self.sample_id and f"sample {self.sample_id!r}", self.position)
            if part
        )
        message = super().__str__()
        return f"{message} [{where}]" if where else message

    def located(self, *, sample_id: str, position: str) -> "DataError":
        """Fill in what is not known yet of where this error happened; returns itself."""
        self.sample_id = self.sample_id or sample_id
        self.position = self.position or position
        return self


class AudioError(DataError):
    """Audio that is missing, unreadable, empty, cut short, not finite or too long."""


class PromptError(DataError):
    """A conversation that the chat template cannot express, or that does not fit its audios."""


class CheckpointError(LlasoError):
    """A checkpoint that is missing, incomplete or does not fit this run."""


class ConversionError(LlasoError):
    """Weights that cannot be converted: unmapped, unexpected, missing, duplicate or misshapen."""


class NonFiniteLossError(LlasoError):
    """Training gave a loss that is infinite or not a number."""


class InterruptedRunError(LlasoError):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved where it stood."""


EXIT_RESUME = 75
"""Exit code of a command that was interrupted and goes on when given again (EX_TEMPFAIL: a scheduler may do so)."""


def user_errors() -> tuple[type[Exception], ...]:
    """What a command shows as a message, without a traceback: LlasoError, and what lies below this package raises.

    For `except user_errors() as error:`, which calls it when something was raised; it loads JAX.
    """
    from llaso_jax.modeling.kernels.attention.errors import UnsupportedAttentionError
    from llaso_jax.sharding.rules import ShardingError

    return LlasoError, ShardingError, UnsupportedAttentionError
