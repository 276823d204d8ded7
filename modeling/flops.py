"""Analytic FLOPs of the model (a multiply-add counts 2), for MFU and planning.

The formulas are those of a transformer with attention counted causally in the decoder and in full in the encoder;
they match 2.27 TFLOP for 30 s through Whisper-large-v3's encoder.
"""

from llaso_jax.modeling.frames import CONV_STRIDE, encoder_frames, projected_frames
from llaso_jax.modeling.functional import abstract_params
from llaso_jax.modeling.llama import LlamaConfig
from llaso_jax.modeling.lora import adapted_layer
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.whisper import WhisperConfig


def encoder_flops(cfg: WhisperConfig, mel_frames: int) -> float:
    """Forward FLOPs of one chunk of `mel_frames` frames."""
    t, d = encoder_frames(mel_frames), cfg.d_model
    matrices = 2 * cfg.encoder_layers * (4 * d * d + 2 * d * cfg.encoder_ffn_dim) * t
    convolutions = 2 * 3 * cfg.num_mel_bins * d * (CONV_STRIDE * t) + 2 * 3 * d * d * t
    return matrices + _encoder_attention_flops(cfg, mel_frames) + convolutions


def _encoder_attention_flops(cfg: WhisperConfig, mel_frames: int) -> float:
    """The share of `encoder_flops` without weights: scores and weighted values, every frame with every frame."""
    return 4 * cfg.encoder_layers * cfg.d_model * encoder_frames(mel_frames) ** 2


def projector_flops(cfg: SpeechLMConfig, mel_frames: int) -> float:
    """Forward FLOPs of the projector for one chunk."""
    frames = projected_frames(mel_frames, stack=cfg.projector.stack)
    width, out = cfg.audio.d_model * cfg.projector.stack, cfg.text.hidden_size
    return 2 * frames * (width * out + (cfg.projector.num_layers - 1) * out * out)


def decoder_flops(cfg: LlamaConfig, positions: int) -> float:
    """Forward FLOPs of the decoder's layers over one causal sequence."""
    heads = cfg.num_attention_heads * cfg.head_width
    kv = cfg.num_key_value_heads * cfg.head_width
    matrices = cfg.hidden_size * (2 * heads + 2 * kv + 3 * cfg.intermediate_size)
    return cfg.num_hidden_layers * (2 * matrices * positions + 2 * heads * positions**2)


def head_flops(cfg: LlamaConfig, answers: int) -> float:
    """Forward FLOPs of the output head at `answers` positions."""
    return 2 * cfg.hidden_size * cfg.vocab_size * answers


def train_flops(
    cfg: SpeechLMConfig,
    *,
    chunks: int,
    mel_frames: int,
    rows: int,
    positions: int,
    answers: int,
    trains_encoder: bool,
    trains_decoder: bool,
    classes: int | None = None,
    runs_encoder: bool = True,
) -> float:
    """FLOPs of a training step without rematerialization.

    A trained part costs 3 forwards. A frozen part that gradients pass through costs 2 (no weight gradients) plus
    the weight-free attention product a third time: the decoder always, the encoder if it has adapters. A
    frozen encoder without costs 1. The projector and all adapters are always trained.

    Args:
      cfg: the model.
      chunks, mel_frames: audio chunks of a batch, and their length.
      rows, positions: rows of a batch, and their length.
      answers: supervised positions of a batch.
      trains_encoder, trains_decoder: whether their own weights are trained, not only adapters.
      classes: of a step of CTC, which scores its frames against so many tokens, and against the answers of their
        row, where others run the decoder (modeling/token_ctc.py).
      runs_encoder: False where the batch holds the outputs of a frozen encoder.
    """
    encoder = encoder_flops(cfg.audio, mel_frames) * chunks
    frames = encoder_frames(mel_frames)
    encoder_attention = _encoder_attention_flops(cfg.audio, mel_frames) * chunks
    projector = projector_flops(cfg, mel_frames) * chunks
    in_encoder = _adapter_params(cfg, "audio_tower")
    frozen_encoder = 2 * encoder + encoder_attention if in_encoder else encoder * runs_encoder
    adapters = (
        in_encoder * frames * chunks
        + _adapter_params(cfg, "projector")
        * projected_frames(mel_frames, stack=cfg.projector.stack)
        * chunks
    )
    audio = (3 * encoder if trains_encoder else frozen_encoder) + 3 * projector + 6 * adapters
    if classes is not None:
        heard = min(
            positions, chunks // rows * projected_frames(mel_frames, stack=cfg.projector.stack)
        )
        scores = 2 * cfg.text.hidden_size * heard * rows * (classes + answers / rows)
        return audio + 2 * scores
    decoder = decoder_flops(cfg.text, positions) * rows
    attention = (
        2 * cfg.text.num_hidden_layers * cfg.text.num_attention_heads * cfg.text.head_width
    ) * (positions**2 * rows)
    head = head_flops(cfg.text, answers)
    frozen_decoder = 2 * (decoder - attention) + 3 * attention + 2 * head
    in_decoder = _adapter_params(cfg, "language_model") * positions * rows
    return audio + (3 * (decoder + head) if trains_decoder else frozen_decoder) + 6 * in_decoder


def _adapter_params(cfg: SpeechLMConfig, part: str) -> int:
    """Parameters of the LoRA adapters in a part of the model: each multiplies once per position."""
    return sum(
        info.size
        for path, info in abstract_params(cfg).items()
        if path.startswith(f"{part}/") and adapted_layer(path)
    )
