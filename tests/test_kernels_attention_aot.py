"""Kernels for machines that are not there: every one lowers and, with the compilers at hand, compiles at real shapes.

`pip install libtpu` (684 MB) for the TPU tests, `pip install jax-cuda12-plugin jax-cuda12-pjrt` for the GPU one.
"""

import contextlib
import functools
import importlib.util
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import abstract_params, bind, param_shardings, unflatten
from llaso_jax.modeling.kernels.attention.pallas_gpu import attention as gpu
from llaso_jax.modeling.kernels.attention.pallas_gpu import decode as gpu_decode
from llaso_jax.modeling.kernels.attention.pallas_tpu import attention as tpu
from llaso_jax.modeling.kernels.attention.pallas_tpu import decode as tpu_decode
from llaso_jax.modeling.llama import KVCache, LlamaConfig
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.whisper import WhisperConfig
from llaso_jax.planning.topology import tpu_devices
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.rules import FSDP_TENSOR, named_sharding, use_rules

V5E = jax.sharding.AbstractDevice(platform="tpu", device_kind="TPU v5 lite", num_cores=1)
CALLS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
ENCODER = (1500, 20, 20, 64, False)
DECODER = (1560, 24, 8, 128, True)


def lowered(function, inputs, platform: str) -> int:
    """How many kernels the program for a platform calls: no compiler of that platform is needed."""
    device = contextlib.nullcontext()
    if platform == "tpu":
        mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=V5E)
        device = jax.sharding.use_abstract_mesh(mesh)
    with device:
        program = jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,))
    return program.as_text().count(f"@{CALLS[platform]}(")


@pytest.fixture
def pretend(monkeypatch):
    """Tracing for a platform that is not there."""

    def choose(platform: str) -> None:
        target = {"tpu": ("tpu", V5E.device_kind), "cuda": ("gpu", "NVIDIA H100")}[platform]
        for module in (gpu, gpu_decode, tpu, tpu_decode):
            monkeypatch.setattr(module, "target_device", lambda: target)

    return choose


