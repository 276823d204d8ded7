"""Every source reaches every target with the values it had: the table of docs/weights.md."""

import functools

import jax
import numpy as np
import pytest
from test_conversion_formats import ct2_bytes, ct2_variables, write_gguf
from test_conversion_lora import adapted
from test_conversion_support import ALIGNER, TOWER, TorchSpeechLM, torch
from transformers import LlamaForCausalLM

from llaso_jax.conversion import (
    Weights,
    export_adapter,
    export_llama,
    export_llaso,
    export_projector,
    export_whisper,
    gather_weights,
    load_model,
    open_model,
    stream_model,
)
from llaso_jax.conversion.lora_merging import merge_pieces
from llaso_jax.conversion.tables import PARTS
from llaso_jax.modeling.functional import flatten
from llaso_jax.sharding.mesh import make_mesh

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


@functools.cache
def reference():
    return TorchSpeechLM(seed=3, scaled=False)


def llaso(folder, **how):
    return [reference().save(folder, **how)]


def parts(folder):
    """A Whisper, a Llama and a projector file."""
    llaso(folder)
    reference().llama.save_pretrained(folder / "llama")
    return [folder / "whisper", folder / "llama", folder / "mm_audio_aligner.bin"]


def other_formats(folder):
    """A CTranslate2 Whisper, a GGUF Llama and a projector file."""
    folder.mkdir()
    encoder = reference().whisper.encoder
    (folder / "ct2.bin").write_bytes(ct2_bytes(ct2_variables(encoder, 4)))
    write_gguf(folder / "llama.gguf", reference().llama)
    torch.save(
        {k: v for k, v in reference().state().items() if k.startswith(ALIGNER)},
        folder / "projector.bin",
    )
    return [folder / "ct2.bin", folder / "llama.gguf", folder / "projector.bin"]


def with_adapter(folder):
    base = llaso(folder)
    adapted(LlamaForCausalLM.from_pretrained(bare_llama(folder)), folder / "lora", **LORA)
    return [*base, folder / "lora"]


def bare_llama(folder):
    reference().llama.save_pretrained(folder / "llama")
    return folder / "llama"


def model_folder(folder):
    stream_model(folder / "orbax", gather_weights(*llaso(folder)))
    return [folder / "orbax"]


SOURCES = {
    "safetensors": llaso,
    "safetensors, 3 files": functools.partial(llaso, shards=3),
    ".bin": functools.partial(llaso, weights="bin"),
    ".bin, 2 files": functools.partial(llaso, weights="bin", shards=2),
    "tower beside it": functools.partial(llaso, tower=False),
    "Whisper, Llama, projector": parts,
    "CTranslate2, GGUF, projector": other_formats,
    "adapter, merged": with_adapter,
    "adapter, kept": with_adapter,
    "model folder": model_folder,
}


@pytest.fixture(scope="module")
def opened(root):
    """Each source once."""

    @functools.cache
    def open_source(name: str) -> Weights:
        paths = SOURCES[name](root / name.replace(" ", "_"))
        if name == "model folder":
            return open_model(paths[0])
        return gather_weights(*paths, keep_adapter=name == "adapter, kept")

    return open_source


def values(weights: Weights) -> dict[str, np.ndarray]:
    """Merged parameters of the whole model."""
    pieces = merge_pieces(weights.cfg, weights.pieces)
    return {path: np.stack([layer.read() for layer in layers]) for path, layers in pieces.items()}


def whole_folder(weights, folder):
    export_llaso(folder, weights.cfg, weights.pieces, hf_config=weights.hf_config)
    return gather_weights(folder)


def stock_folders(weights, folder):
    export_llama(folder / "llama", weights.cfg, weights.pieces, hf_config=weights.hf_config)
    export_whisper(folder / "whisper", weights.cfg, weights.pieces)
    export_projector(folder / "projector.bin", weights.cfg, weights.pieces)
    return gather_weights(folder / "llama", folder / "whisper", folder / "projector.bin")


def orbax(weights, folder):
    stream_model(folder, weights, mesh=make_mesh("4x1"))
    return open_model(folder)


def orbax_on_a_mesh(weights, folder):
    """Through devices: every parameter in its shards on another mesh than it was stored for."""
    stream_model(folder, weights, mesh=make_mesh("4x1"))
    _, params = load_model(folder, mesh=make_mesh("2x1"))
    stored = open_model(folder)
    for path, array in flatten(params).items():
        expected = [layer.read() for layer in stored.pieces[path]]
        stacked = np.stack(expected) if array.ndim > expected[0].ndim else expected[0]
        np.testing.assert_array_equal(jax.device_get(array), stacked)
    return stored


TARGETS = {
    "LLaSO": whole_folder,
    "Whisper, Llama, projector": stock_folders,
    "model folder": orbax,
    "devices": orbax_on_a_mesh,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_reaches_every_target_with_its_values(opened, tmp_path, source, target):
    weights = opened(source)
    assert weights.parts == PARTS
    arrived = TARGETS[target](weights, tmp_path / "out")
    want, got = values(weights), values(arrived)
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_all_sources_without_an_adapter_are_one_model(opened):
    state = reference().state()
    for name in SOURCES:
        if "adapter" in name:
            continue
        got = values(opened(name))
        for path, theirs in {
            "language_model/embed_tokens/weight": "model.embed_tokens.weight",
            "audio_tower/layers/fc2/weight": f"{TOWER}layers.1.fc2.weight",
            "projector/linear_1/bias": f"{ALIGNER}2.bias",
        }.items():
            np.testing.assert_array_equal(got[path][-1], state[theirs], err_msg=f"{name}: {path}")


def test_a_kept_adapter_is_written_apart_from_its_base(opened, tmp_path):
    kept = opened("adapter, kept")
    export_adapter(tmp_path / "lora", kept.cfg, kept.pieces)
    merged = values(opened("adapter, merged"))
    base = opened("safetensors")
    again = values(gather_weights(base.source, tmp_path / "lora"))
    for path, value in merged.items():
        np.testing.assert_allclose(again[path], value, rtol=0, atol=1e-6, err_msg=path)
