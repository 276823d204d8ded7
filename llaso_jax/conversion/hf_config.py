"""transformers' WhisperConfig and LlamaConfig as JSON, to and from ours."""

from collections.abc import Mapping
from typing import Any

from llaso_jax.conversion.errors import ConfigMismatchError, UnsupportedConfigError
from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.rope import RopeScaling
from llaso_jax.modeling.whisper import WhisperConfig

Json = dict[str, Any]

# What transformers assumes where a config.json says nothing. Ours are LLaSO-Base's instead.
_WHISPER_DEFAULTS = {"max_source_positions": 1500, "init_std": 0.02}
_LLAMA_DEFAULTS: Json = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}
_INIT_STD = (
    0.02  # transformers cannot express "by fan-in" (None here); it only matters for new weights
)
_ROPE_THETA = 10_000.0
_MAX_POSITIONS = 131_072  # Llama 3.2's; only informative, RoPE has no table


def _require(config: Mapping[str, Any], where: str, expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        given = config.get(key, value)
        if given != value:
            raise UnsupportedConfigError(
                f"{where}: {key}={given!r} is not supported; this model has {key}={value!r}."
            )


def _get(config: Mapping[str, Any], where: str, key: str) -> Any:
    if config.get(key) is None:
        raise ConfigMismatchError(f"{where} does not say {key}, which cannot be guessed.")
    return config[key]


def whisper_from_hf(config: Mapping[str, Any], where: str) -> WhisperConfig:
    """Encoder sizes of a Whisper config.json.

    Args:
      config: the parsed JSON.
      where: its path, for errors.

    Raises:
      UnsupportedConfigError: another activation than exact GELU.
      ConfigMismatchError: sizes that are missing or do not fit together.
    """
    _require(config, where, {"activation_function": "gelu"})
    given = {**_WHISPER_DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
    names = (
        "num_mel_bins",
        "d_model",
        "encoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "max_source_positions",
        "init_std",
    )
    try:
        return WhisperConfig(**{name: _get(given, where, name) for name in names})
    except ValueError as error:
        raise ConfigMismatchError(f"{where}: {error}") from error


def whisper_to_hf(cfg: WhisperConfig) -> Json:
    """A Whisper config.json whose decoder has no layers (see exporting.py)."""
    return {
        "architectures": ["WhisperModel"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "activation_function": "gelu",
        "num_mel_bins": cfg.num_mel_bins,
        "d_model": cfg.d_model,
        "encoder_layers": cfg.encoder_layers,
        "num_hidden_layers": cfg.encoder_layers,
        "encoder_attention_heads": cfg.encoder_attention_heads,
        "encoder_ffn_dim": cfg.encoder_ffn_dim,
        "max_source_positions": cfg.max_source_positions,
        "init_std": cfg.init_std or _INIT_STD,
        "scale_embedding": False,
    }


def llama_from_hf(
    config: Mapping[str, Any],
    where: str,
    *,
    has_head: bool,
    vocab_multiple_of: int = 1,
) -> LlamaConfig:
    """Decoder sizes of a Llama config.json, of transformers 4 or 5.

    Args:
      config: the parsed JSON.
      where: its path, for errors.
      has_head: whether the weights hold an lm_head; decides where `tie_word_embeddings` is not given.
      vocab_multiple_of: pad the stored embedding rows to a multiple of it.

    Raises:
      UnsupportedConfigError: biases, another activation, quantized weights, or a RoPE this model lacks.
      ConfigMismatchError: sizes that are missing or do not fit together.
    """
    _require(config, where, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
    if config.get("quantization_config"):
        raise UnsupportedConfigError(
            f"{where}: the weights are quantized ({config['quantization_config']}); export them in "
            "float16, bfloat16 or float32 first."
        )
    theta, scaling = rope_from_hf(config, where)
    given = {**_LLAMA_DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
    heads = _get(given, where, "num_attention_heads")
    tied = given.get("tie_word_embeddings")
    try:
        return LlamaConfig(
            vocab_size=_get(given, where, "vocab_size"),
            hidden_size=_get(given, where, "hidden_size"),
            intermediate_size=_get(given, where, "intermediate_size"),
            num_hidden_layers=_get(given, where, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=given.get("num_key_value_heads", heads),
            head_dim=given.get("head_dim"),
            rms_norm_eps=given["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=not has_head if tied is None else bool(tied),
            initializer_range=given["initializer_range"],
            vocab_multiple_of=vocab_multiple_of,
        )
    except ValueError as error:
        raise ConfigMismatchError(f"{where}: {error}") from error


def rope_from_hf(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling: `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5).

    Raises:
      UnsupportedConfigError: a scaling that is neither none nor llama3, or partial rotation.
    """
    parameters: Mapping[str, Any] = (
        config.get("rope_parameters") or config.get("rope_scaling") or {}
    )
    theta = parameters.get("rope_theta") or config.get("rope_theta") or _ROPE_THETA
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if kind not in ("default", "llama3") or partial != 1.0:
        raise UnsupportedConfigError(
            f"{where}: RoPE type {kind!r} with partial_rotary_factor={partial} is not supported; "
            "'default' and 'llama3' over the whole head are."
        )
    if kind == "default":
        return float(theta), None
    try:
        scaling = RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ConfigMismatchError(f"{where}: llama3 RoPE scaling lacks {error}.") from error
    except ValueError as error:
        raise ConfigMismatchError(f"{where}: {error}") from error
    return float(theta), scaling


def llama_to_hf(cfg: LlamaConfig, *, dtype: str, source: Mapping[str, Any]) -> Json:
    """A Llama config.json that transformers 4 and 5 both read.

    Args:
      cfg: sizes.
      dtype: dtype of the weights written.
      source: config.json the weights came from: token ids and the like are kept from it.
    """
    kept = {
        key: source[key]
        for key in (
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "max_position_embeddings",
            "attention_dropout",
            "pretraining_tp",
        )
        if key in source
    }
    scaling = cfg.rope_scaling
    return {
        "max_position_embeddings": _MAX_POSITIONS,
        **kept,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": cfg.rms_norm_eps,
        "initializer_range": cfg.initializer_range or _INIT_STD,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        "torch_dtype": dtype,
        "use_cache": True,
    }
