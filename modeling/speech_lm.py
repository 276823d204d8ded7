"""The speech-language model: Whisper encoder -> projector -> Llama, over the batch contract.

Text embeddings and projected audio frames are merged by a row-local gather of static shape: position s
of a row reads frame `audio_slot[s]` of that row's audio, or its token where the slot is -1. One row may hold
several packed samples, several audios per sample and several 30 s chunks per audio.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.frames import AUDIO_MODES, AudioMode
from llaso_jax.modeling.kernels.cross_entropy import cross_entropy
from llaso_jax.modeling.llama import KVCache, LlamaConfig, LlamaModel
from llaso_jax.modeling.lora import LoraRule, add_lora
from llaso_jax.modeling.projector import Projector, ProjectorConfig
from llaso_jax.modeling.whisper import WhisperConfig, WhisperEncoder
from llaso_jax.sharding.context import ring_ranks, zigzag_order
from llaso_jax.sharding.rules import constrain, use_encoder_rules

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class SpeechLMConfig:
    """Architecture of a speech-language model. Defaults are LLaSO-Base.

    `lora` gives linear layers low-rank adapters, parameters of their own beside the weights they change.
    """

    audio: WhisperConfig = WhisperConfig()
    projector: ProjectorConfig = ProjectorConfig()
    text: LlamaConfig = LlamaConfig()
    audio_mode: AudioMode = "padded"
    lora: tuple[LoraRule, ...] = ()

    def __post_init__(self) -> None:
        if self.audio_mode not in AUDIO_MODES:
            raise ValueError(
                f"audio_mode {self.audio_mode!r} is unknown: choose {', '.join(AUDIO_MODES)}."
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What training minimizes, besides the cross-entropy (kernels/cross_entropy).

    Attributes:
      label_smoothing: share of each target spread over the whole vocabulary.
      z_loss: weight of the squared log-sum-exp of the logits (PaLM uses 1e-4, arXiv 2204.02311).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must be at least 0 and below 1."
            )
        if self.z_loss < 0:
            raise ValueError(f"z_loss={self.z_loss} must not be negative.")


_OF_POSITIONS = ("tokens", "audio_slot", "positions", "segment_ids")


def _in_zigzag(batch: Batch, ranks: int) -> Batch:
    """The same batch with its positions in the order of a ring, and `answer_index` where they are then.

    Integers are reordered once here, instead of queries, keys and values in every layer.
    """
    order = zigzag_order(batch["tokens"].shape[1], ranks)
    moved = {name: batch[name][:, order] for name in _OF_POSITIONS if name in batch}
    place = jnp.asarray(np.argsort(order).astype(np.int32))
    index = batch["answer_index"]
    return {**batch, **moved, "answer_index": jnp.where(index < 0, index, place[index])}


class SpeechLM(nnx.Module):
    """`audio_tower`, `projector`, `language_model`."""

    def __init__(self, cfg: SpeechLMConfig, compute: ComputeConfig, *, rngs: nnx.Rngs) -> None:
        self.audio_tower = WhisperEncoder(cfg.audio, compute, rngs=rngs)
        self.projector = Projector(
            cfg.projector, cfg.audio.d_model, cfg.text.hidden_size, rngs=rngs
        )
        self.language_model = LlamaModel(cfg.text, compute, rngs=rngs)
        add_lora(self, cfg.lora, rngs)
        self.cfg = cfg

    def encode(self, mel: jax.Array, mel_frames: jax.Array) -> jax.Array:
        """What the speech encoder alone makes of audio chunks.

        Args:
          mel: f32[B, C, M, F] log-mel chunks of each row.
          mel_frames: i32[B, C] valid frames of each (used by audio_mode true_length only).

        Returns:
          [B, C, ceil(F/2), D_audio] features, in the dtype of computation.
        """
        features = self._encoded_chunks(mel, mel_frames)
        return features.reshape(*mel.shape[:2], *features.shape[1:])

    def project(self, features: jax.Array) -> jax.Array:
        """Features [B, C, T, D_audio] of audio chunks as the language model reads them: see `encode_audio`."""
        b, c, t, d = features.shape
        with use_encoder_rules():
            chunks = constrain(features.reshape(b * c, t, d), "batch", "sequence", "embed")
        return self._projected(chunks, rows=b)

    def encode_audio(self, mel: jax.Array, mel_frames: jax.Array) -> jax.Array:
        """Audio chunks as the language model reads them: `project` of `encode`.

        Returns:
          [B, C * ceil(ceil(F/2) / k), D] projected frames, chunk after chunk.
        """
        return self._projected(self._encoded_chunks(mel, mel_frames), rows=len(mel))

    def audio_frames(self, batch: Batch) -> jax.Array | None:
        """Projected frames of the batch's `mel`, or of its `features` where the encoder has run before.

        None for a batch without audio.
        """
        if "features" in batch:
            return self.project(batch["features"])
        return self.encode_audio(batch["mel"], batch["mel_frames"]) if "mel" in batch else None

    def _encoded_chunks(self, mel: jax.Array, mel_frames: jax.Array) -> jax.Array:
        """[B * C, ceil(F/2), D_audio]: never split into rows on the way to the projector."""
        lengths = mel_frames.reshape(-1) if self.cfg.audio_mode == "true_length" else None
        with use_encoder_rules():
            chunks = constrain(mel.reshape(-1, *mel.shape[2:]), "batch", None, None)
            return self.audio_tower(chunks, lengths)[0]

    def _projected(self, chunks: jax.Array, *, rows: int) -> jax.Array:
        with use_encoder_rules():
            frames = self.projector(chunks)
        frames = frames.reshape(rows, -1, frames.shape[2])
        # All frames of a row on every device that has a part of it: any position may read any frame.
        return constrain(frames, "batch", None, "embed")

    def embed(self, batch: Batch) -> jax.Array:
        """Input embeddings [B, S, D]: tokens, with audio frames at the positions that have a slot."""
        text = self.language_model.embed(batch["tokens"])
        audio = self.audio_frames(batch)
        if audio is None:
            return text
        slots = batch["audio_slot"][..., None]
        heard = jnp.take_along_axis(audio, jnp.maximum(slots, 0), axis=1)
        return constrain(jnp.where(slots >= 0, heard, text), "batch", "sequence", "embed")

    def hidden(self, batch: Batch, *, zigzag: bool = False) -> jax.Array:
        """Hidden states [B, S, D] after the final norm; `zigzag`: of a batch in the order of a ring."""
        x = self.embed(batch)
        out, _ = self.language_model(x, batch["positions"], batch["segment_ids"], zigzag=zigzag)
        return out

    def answer_logits(self, batch: Batch) -> jax.Array:
        """f32[B, A, V] logits at `answer_index` only (rows of index -1 are to be ignored).

        The head costs 14 % of a 3 B decoder's FLOPs when it runs everywhere; answers are a few per cent
        of the positions.
        """
        return self.language_model.logits(self._at_answers(batch))

    def _at_answers(self, batch: Batch) -> jax.Array:
        """[B, A, D] hidden states at `answer_index` (the first position where that is -1)."""
        ring = ring_ranks()
        if ring is not None:
            batch = _in_zigzag(batch, ring)
        index = jnp.maximum(batch["answer_index"], 0)[..., None]
        hidden = jnp.take_along_axis(self.hidden(batch, zigzag=ring is not None), index, axis=1)
        return constrain(hidden, "batch", "answers", "embed")

    def losses(self, batch: Batch, loss: LossConfig = LossConfig()) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy of `answer_token`, without all logits at once (kernels/cross_entropy).

        Args:
          batch: the batch contract.
          loss: what is added to it.

        Returns:
          f32[], the sum over all supervised positions, and f32[B], that of each row, without a gradient.
        """
        hidden = self._at_answers(batch)
        total, losses = cross_entropy(
            hidden,
            self.language_model.head(hidden.dtype),
            batch["answer_token"],
            batch["answer_index"] >= 0,
            vocab_size=self.cfg.text.vocab_size,
            label_smoothing=loss.label_smoothing,
            z_loss=loss.z_loss,
        )
        return total, losses.sum(-1)

    def loss_sum(self, batch: Batch) -> jax.Array:
        """Sum of the cross-entropy over all supervised positions, f32[]."""
        return self.losses(batch)[0]

    def prefill(self, batch: Batch, *, max_length: int) -> tuple[jax.Array, KVCache]:
        """Read right-padded prompts (segment 1, padding 0).

        Returns:
          f32[B, V] logits of the token after each prompt, and the key/value cache.
        """
        x = self.embed(batch)
        hidden, cache = self.language_model.prefill(
            x, batch["positions"], batch["segment_ids"], max_length=max_length
        )
        last = jnp.maximum(cache.length - 1, 0)[:, None, None]
        return self.language_model.logits(jnp.take_along_axis(hidden, last, axis=1))[:, 0], cache

    def decode(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Read one token i32[B] per row; f32[B, V] logits of the next, and the longer cache."""
        hidden, cache = self.language_model.decode(
            self.language_model.embed(tokens[:, None]), cache
        )
        return self.language_model.logits(hidden)[:, 0], cache
