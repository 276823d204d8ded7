"""Weights stream: any mesh's shards, one block in memory at a time, each byte read once, all or nothing."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from test_conversion_support import TorchSpeechLM, assert_bit_equal, read_state

from llaso_jax.conversion import (
    export_llaso,
    gather_weights,
    load_model,
    load_params,
    open_model,
    orbax_tensors,
    stream_model,
)
from llaso_jax.conversion.errors import CorruptFileError, MissingTensorError
from llaso_jax.conversion.tensors import Tensor
from llaso_jax.errors import CheckpointError
from llaso_jax.modeling.functional import abstract_params, flatten, param_shardings
from llaso_jax.sharding.mesh import make_mesh


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llaso")
    TorchSpeechLM().save(folder)
    return folder / "model"


class Spied:
    """A tensor that counts what is read of it, and fails after `limit` bytes."""

    read_bytes = 0
    largest = 0
    limit = float("inf")

    def __init__(self, tensor):
        self.tensor, self.by_rows = tensor, tensor.by_rows
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def reshape(self, shape):
        raise AssertionError("nothing is reshaped while it streams")

    def read(self, box=None):
        values = self.tensor.read(box)
        Spied.read_bytes += values.nbytes
        Spied.largest = max(Spied.largest, values.nbytes)
        if Spied.read_bytes > Spied.limit:
            raise CorruptFileError("the disk was pulled out")
        return values


@pytest.fixture
def spied(checkpoint, monkeypatch):
    weights = gather_weights(checkpoint)
    for path, layers in weights.pieces.items():
        spies: list[Tensor] = [Spied(layer) for layer in layers]
        weights.pieces[path] = spies
    for name, value in (("read_bytes", 0), ("largest", 0), ("limit", float("inf"))):
        monkeypatch.setattr(Spied, name, value)
    return weights


@pytest.mark.parametrize("written_for", [None, "8x1", "4x2"])
def test_a_streamed_folder_loads_on_any_mesh(checkpoint, tmp_path, written_for):
    expected = flatten(load_params(gather_weights(checkpoint, vocab_multiple_of=8)))
    mesh = make_mesh(written_for) if written_for else None
    weights = gather_weights(checkpoint, vocab_multiple_of=8)
    stream_model(tmp_path / "m", weights, mesh=mesh)
    for loaded_on in (None, "1x1", "8x1", "4x2"):
        _, params = load_model(tmp_path / "m", mesh=make_mesh(loaded_on) if loaded_on else None)
        flat = flatten(params)
        assert flat.keys() == expected.keys()
        for path, array in flat.items():
            assert isinstance(array, jax.Array)
            assert array.dtype == expected[path].dtype
            np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[path]))


def test_stored_chunks_are_the_shards_of_the_mesh(checkpoint, tmp_path):
    weights, mesh = gather_weights(checkpoint, vocab_multiple_of=8), make_mesh("4x2")
    stream_model(tmp_path / "m", weights, mesh=mesh)
    infos, shardings = abstract_params(weights.cfg), param_shardings(weights.cfg, mesh)
    split = 0
    for path, layers in open_model(tmp_path / "m").pieces.items():
        shard = shardings[path].shard_shape(infos[path].shape)
        inner = shard[1:] if len(layers) > 1 else shard
        stored = layers[0]
        assert isinstance(stored, orbax_tensors.StoredTensor)
        assert stored.store.chunk_layout.write_chunk.shape[-len(inner) :] == tuple(inner)
        split += inner != infos[path].shape[-len(inner) :]
    assert split > 20


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_every_byte_is_read_once_and_a_block_at_a_time(spied, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(orbax_tensors, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(orbax_tensors, "CHUNK_BYTES", 1000)
    stored = sum(
        int(np.prod(layer.shape)) * layer.dtype.itemsize
        for layers in spied.pieces.values()
        for layer in layers
    )
    done = []
    stream_model(tmp_path / "m", spied, dtype=dtype, progress=lambda *what: done.append(what))
    assert Spied.read_bytes == stored
    # A block is rows of whole chunks, at most BLOCK_BYTES as it is written or one row of chunks.
    assert Spied.largest < stored / 30
    assert [path for path, _ in done] == sorted(spied.pieces, key=lambda p: p.split("/"))
    _, params = load_model(tmp_path / "m")
    assert {str(array.dtype) for array in flatten(params).values()} == {dtype or "float32"}


def test_there_and_back_without_devices_is_bit_equal(checkpoint, tmp_path):
    weights = gather_weights(checkpoint, vocab_multiple_of=7)
    stream_model(tmp_path / "m", weights)
    stored = open_model(tmp_path / "m")
    assert stored.cfg == weights.cfg
    assert stored.parts == weights.parts
    export_llaso(tmp_path / "hf", stored.cfg, stored.pieces, hf_config=stored.hf_config)
    assert_bit_equal(read_state(tmp_path / "hf"), TorchSpeechLM().state())


def test_what_breaks_off_leaves_nothing_and_can_be_repeated(spied, checkpoint, tmp_path):
    (tmp_path / "m").mkdir()
    Spied.limit = 20_000
    with pytest.raises(CorruptFileError, match="pulled out"):
        stream_model(tmp_path / "m", spied)
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]
    assert not list((tmp_path / "m").iterdir())
    with pytest.raises(CheckpointError, match="not a model folder"):
        open_model(tmp_path / "m")
    Spied.limit = float("inf")
    stream_model(tmp_path / "m", spied)
    assert open_model(tmp_path / "m").parts == spied.parts


SLOW_CONVERSION = """
import sys, time
from llaso_jax.conversion import gather_weights, stream_model
stream_model(sys.argv[2], gather_weights(sys.argv[1]), overwrite=True,
             progress=lambda *_: (print("begun", flush=True), time.sleep(60)))
"""


@pytest.mark.parametrize("before", ["nothing", "an earlier model"])
def test_a_kill_leaves_what_was_there_and_the_same_call_works_again(checkpoint, tmp_path, before):
    target = tmp_path / "m"
    if before != "nothing":
        stream_model(target, gather_weights(checkpoint), dtype="bfloat16")
    command = [sys.executable, "-c", SLOW_CONVERSION, str(checkpoint), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.kill()
    assert (tmp_path / ".m.incomplete").is_dir()
    if before == "nothing":
        assert not target.exists()
    else:
        kept = open_model(target).pieces["projector/linear_0/weight"][0]
        assert str(kept.dtype) == "bfloat16"
    stream_model(target, gather_weights(checkpoint), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert str(open_model(target).pieces["projector/linear_0/weight"][0].dtype) == "float32"


def test_parts_that_are_not_there_are_named(checkpoint, tmp_path):
    stream_model(tmp_path / "m", gather_weights(checkpoint))
    llama = open_model(tmp_path / "m", parts=("language_model",))
    assert {path.split("/")[0] for path in llama.pieces} == {"language_model"}
    with pytest.raises(MissingTensorError, match="audio_tower/conv1"):
        export_llaso(tmp_path / "hf", llama.cfg, llama.pieces)
    assert not (tmp_path / "hf").exists()
