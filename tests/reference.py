"""Random tiny torch models and their weights in our layout: what parity tests compare against.

Nothing here is shared with llaso_jax.conversion: a mistake there must not hide here too.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TorchWhisperEncoder

from llaso_jax.modeling.frames import audio_slots
from llaso_jax.modeling.functional import init_params, unflatten
from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.projector import ProjectorConfig
from llaso_jax.modeling.rope import RopeScaling
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.whisper import WhisperConfig

Params = dict[str, Any]

# So that heads of 8 have planes in all three bands: wavelengths 6 | 167 | 4443, 118144.
TINY_SCALING = RopeScaling(factor=8.0, original_max_position_embeddings=512)


def tiny_config(
    *, audio: Mapping[str, Any] = {}, text: Mapping[str, Any] = {}, **other: Any
) -> SpeechLMConfig:
    """A SpeechLM small enough to compile in a second: 12 encoder frames a chunk."""
    return SpeechLMConfig(
        audio=WhisperConfig(
            **{
                "num_mel_bins": 8,
                "d_model": 16,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "max_source_positions": 12,
                **audio,
            }
        ),
        text=LlamaConfig(
            **{
                "vocab_size": 48,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_scaling": TINY_SCALING,
                **text,
            }
        ),
        **other,
    )


# --- torch models ---------------------------------------------------------------------------------


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights with no special value left: norms are not ones, biases are not zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.2 * noise + (1.0 if "norm" in name and "weight" in name else 0.0))
            elif "embed" in name:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)
    return module.eval().requires_grad_(True)


def torch_whisper(cfg: WhisperConfig, seed: int = 0) -> TorchWhisperEncoder:
    """transformers' WhisperEncoder of these sizes."""
    hf = transformers.WhisperConfig(
        num_mel_bins=cfg.num_mel_bins,
        d_model=cfg.d_model,
        encoder_layers=cfg.encoder_layers,
        encoder_attention_heads=cfg.encoder_attention_heads,
        encoder_ffn_dim=cfg.encoder_ffn_dim,
        max_source_positions=cfg.max_source_positions,
        attn_implementation="eager",
    )
    return randomize(TorchWhisperEncoder(hf), seed)


def hf_llama_config(cfg: LlamaConfig) -> transformers.LlamaConfig:
    """transformers' configuration of these sizes."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if (scaling := cfg.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_width,
        rms_norm_eps=cfg.rms_norm_eps,
        rope_parameters=rope,
        max_position_embeddings=131_072,
        tie_word_embeddings=cfg.tie_word_embeddings,
        attention_bias=False,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )


def torch_llama(cfg: LlamaConfig, seed: int = 1) -> transformers.LlamaForCausalLM:
    """transformers' LlamaForCausalLM of these sizes."""
    return randomize(transformers.LlamaForCausalLM(hf_llama_config(cfg)), seed)


def torch_projector(
    cfg: ProjectorConfig, dim_in: int, dim_out: int, seed: int = 2
) -> torch.nn.Sequential:
    """LLaSO's projector: Linear, then (GELU, Linear) N - 1 times."""
    layers: list[torch.nn.Module] = [torch.nn.Linear(dim_in * cfg.stack, dim_out)]
    for _ in range(cfg.num_layers - 1):
        layers += [torch.nn.GELU(), torch.nn.Linear(dim_out, dim_out)]
    return randomize(torch.nn.Sequential(*layers), seed)


# --- weights and gradients in our layout ----------------------------------------------------------


