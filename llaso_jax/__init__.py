"""llaso_jax: LLaSO speech-language models in JAX/Flax.

from llaso_jax import LLaSOModel, LLaSOProcessor
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llaso_jax.inference.model import LLaSOModel
    from llaso_jax.inference.processor import LLaSOProcessor

__all__ = ["LLaSOModel", "LLaSOProcessor"]

# Imported when asked for: `import llaso_jax.modeling` stays free of the application.
_HOMES = {
    "LLaSOModel": "llaso_jax.inference.model",
    "LLaSOProcessor": "llaso_jax.inference.processor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
