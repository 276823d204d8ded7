"""Weights in and out: Hugging Face, LLaSO, CTranslate2 and GGUF sources, this project's model folders.

gather_weights -> load_params reads sources; save_model and load_model are the native folder; export_llaso,
export_llama and export_whisper write Hugging Face folders. convert.py is the command line over them.
"""

from llaso_jax.conversion.exporting import (
    ExportOptions,
    export_llama,
    export_llaso,
    export_whisper,
)
from llaso_jax.conversion.loading import load_params
from llaso_jax.conversion.model_folder import is_model_folder, load_model, read_info, save_model
from llaso_jax.conversion.weights import Weights, gather_weights, grow_vocabulary

__all__ = [
    "ExportOptions",
    "Weights",
    "export_llama",
    "export_llaso",
    "export_whisper",
    "gather_weights",
    "grow_vocabulary",
    "is_model_folder",
    "load_model",
    "load_params",
    "read_info",
    "save_model",
]
