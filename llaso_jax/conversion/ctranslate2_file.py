"""Whispers in CTranslate2's model.bin, under their Hugging Face names.

Layout (little-endian; `str` is u16 length, NUL included, and bytes): `u32 version | str specification |
u32 revision | u32 n`, n times `str name | u8 rank | u32 shape[rank] | u8 dtype | u32 bytes | data`, then
`u32 aliases` and as many pairs of `str`.
Source: CTranslate2 src/models/model.cc, python/ctranslate2/specs/whisper_spec.py.
"""

import re
import struct
from typing import Any

import numpy as np

from llaso_jax.conversion.errors import (
    CorruptFileError,
    DuplicateTensorError,
    UnexpectedTensorError,
    UnknownSourceError,
    UnsupportedConfigError,
    listing,
)
from llaso_jax.conversion.tensors import BFLOAT16, ByteFile, FileTensor, Tensor

SPECIFICATION = "WhisperSpec"
VERSION = 6
DTYPES: tuple[np.dtype, ...] = (
    np.dtype(np.float32),
    np.dtype(np.int8),
    np.dtype(np.int16),
    np.dtype(np.int32),
    np.dtype(np.float16),
    BFLOAT16,
)

# Name in the scope of encoder or decoder -> Hugging Face name.
_LEAVES = ("weight", "bias")
_NORM = {"gamma": "weight", "beta": "bias"}
_STEM = {
    **{f"{conv}/{leaf}": f"{conv}.{leaf}" for conv in ("conv1", "conv2") for leaf in _LEAVES},
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
    **{f"layer_norm/{ours}": f"layer_norm.{leaf}" for ours, leaf in _NORM.items()},
}
_LAYER = {
    **{f"self_attention/layer_norm/{a}": f"self_attn_layer_norm.{b}" for a, b in _NORM.items()},
    **{f"attention/layer_norm/{a}": f"encoder_attn_layer_norm.{b}" for a, b in _NORM.items()},
    **{f"ffn/layer_norm/{a}": f"final_layer_norm.{b}" for a, b in _NORM.items()},
    **{
        f"{theirs}/{leaf}": f"{ours}.{leaf}"
        for theirs, ours in {
            "self_attention/linear_1": "self_attn.out_proj",
            "attention/linear_0": "encoder_attn.q_proj",
            "attention/linear_2": "encoder_attn.out_proj",
            "ffn/linear_0": "fc1",
            "ffn/linear_1": "fc2",
        }.items()
        for leaf in _LEAVES
    },
}
# Linear layers that are several of Hugging Face's, stacked along the first axis.
_FUSED = {
    f"{theirs}/{leaf}": (*projections, leaf)
    for theirs, projections in {
        "self_attention/linear_0": ("self_attn", "qkv"),
        "attention/linear_1": ("encoder_attn", "kv"),
    }.items()
    for leaf in _LEAVES
}
# Settings of the specification, kept beside the weights: those of Whisper, which compute nothing else here.
_FLAGS = (
    "activation",
    "alibi",
    "alignment_heads",
    "alignment_layer",
    "multi_query_attention",
    "num_heads",
    "pre_norm",
    "scale_alibi",
    "scale_embeddings",
    "start_from_zero_embedding",
)


def looks_like_ctranslate2(file: ByteFile) -> bool:
    """Whether the file starts as a CTranslate2 model does."""
    if file.size < 16:
        return False
    version, length = struct.unpack("<IH", bytes(file.read(0, 6)))
    head = bytes(file.read(6, min(length, file.size - 6, 64)))
    return 1 <= version <= 32 and head.endswith(b"Spec\0")


class _Cursor:
    def __init__(self, file: ByteFile) -> None:
        self.file = file
        self.position = 0

    def number(self, code: str) -> int:
        size = struct.calcsize("<" + code)
        (value,) = struct.unpack("<" + code, bytes(self.file.read(self.position, size)))
        self.position += size
        return value

    def text(self) -> str:
        length = self.number("H")
        raw = bytes(self.file.read(self.position, length))
        self.position += length
        return raw.rstrip(b"\0").decode("utf-8", errors="replace")


