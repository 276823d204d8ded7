"""What can be wrong with an evaluation's inputs, one class each, so that a caller can tell them apart."""

from llaso_jax.errors import ConfigError, DataError, LlasoError


class PredictionError(DataError):
    """Predictions that cannot be scored."""


class NoPredictionsError(PredictionError):
    """A folder without prediction files."""


class MalformedFileError(PredictionError):
    """A file that is not UTF-8, or neither a JSON array of objects nor JSON lines."""


class IncompleteRecordError(PredictionError):
    """A record without reference or without prediction."""


class DuplicateRecordError(PredictionError):
    """Two records with one id, or one file in two formats."""


class UnreadableReferenceError(PredictionError):
    """A reference that its task's metric cannot read, such as an age without a number."""


class DifferentItemsError(PredictionError):
    """Two models that were not asked the same."""


class TaskListError(ConfigError):
    """A task list that cannot be used, or a task that is not in it."""


class JudgeError(LlasoError):
    """A judge that cannot be asked, or does not answer as one."""