@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize("shape", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_a_gradient_at_real_shapes_lowers_to_three_kernels(pretend, platform: str, shape):
    pretend(platform)
    length, heads, kv_heads, width, causal = shape
    compute = {"tpu": tpu.tpu_attention, "cuda": gpu.gpu_attention}[platform]

    def loss(q, k, v, ids):
        out = compute(q, k, v, causal=causal, q_segment_ids=ids, kv_segment_ids=ids)
        return out.astype(jnp.float32).sum()

    q, kv = (jax.ShapeDtypeStruct((1, length, n, width), jnp.bfloat16) for n in (heads, kv_heads))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    assert lowered(jax.grad(loss, (0, 1, 2)), (q, kv, kv, ids), platform) == 3


@pytest.mark.parametrize("platform", CALLS)
def test_a_step_of_generation_lowers_to_one_kernel(pretend, platform: str):
    pretend(platform)
    compute = {"tpu": tpu_decode.tpu_decode_attention, "cuda": gpu_decode.gpu_decode_attention}
    q = jax.ShapeDtypeStruct((8, 24, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((28, 8, 8, 1664, 128), jnp.bfloat16)
    numbers = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    assert lowered(compute[platform], (q, cache, cache, *numbers), platform) == 1


@functools.cache
def script():
    """scripts/aot_attention.py, whose shapes and targets these tests compile."""
    path = Path(__file__).parents[1] / "scripts" / "aot_attention.py"
    module = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location(path.stem, path)
    )
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def mesh_of(target: str):
    """One device of a target, or a skip that says what is missing."""
    package = "jax_cuda12_plugin" if target == "h100" else "libtpu"
    pytest.importorskip(package, reason=f"compiling for {target} needs {package}")
    return script().one_device(target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "h100"])
def test_every_kernel_compiles_at_real_shapes(target: str):
    mesh = mesh_of(target)
    rows = list(script().compiled_rows(target, mesh, vmem=False))
    assert len(rows) == 2 * len(script().SHAPES) + len(script().STEPS)


# LLaSO-Base's widths, one layer of the encoder and two of the decoder.
WIDE = SpeechLMConfig(audio=WhisperConfig(encoder_layers=1), text=LlamaConfig(num_hidden_layers=2))
POSITIONS, VOCABULARY = 1664, WIDE.text.padded_vocab_size


def abstract_batch(rows: int, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """One 30 s chunk and POSITIONS tokens a row, 64 of them supervised."""
    shapes = {
        **dict.fromkeys(("tokens", "audio_slot", "positions", "segment_ids"), (POSITIONS,)),
        **dict.fromkeys(("answer_index", "answer_token"), (64,)),
        "mel_frames": (1,),
        "mel": (1, WIDE.audio.num_mel_bins, 3000),
    }
    specs = {}
    for name, shape in shapes.items():
        full = (rows, *shape)
        axes = ("batch", *(None,) * len(shape))
        sharding = named_sharding(name, full, axes, FSDP_TENSOR.activation, mesh)
        dtype = jnp.float32 if name == "mel" else jnp.int32
        specs[name] = jax.ShapeDtypeStruct(full, dtype, sharding=sharding)
    return specs


@pytest.mark.slow
def test_a_train_step_on_a_tpu_calls_the_kernels_and_holds_no_scores_and_no_logits():
    pytest.importorskip("libtpu", reason="compiling for v5e needs libtpu")
    mesh = make_mesh("2x2", devices=tpu_devices("v5e:2x2"))
    shardings = param_shardings(WIDE, mesh)
    params = unflatten(
        {
            path: jax.ShapeDtypeStruct(info.shape, jnp.float32, sharding=shardings[path])
            for path, info in abstract_params(WIDE).items()
        }
    )
    compute = ComputeConfig(dtype="bfloat16", remat="layer")

    def step(params, batch):
        with use_rules(mesh, FSDP_TENSOR):
            return jax.value_and_grad(lambda p: bind(WIDE, p, compute).loss_sum(batch))(params)

    hlo = jax.jit(step).lower(params, abstract_batch(4, mesh)).compile().as_text()
    kernels = set(re.findall(r"attention_(\w+)/pallas_call", hlo))
    assert kernels == {"forward", "backward_q", "backward_kv"}
    shapes = {tuple(map(int, text.split(","))) for text in re.findall(r"\w\[([\d,]+)\]", hlo)}
    # As given, and padded to whole blocks. The one of the encoder is also half the decoder's width.
    towers = {1500, 1536}, {POSITIONS, 1792}
    positions = {1792, *(POSITIONS * rows for rows in (1, 2, 4))}
    for shape in shapes:
        for lengths in towers:
            if math.prod(shape) >= 4 * min(lengths) ** 2:  # a device has 20 or 24 heads of scores
                pairs = sum(size in lengths for size in shape)
                assert pairs < 2, f"scores of all pairs: {shape}"
        if {VOCABULARY, VOCABULARY // 2} & set(shape):
            assert not positions & set(shape), f"logits of all positions: {shape}"


@pytest.mark.slow
def test_decoding_on_a_tpu_copies_no_cache():
    """Temporaries of a step are far below the cache, which is donated and updated in place."""
    mesh = mesh_of("v5e")
    shardings = param_shardings(WIDE, mesh)
    params = unflatten(
        {
            path: jax.ShapeDtypeStruct(info.shape, jnp.bfloat16, sharding=shardings[path])
            for path, info in abstract_params(WIDE).items()
        }
    )
    on_chip = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on_chip)

    rows, text = 8, WIDE.text
    kv = spec((2, rows, text.num_key_value_heads, POSITIONS, text.head_width), jnp.bfloat16)
    cache = KVCache(kv, kv, spec((rows,), jnp.int32))
    compute = ComputeConfig(dtype="bfloat16")

    def step(params, tokens, cache):
        with use_rules(mesh, FSDP_TENSOR):
            return bind(WIDE, params, compute).decode(tokens, cache)

    program = jax.jit(step, donate_argnums=2)
    compiled = program.lower(params, spec((rows,), jnp.int32), cache).compile()
    assert "attention_decode/pallas_call" in compiled.as_text()
    one_cache = 2 * 2 * rows * text.num_key_value_heads * POSITIONS * text.head_width
    assert compiled.memory_analysis().temp_size_in_bytes < one_cache / 4
