"""Llama decoders in GGUF, dequantized to f32, under their Hugging Face names.

Source: llama.cpp convert_hf_to_gguf.py (LlamaModel), whose name map and permutation are undone here.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llaso_jax.conversion.errors import (
    ConversionError,
    CorruptFileError,
    UnsupportedConfigError,
)
from llaso_jax.conversion.tensors import ComputedTensor, Tensor
from llaso_jax.modeling.rope import RopeScaling, inverse_frequencies

MAGIC = b"GGUF"
ROPE_FACTORS = "rope_freqs.weight"
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under the names of a LlamaForCausalLM, dequantized when read, and its configuration.

    Raises:
      ConversionError: the package `gguf` is not installed.
      CorruptFileError: damaged, or quantized in a way the package does not know.
      UnsupportedConfigError: not the llama architecture, or RoPE scaling this model does not have.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConversionError(
            f"{path} is a GGUF file; reading it needs the package gguf: pip install gguf"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
    # The package parses without checks of its own: a damaged file surfaces as any of these.
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
        raise CorruptFileError(f"{path} is not a whole GGUF file ({error}).") from error

    fields = {name: field.contents() for name, field in reader.fields.items() if _is_size(name)}
    config = _config(path, fields)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    factors = stored.pop(ROPE_FACTORS, None)
    if factors is not None:
        config["rope_scaling"] = _match_scaling(path, config, np.asarray(factors.data))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        hf_name = _TOP.get(name)
        num_heads = None
        if layer and layer[2] in _LAYER:
            hf_name = f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"
            num_heads = heads.get(layer[2])
        # GGUF lists dimensions fastest first.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[hf_name or name] = ComputedTensor(
            shape,
            np.dtype(np.float32),
            _dequantizer(path, tensor, num_heads),
            stored=tensor.tensor_type.name,
        )
    config["vocab_size"] = (
        tensors["model.embed_tokens.weight"].shape[0]
        if ("model.embed_tokens.weight" in tensors)
        else 0
    )
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return tensors, config


def _is_size(name: str) -> bool:
    # Vocabularies are long and slow to unpack; they are not needed here.
    return name.startswith(("llama.", "general.architecture")) or name.endswith("_token_id")


def _dequantizer(path: Path, tensor: Any, num_heads: int | None) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        from gguf.quants import dequantize

        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CorruptFileError(
                f"{path}: {tensor.name} ({tensor.tensor_type.name}) cannot be dequantized ({error})."
            ) from error
        return values if num_heads is None else unpermute(values, num_heads)

    return read


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of q and k: rotary pairs (2i, 2i+1) back to (i, i + H/2).

    rows: [num_heads * H, D] -> the same shape.
    """
    half = rows.shape[0] // num_heads // 2
    paired = rows.reshape(num_heads, half, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _config(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The configuration as transformers' LlamaConfig would have it."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedConfigError(
            f"{path} holds a {architecture!r} model; GGUF files of architecture 'llama' are read."
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedConfigError(
            f"{path} scales RoPE by {scaling!r}; none and llama3 (as {ROPE_FACTORS}) are supported."
        )
    try:
        heads = fields["llama.attention.head_count"]
        config: dict[str, Any] = {
            "model_type": "llama",
            "hidden_size": fields["llama.embedding_length"],
            "intermediate_size": fields["llama.feed_forward_length"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
            "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
            "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0)),
            "max_position_embeddings": fields["llama.context_length"],
            "rope_scaling": None,
            "hidden_act": "silu",
        }
    except KeyError as error:
        raise CorruptFileError(f"{path} lacks the metadata {error}.") from error
    config["head_dim"] = fields.get(
        "llama.attention.key_length", config["hidden_size"] // config["num_attention_heads"]
    )
    rotary = fields.get("llama.rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        raise UnsupportedConfigError(
            f"{path} rotates {rotary} of {config['head_dim']} dimensions; all are needed."
        )
    for kind in ("bos", "eos"):
        if (token := fields.get(f"tokenizer.ggml.{kind}_token_id")) is not None:
            config[f"{kind}_token_id"] = token
    return config


def _shortest(value: float) -> float:
    """The shortest decimal with the same f32: GGUF keeps 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _match_scaling(path: Path, config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The llama3 scaling whose effect was stored as one divisor per rotary plane."""
    factor = float(factors.max())
    plain = inverse_frequencies(config["head_dim"], config["rope_theta"], None)
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)  # Llama 3.1 and 3.2 differ in `factor` only
    scaled = inverse_frequencies(config["head_dim"], config["rope_theta"], scaling)
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-3):
        raise UnsupportedConfigError(
            f"{path}: {ROPE_FACTORS} is not the llama3 scaling of Llama 3.1 to 3.3 (low 1, high 4, "
            "original 8192 positions), the only one supported in GGUF."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
