"""Weights in and out: Hugging Face, LLaSO, CTranslate2 and GGUF sources, this project's model folders.

gather_weights and open_model describe weights that are not read yet; load_params reads them onto devices,
stream_model into a model folder, export_llaso, export_llama and export_whisper into Hugging Face folders.
save_model and load_model are the model folder and device arrays. convert.py is the command line over them.
"""

from llaso_jax.conversion.exporting import (
    ExportOptions,
    export_adapter,
    export_llama,
    export_llaso,
    export_projector,
    export_whisper,
)
from llaso_jax.conversion.loading import load_params
from llaso_jax.conversion.model_folder import (
    is_model_folder,
    load_model,
    open_model,
    read_info,
    save_model,
    stream_model,
)
from llaso_jax.conversion.weights import Weights, gather_weights, grow_vocabulary

__all__ = [
    "ExportOptions",
    "Weights",
    "export_adapter",
    "export_llama",
    "export_llaso",
    "export_projector",
    "export_whisper",
    "gather_weights",
    "grow_vocabulary",
    "is_model_folder",
    "load_model",
    "load_params",
    "open_model",
    "read_info",
    "save_model",
    "stream_model",
]