def arrays(module: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """Weights by torch name (names under `prefix` only, the prefix removed)."""
    return {
        name.removeprefix(prefix): weight.detach().numpy().copy()
        for name, weight in module.named_parameters()
        if name.startswith(prefix)
    }


def gradients(module: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """Like `arrays`, of the gradients."""
    return {
        name.removeprefix(prefix): weight.grad.numpy().copy()
        for name, weight in module.named_parameters()
        if name.startswith(prefix)
    }


def attention_params(weights: Mapping[str, np.ndarray], heads: Mapping[str, int]) -> Params:
    """Projections of one attention, with heads as an axis of their own.

    Args:
      weights: {q,k,v,o or out}_proj.{weight,bias}.
      heads: number of heads of q, k and v.
    """
    flat = {}
    for name, value in weights.items():
        projection, leaf = name.split(".")
        if projection in ("q_proj", "k_proj", "v_proj"):
            flat[f"{projection}/{leaf}"] = value.reshape(heads[projection[0]], -1, *value.shape[1:])
        elif leaf == "weight":
            flat[f"{projection}/{leaf}"] = value.reshape(value.shape[0], heads["q"], -1)
        else:
            flat[f"{projection}/{leaf}"] = value
    return unflatten(flat)


def layer_params(weights: Mapping[str, np.ndarray], heads: Mapping[str, int]) -> Params:
    """One encoder or decoder layer."""
    attention = {
        name.removeprefix("self_attn."): value
        for name, value in weights.items()
        if name.startswith("self_attn.")
    }
    rest = {
        name.replace(".", "/"): value
        for name, value in weights.items()
        if not name.startswith("self_attn.")
    }
    return unflatten(rest) | {"self_attn": attention_params(attention, heads)}


def _stacked(weights: Mapping[str, np.ndarray], num: int, heads: Mapping[str, int]) -> Params:
    layers = []
    for i in range(num):
        prefix = f"layers.{i}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        layers.append(layer_params(own, heads))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def _with_layers(weights: Mapping[str, np.ndarray], num: int, heads: Mapping[str, int]) -> Params:
    rest = {n.replace(".", "/"): w for n, w in weights.items() if not n.startswith("layers.")}
    return unflatten(rest) | {"layers": _stacked(weights, num, heads)}


def whisper_heads(cfg: WhisperConfig) -> dict[str, int]:
    """Heads of q, k and v."""
    return dict.fromkeys("qkv", cfg.encoder_attention_heads)


def llama_heads(cfg: LlamaConfig) -> dict[str, int]:
    """Heads of q, k and v."""
    return {
        "q": cfg.num_attention_heads,
        "k": cfg.num_key_value_heads,
        "v": cfg.num_key_value_heads,
    }


def whisper_params(weights: Mapping[str, np.ndarray], cfg: WhisperConfig) -> Params:
    """A WhisperEncoder's weights (or gradients) by torch name -> nested."""
    return _with_layers(weights, cfg.encoder_layers, whisper_heads(cfg))


def llama_params(weights: Mapping[str, np.ndarray], cfg: LlamaConfig) -> Params:
    """A LlamaForCausalLM's weights (or gradients) by torch name -> nested."""
    model = {n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")}
    nested = _with_layers(model, cfg.num_hidden_layers, llama_heads(cfg))
    if "lm_head.weight" in weights:
        nested["lm_head"] = {"weight": weights["lm_head.weight"]}
    return nested


def projector_params(weights: Mapping[str, np.ndarray]) -> Params:
    """A Sequential's weights (or gradients): "2.weight" -> linear_1/weight."""
    flat = {}
    for name, value in weights.items():
        index, leaf = name.split(".")
        flat[f"linear_{int(index) // 2}/{leaf}"] = value
    return unflatten(flat)


# --- our modules over given weights ---------------------------------------------------------------

# A test runs a program once: compiling it well costs 8 times what compiling it plainly does.
_PLAIN = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def jit(function: Callable, **options: Any) -> Callable:
    """jax.jit for a program that runs once."""
    return jax.jit(function, compiler_options=_PLAIN, **options)


@functools.cache
def initializer(cfg: SpeechLMConfig) -> Callable[[jax.Array], Params]:
    """`init_params` of `cfg` by key, compiled once for all tests."""
    return jit(lambda key: init_params(cfg, key))


def pure(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
    """A module as its definition and the shapes of its parameters; nothing is initialized."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def apply(make: Callable[[nnx.Rngs], nnx.Module], params: Params, *args: Any, **kwargs: Any) -> Any:
    """`make(rngs)(*args)` over `params`, which must be exactly its parameters, shape by shape."""
    graph, own = pure(make)
    assert jax.tree.structure(own) == jax.tree.structure(params)
    assert jax.tree.map(np.shape, own) == jax.tree.map(np.shape, params)
    return jit(lambda p, a: nnx.merge(graph, nnx.State(p))(*a, **kwargs))(params, args)


# --- batches --------------------------------------------------------------------------------------


def random_params(params: Params, seed: int = 0) -> Params:
    """Random values with the shapes of `params`, none special (see `randomize`)."""
    rng = np.random.default_rng(seed)

    def values(path: tuple, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if "bias" in name:
            return 0.2 * noise
        if "norm" in name:
            return 1 + 0.2 * noise
        return noise * np.float32(0.5 if "embed" in name else leaf.shape[-1] ** -0.5)

    return jax.tree_util.tree_map_with_path(values, params)


def make_batch(
    rows: list[list[list[list[int] | int]]],
    cfg: SpeechLMConfig,
    *,
    mel_length: int,
    sequence: int | None = None,
    chunks: int | None = None,
    answers: int = 3,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The batch contract, filled in by hand from rows of segments of pieces.

    A piece is a list of token ids, or an int: one audio chunk of that many valid mel frames. The last
    `answers` tokens of a segment are supervised. Mel values are a function of the seed, the row's
    chunk and nothing else, so that another packing of the same chunks needs only another order.

    Example: [[[[1, 2], 24, [3, 4, 5]]]] is one row, one segment: two tokens, a chunk, three tokens.
    """
    rng = np.random.default_rng(seed)
    per_chunk = audio_slots(mel_length, mode="trimmed", stack=cfg.projector.stack)
    filled = [_fill(row, cfg, per_chunk, mel_length, answers) for row in rows]
    s = sequence or max(len(row["tokens"]) for row in filled)
    c = chunks or max(len(row["mel_frames"]) for row in filled)
    a = max(len(row["answer_index"]) for row in filled)

    def table(name: str, width: int, fill: int) -> np.ndarray:
        out = np.full((len(rows), width), fill, np.int32)
        for row, values in zip(out, filled, strict=True):
            row[: len(values[name])] = values[name]
        return out

    batch = {
        "tokens": table("tokens", s, 0),
        "audio_slot": table("audio_slot", s, -1),
        "positions": table("positions", s, 0),
        "segment_ids": table("segment_ids", s, 0),
        "mel_frames": table("mel_frames", c, 0),
        "answer_index": table("answer_index", a, -1),
        "answer_token": table("answer_token", a, 0),
    }
    mel = np.zeros((len(rows), c, cfg.audio.num_mel_bins, mel_length), np.float32)
    for i, row in enumerate(filled):
        for j in range(len(row["mel_frames"])):
            mel[i, j] = rng.standard_normal(mel.shape[2:])
    return batch | {"mel": mel}


def _fill(
    segments: list[list[list[int] | int]],
    cfg: SpeechLMConfig,
    per_chunk: int,
    mel_length: int,
    answers: int,
) -> dict[str, list[int]]:
    names = ("tokens", "audio_slot", "positions", "segment_ids", "mel_frames")
    row: dict[str, list[int]] = {name: [] for name in (*names, "answer_index", "answer_token")}
    for number, pieces in enumerate(segments, 1):
        start = len(row["tokens"])
        for piece in pieces:
            if isinstance(piece, int):
                # The tiny encoder's whole window stands for the 30 s of "padded".
                valid = mel_length if cfg.audio_mode == "padded" else piece
                slots = audio_slots(valid, mode="trimmed", stack=cfg.projector.stack)
                first = len(row["mel_frames"]) * per_chunk
                row["mel_frames"].append(piece)
                row["audio_slot"] += range(first, first + slots)
                row["tokens"] += [7] * slots  # any id: it must not matter
            else:
                row["tokens"] += piece
                row["audio_slot"] += [-1] * len(piece)
        end = len(row["tokens"])
        row["positions"] += range(end - start)
        row["segment_ids"] += [number] * (end - start)
        for target in range(end - answers, end):
            row["answer_index"].append(target - 1)
            row["answer_token"].append(row["tokens"][target])
    return row