def read_ctranslate2(file: ByteFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under the names of a WhisperModel (`encoder.…`, `decoder.…`), and its configuration.

    Raises:
      UnknownSourceError: another specification or version.
      CorruptFileError: damaged.
      UnexpectedTensorError: variables this reader does not know.
      UnsupportedConfigError: a key bias that is not zero.
    """
    variables = _read_variables(file)
    tensors: dict[str, Tensor] = {}
    unknown = []
    heads = None
    for name, tensor in variables.items():
        scope, _, rest = name.partition("/")
        layer = re.fullmatch(r"layer_(\d+)/(.+)", rest)
        if scope not in ("encoder", "decoder"):
            unknown.append(name)
        elif rest in _STEM:
            tensors[f"{scope}.{_STEM[rest]}"] = tensor
        elif layer and layer[2] in _LAYER:
            tensors[f"{scope}.layers.{layer[1]}.{_LAYER[layer[2]]}"] = tensor
        elif layer and layer[2] in _FUSED:
            attention, projections, leaf = _FUSED[layer[2]]
            place = f"{scope}.layers.{layer[1]}.{attention}"
            tensors |= _split(name, tensor, place, projections, leaf)
        elif rest.rsplit("/", 1)[-1] in _FLAGS:
            if name == "encoder/num_heads":
                heads = int(tensor.read())
        else:
            unknown.append(name)
    if unknown:
        raise UnexpectedTensorError(
            f"{file} has {len(unknown)} variables that are not understood (quantized models "
            f"have weight_scale: convert with --quantization float16 or float32):\n{listing(unknown)}"
        )
    return tensors, _config(file, tensors, heads)


def _read_variables(file: ByteFile) -> dict[str, FileTensor]:
    cursor = _Cursor(file)
    version, specification = cursor.number("I"), cursor.text()
    if version != VERSION or specification != SPECIFICATION:
        raise UnknownSourceError(
            f"{file} is a CTranslate2 {specification} of binary version {version}; {SPECIFICATION} of "
            f"version {VERSION} is needed (convert it again with CTranslate2 3.17 or later)."
        )
    cursor.number("I")  # revision of the specification: names above are the same in all
    variables: dict[str, FileTensor] = {}
    for _ in range(cursor.number("I")):
        name = cursor.text()
        shape = tuple(cursor.number("I") for _ in range(cursor.number("B")))
        code, nbytes = cursor.number("B"), cursor.number("I")
        if code >= len(DTYPES):
            raise CorruptFileError(f"{file}: {name} has dtype code {code}; codes are 0 to 5.")
        tensor = FileTensor(file, cursor.position, shape, DTYPES[code])
        if tensor.nbytes != nbytes or cursor.position + nbytes > file.size:
            raise CorruptFileError(
                f"{file}: {name} of shape {shape}, dtype {DTYPES[code]} announces {nbytes} bytes, "
                f"needs {tensor.nbytes}, and {file.size - cursor.position} are left: it is damaged "
                "or cut short."
            )
        if name in variables:
            raise DuplicateTensorError(f"{file} has {name} twice.")
        variables[name] = tensor
        cursor.position += nbytes
    return variables


def _split(
    name: str, fused: FileTensor, attention: str, projections: str, leaf: str
) -> dict[str, Tensor]:
    """The linear layers `projections` ("qkv", "kv") that one layer stacks along its first axis."""
    if not fused.shape or fused.shape[0] % len(projections):
        raise CorruptFileError(
            f"{name} of shape {fused.shape} does not split into {', '.join(projections)}."
        )
    width = fused.shape[0] // len(projections)
    parts = {
        f"{attention}.{proj}_proj.{leaf}": fused.rows(i * width, (i + 1) * width)
        for i, proj in enumerate(projections)
    }
    key_bias = parts.pop(f"{attention}.k_proj.bias", None)
    if key_bias is not None and np.any(key_bias.read()):
        raise UnsupportedConfigError(f"{name} has a key bias that is not zero: not a Whisper.")
    return dict(parts)


def _config(file: ByteFile, tensors: dict[str, Tensor], heads: int | None) -> dict[str, Any]:
    """What a WhisperConfig would say, from shapes."""
    if "encoder.conv1.weight" not in tensors:
        raise UnknownSourceError(f"{file} has no encoder/conv1/weight: no Whisper encoder.")
    config = {"model_type": "whisper"}
    return config if heads is None else {**config, "encoder_attention_heads": heads}
