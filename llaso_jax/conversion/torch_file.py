"""Torch's zip format (`torch.save` since 1.6), both ways, without torch and without running any code.

The archive holds `data.pkl`, a pickle whose tensors are calls of `torch._utils._rebuild_tensor_v2` on
persistent ids, and one stored (not compressed) member `data/<key>` per storage.
Source: torch/serialization.py `_save`, `_legacy_load`; torch/_weights_only_unpickler.py.
"""

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llaso_jax.conversion.errors import CorruptFileError, UnsafePickleError
from llaso_jax.conversion.tensors import BFLOAT16, ByteFile, ComputedTensor, FileTensor, Tensor

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80\x02"  # torch before 1.6, or a plain pickle


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True)
class _StridedView:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _StridedView:
    if not isinstance(storage, _Storage):
        raise CorruptFileError(f"a tensor over {storage!r}, which is not a storage")
    return _StridedView(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that knows the names above and nothing else, so that nothing can be executed."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise UnsafePickleError(
                f"names {module_name}.{global_name}, which is no part of a dictionary of tensors. "
                "Loading it could run code, so it is refused. If you trust the file, save its "
                "state_dict() as safetensors with torch."
            ) from None

    def persistent_load(self, pid: Any, /) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, int(numel)):
                return _Storage(key, dtype, numel)
        raise CorruptFileError(f"has a persistent id that is not a storage: {pid!r}")


def read_torch(path: Path) -> dict[str, Tensor]:
    """Tensors of one torch.save file, not read yet.

    Raises:
      UnsafePickleError: the pickle names anything but tensors.
      CorruptFileError: damaged, in the format of torch before 1.6, or not a dictionary of tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.rsplit("/", 1)[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise CorruptFileError(
                    f"{path} is a zip archive without one data.pkl of torch.save."
                )
            root = pickles[0][: -len("data.pkl")]
            order = archive.read(root + "byteorder") if root + "byteorder" in members else b"little"
            content = archive.read(pickles[0])
    except zipfile.BadZipFile as error:
        raise CorruptFileError(
            f"{path} is not a whole torch zip archive ({error}): it is cut short, or was saved by "
            "torch before 1.6 (load and save it once with a newer torch)."
        ) from error
    if order != b"little":
        raise CorruptFileError(f"{path} was saved on a {order.decode()}-endian machine.")
    state = _unpickle(path, content)
    file = ByteFile(path)
    return {
        name: _locate(file, path, name, view, members.get(f"{root}data/{view.storage.key}"))
        for name, view in state.items()
    }


def _unpickle(path: Path, content: bytes) -> dict[str, _StridedView]:
    try:
        state = _TensorUnpickler(io.BytesIO(content)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path} {error}") from None
    except CorruptFileError as error:
        raise CorruptFileError(f"{path} {error}") from None
    # What a damaged pickle can raise is not specified beyond these.
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise CorruptFileError(f"{path}: its pickle is damaged ({error}).") from error
    if not isinstance(state, dict):
        raise CorruptFileError(f"{path} holds a {type(state).__name__}, not a state dictionary.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _StridedView):
            raise CorruptFileError(
                f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor. A flat "
                "dictionary of names and tensors (a state_dict) is needed."
            )
    return state


def _locate(
    file: ByteFile, path: Path, name: str, view: _StridedView, member: zipfile.ZipInfo | None
) -> Tensor:
    if member is None:
        raise CorruptFileError(f"{path}: the storage {view.storage.key!r} of {name} is missing.")
    if member.compress_type != zipfile.ZIP_STORED:
        raise CorruptFileError(
            f"{path}: {member.filename} is compressed, which torch.save never does."
        )
    itemsize = view.storage.dtype.itemsize
    extent = (
        view.offset
        + 1
        + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    )
    if math.prod(view.shape) and (
        min((view.offset, *view.strides)) < 0 or extent * itemsize > member.file_size
    ):
        raise CorruptFileError(
            f"{path}: {name} of shape {view.shape} needs {extent} elements, but its storage holds "
            f"{member.file_size // itemsize}."
        )
    # The local header repeats the name, and its extra field (padding to 64 bytes) may differ from
    # the central directory's.
    header = bytes(file.read(member.header_offset, 30))
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = member.header_offset + 30 + name_length + extra_length + view.offset * itemsize
    if view.strides == _contiguous(view.shape) or not math.prod(view.shape):
        return FileTensor(file, start, view.shape, view.storage.dtype)
    flat = FileTensor(file, start, (extent - view.offset,), view.storage.dtype)

    def gather() -> np.ndarray:
        strides = tuple(stride * itemsize for stride in view.strides)
        return np.lib.stride_tricks.as_strided(flat.read(), view.shape, strides).copy()

    return ComputedTensor(view.shape, view.storage.dtype, gather)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def write_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a dictionary of tensors that `torch.load(path, weights_only=True)` reads.

    The bytes depend on the tensors alone, not on the clock.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes | str) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)  # dated 1980-01-01

        add("data.pkl", _pickle(tensors))
        add("byteorder", "little")
        for key, value in enumerate(tensors.values()):
            add(f"data/{key}", np.ascontiguousarray(value).tobytes())
        add("version", "3\n")


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A protocol 2 pickle written opcode by opcode: `pickle` itself could only name torch by importing it."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw

    def integer(value: int) -> bytes:
        raw = pickle.encode_long(value)
        return pickle.LONG1 + bytes([len(raw)]) + raw

    def call(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def sequence(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    out = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, value) in enumerate(tensors.items()):
        storage = sequence(
            text("storage"),
            call("torch", STORAGE_NAMES[value.dtype]),
            text(str(key)),
            text("cpu"),
            integer(value.size),
        )
        arguments = sequence(
            storage + pickle.BINPERSID,
            integer(0),
            sequence(*map(integer, value.shape)),
            sequence(*map(integer, _contiguous(value.shape))),
            pickle.NEWFALSE,
            call("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
        )
        out += [text(name), call("torch._utils", "_rebuild_tensor_v2"), arguments, pickle.REDUCE]
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])
