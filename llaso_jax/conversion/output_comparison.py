"""What two models make of one clip: logits, and the hidden states on the way to them, layer by layer."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llaso_jax.conversion.loading import load_params
from llaso_jax.conversion.weights import Weights
from llaso_jax.data.audio import load_audio
from llaso_jax.data.log_mel import log_mel, mel_frames, pad_mel
from llaso_jax.data.prompt import AUDIO_ID, Turn, encode_prompt
from llaso_jax.data.tokenizer import load_tokenizer
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.frames import CHUNK_MEL_FRAMES, CHUNK_SECONDS, projected_frames
from llaso_jax.modeling.functional import Params, bind
from llaso_jax.modeling.speech_lm import Batch, SpeechLMConfig

QUESTION = "Please listen to the audio and answer the question."
_SPREAD = 32  # token ids of a prompt without tokenizer


@dataclasses.dataclass(frozen=True)
class StateDifference:
    """Hidden states of A and B after one step: largest |a - b|, and that over the largest |a|."""

    name: str
    max_abs: float
    max_rel: float


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """What A and B answer to one clip.

    Attributes:
      clip: file.
      prompt: what was asked.
      positions: text positions whose logits were compared.
      logits: of those.
      same_argmax: positions where both would write the same token.
      states: every step from the encoder's input to the logits, in order.
    """

    clip: str
    prompt: str
    positions: int
    logits: StateDifference
    same_argmax: int
    states: tuple[StateDifference, ...]

    @property
    def first(self) -> StateDifference | None:
        """The first step after which they differ."""
        return next((state for state in self.states if state.max_abs > 0), None)


def default_clip() -> Path:
    """A short clip of the corpus that ships with the package."""
    clips = sorted((Path(__file__).parents[1] / "data" / "mini" / "audio").rglob("*.opus"))
    return clips[0]


def compare_outputs(
    a: Weights, b: Weights, clip: str | Path, *, dtype: object = None
) -> OutputDifference:
    """Run both models on a clip, one after the other, in float32.

    Args:
      a, b: whole models whose parameters have the same shapes, except that vocabularies may differ.
      clip: recording; its first 30 s are used.
      dtype: parameters are rounded to it first.

    Raises:
      AudioError: a clip that cannot be read.
    """
    ids, prompt = _prompt(a, b)
    batch = _batch(a.cfg, Path(clip), ids)
    text = np.flatnonzero(np.asarray(batch["audio_slot"])[0] < 0)
    states_a = _run(a, batch, text, dtype)
    states_b = _run(b, batch, text, dtype)
    vocabulary = min(a.cfg.text.vocab_size, b.cfg.text.vocab_size)
    for states in (states_a, states_b):
        states["logits"] = states["logits"][..., :vocabulary]
    differences = tuple(
        _difference(name, state, states_b[name]) for name, state in states_a.items()
    )
    same = states_a["logits"].argmax(-1) == states_b["logits"].argmax(-1)
    return OutputDifference(
        clip=str(clip),
        prompt=prompt,
        positions=len(text),
        logits=differences[-1],
        same_argmax=int(same.sum()),
        states=differences,
    )


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> StateDifference:
    worst = float(np.abs(a - b).max())
    worst = math.inf if math.isnan(worst) else worst
    scale = float(np.abs(a).max())
    relative = 0.0 if worst == 0 else (worst / scale if scale else math.inf)
    return StateDifference(name, worst, relative)


def _prompt(a: Weights, b: Weights) -> tuple[np.ndarray, str]:
    """Token ids with AUDIO_ID in them: a question where a tokenizer is, else ids from all over the vocabulary."""
    rows = min(a.cfg.text.vocab_size, b.cfg.text.vocab_size)
    for weights in (a, b):
        if weights.folder is None:
            continue
        try:
            tokenizer = load_tokenizer(weights.folder)
        except ConfigError:
            continue
        turns = [Turn("human", QUESTION + "<audio>")]
        ids = encode_prompt(turns, tokenizer, audios=1, for_generation=True).token_ids
        if ids.max() < rows:
            return ids, f"{QUESTION!r}, tokenized as in {weights.folder}"
    spread = np.linspace(0, rows - 1, _SPREAD).astype(np.int32)
    ids = np.insert(spread, _SPREAD // 2, AUDIO_ID)
    return ids, f"{_SPREAD} token ids spread over the vocabulary (there is no tokenizer)"


def _batch(cfg: SpeechLMConfig, clip: Path, ids: np.ndarray) -> Batch:
    """One row of the batch contract: the clip, cut to what the encoder has positions for, between text."""
    samples = load_audio(clip, max_seconds=CHUNK_SECONDS, policy="truncate").samples
    limit = min(CHUNK_MEL_FRAMES, 2 * cfg.audio.max_source_positions)
    mel = pad_mel(log_mel(samples, mel_bins=cfg.audio.num_mel_bins), CHUNK_MEL_FRAMES)[:, :limit]
    valid = min(mel_frames(len(samples)), limit)
    # "padded" lets the language model hear the whole chunk, however long this encoder's is.
    heard = limit if cfg.audio_mode == "padded" else valid
    slots = projected_frames(heard, stack=cfg.projector.stack)
    place = int(np.flatnonzero(ids == AUDIO_ID)[0])
    before, after = ids[:place], ids[place + 1 :]
    nothing = np.zeros(slots, np.int32)
    tokens = np.concatenate([before, nothing, after])
    silent = [np.full(len(part), -1, np.int32) for part in (before, after)]
    return {
        "tokens": jnp.asarray(tokens)[None],
        "audio_slot": jnp.asarray(np.concatenate([silent[0], np.arange(slots), silent[1]]))[None],
        "positions": jnp.arange(len(tokens))[None],
        "segment_ids": jnp.ones((1, len(tokens)), jnp.int32),
        "mel": jnp.asarray(mel)[None, None],
        "mel_frames": jnp.full((1, 1), valid, jnp.int32),
    }


def _run(weights: Weights, batch: Batch, at: np.ndarray, dtype: object) -> dict[str, np.ndarray]:
    """Hidden states by name, in order, and logits at the positions `at`; on the host."""
    params = load_params(weights, dtype=dtype)
    encoder, features, projected, decoder, hidden, logits = jax.device_get(
        _states(weights.cfg, params, batch, jnp.asarray(at))
    )
    return {
        "encoder input": encoder[0],
        **{f"encoder layer {i}": state for i, state in enumerate(encoder[1:])},
        "encoder norm": features,
        "projector": projected,
        "decoder input": decoder[0],
        **{f"decoder layer {i}": state for i, state in enumerate(decoder[1:])},
        "decoder norm": hidden,
        "logits": logits,
    }


@functools.partial(jax.jit, static_argnums=0)
def _states(
    cfg: SpeechLMConfig, params: Params, batch: Batch, at: jax.Array
) -> tuple[jax.Array | None, ...]:
    model = bind(cfg, params)
    lengths = batch["mel_frames"][:, 0] if cfg.audio_mode == "true_length" else None
    features, encoder = model.audio_tower(batch["mel"][:, 0], lengths, hidden_states=True)
    hidden, decoder = model.language_model(
        model.embed(batch), batch["positions"], batch["segment_ids"], hidden_states=True
    )
    logits = model.language_model.logits(hidden[:, at])
    return encoder, features, model.projector(features), decoder, hidden, logits
