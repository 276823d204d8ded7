"""What can be wrong with weights, one class each, so that a caller can tell them apart."""

from collections.abc import Iterable

from llaso_jax.errors import ConversionError


class UnknownSourceError(ConversionError):
    """A path that does not exist or holds no weights in a format we read."""


class CorruptFileError(ConversionError):
    """A file that is cut short or does not follow its own format."""


class UnsafePickleError(ConversionError):
    """A pickle that names anything but tensors: loading it could run code."""


class MissingShardError(ConversionError):
    """An index that names a file which is not there."""


class UnexpectedTensorError(ConversionError):
    """Tensors in the source that the architecture does not have."""


class MissingTensorError(ConversionError):
    """Tensors the architecture needs that the source does not have."""


class DuplicateTensorError(ConversionError):
    """One tensor, or one part of the model, given twice."""


class TensorShapeError(ConversionError):
    """Tensors whose shape is not the one the configuration asks for."""


class TensorDtypeError(ConversionError):
    """Tensors that are not floating point, or layers of one parameter in different dtypes."""


class UnmappedParameterError(ConversionError):
    """Parameters of ours that no table row translates."""


class UnsupportedConfigError(ConversionError):
    """A configuration with a feature this model does not have."""


class ConfigMismatchError(ConversionError):
    """Two configurations, or a configuration and tensors, that contradict each other."""


class TargetExistsError(ConversionError):
    """The folder to write already has something in it."""


def listing(names: Iterable[str], limit: int = 12) -> str:
    """`names`, one per line, cut after `limit` with the number left out."""
    names = list(names)
    lines = [f"  {name}" for name in names[:limit]]
    if len(names) > limit:
        lines.append(f"  ... and {len(names) - limit} more")
    return "\n".join(lines)
