"""Features of a stage's audio where its speech encoder is frozen: read where they are kept, else encoded and kept.

A batch all of whose chunks are found takes no encoder at all. One with a chunk that is not is encoded whole, by all
processes, in the shapes and on the mesh of the step: the features are those that the step would compute.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llaso_jax.data.encoder_cache import EncoderCache
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.frames import CHUNK_MEL_FRAMES, CONV_STRIDE
from llaso_jax.modeling.functional import ENCODER, Params, bind, flatten
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.processes import on_host
from llaso_jax.sharding.rules import use_rules
from llaso_jax.training.feed import GlobalBatch
from llaso_jax.training.state import Layout
from llaso_jax.training.step import Batch, place_lanes


class FrozenEncoder:
    """Makes a step's device arrays, with `features` in the place of `mel`; `keep` what was encoded last."""

    def __init__(
        self,
        cfg: SpeechLMConfig,
        compute: ComputeConfig,
        layout: Layout,
        cache: EncoderCache,
        *,
        accumulation: int,
    ) -> None:
        self._encode = _make_encode(cfg, compute, layout)
        self._layout, self._cache, self._accumulation = layout, cache, accumulation
        self._encoded: tuple[jax.Array, GlobalBatch] | None = None

    def place(self, params: Params, batch: GlobalBatch) -> Batch:
        """Device micro-batches of `batch`; all processes have to call it.

        Args:
          params: of the whole model; the encoder's are read.
          batch: made with the cache.
        """
        self.keep()
        to_encode = batch.stats.chunks_to_encode > 0
        unused = () if to_encode else ("mel", "known")
        lanes = {
            lane: {name: array for name, array in arrays.items() if name not in unused}
            for lane, arrays in batch.arrays.items()
        }
        placed = place_lanes(lanes, batch.count, self._accumulation, self._layout)
        if to_encode:
            given = (placed.pop("mel"), placed["mel_frames"], placed["features"])
            placed["features"] = self._encode(params, *given, placed.pop("known"))
            self._encoded = placed["features"], batch
        return placed

    def keep(self) -> None:
        """Write the chunks of the last batch that were not there. Called a step late, nothing waits for it."""
        if self._encoded is None:
            return
        (features, batch), self._encoded = self._encoded, None
        parts: dict[int, np.ndarray] = {}  # by first row: replicas hold the same
        for shard in features.addressable_shards:
            first = shard.index[1].indices(features.shape[1])[0]
            if first not in parts:
                parts[first] = np.asarray(shard.data)
        written = set()
        for lane, part in batch.lanes.items():
            width = len(part.sample_ids) // self._accumulation
            for (row, chunk), name in part.missing.items():
                micro, offset = divmod(row, width)
                place = lane * width + offset
                first = max((f for f in parts if f <= place), default=-1)
                if name in written or first < 0 or place >= first + parts[first].shape[1]:
                    continue
                valid = int(part.arrays["mel_frames"][row, chunk])
                frames = self._cache.kept_frames(valid, part.arrays["mel"].shape[-1])
                found = parts[first][micro, place - first, chunk, :frames]
                if np.isfinite(found).all():  # what a failing device gave is not kept
                    self._cache.write(name, found)
                    written.add(name)


@functools.lru_cache(maxsize=4)
def _make_encode(cfg: SpeechLMConfig, compute: ComputeConfig, layout: Layout) -> Callable:

    def encode(
        params: Params,
        mel: jax.Array,
        mel_frames: jax.Array,
        features: jax.Array,
        known: jax.Array,
    ) -> jax.Array:
        """[G, B, C, T, D]: `features` where they are `known`, what the encoder gives elsewhere."""
        model = bind(cfg, params, compute)
        with use_rules(layout.mesh, layout.rules):
            if len(mel) == 1 or layout.on_cpu:  # one after the other, as in the step
                pairs = zip(mel, mel_frames, strict=True)
                encoded = jnp.stack([model.encode(*pair) for pair in pairs])
            else:
                encoded = jax.lax.map(lambda pair: model.encode(*pair), (mel, mel_frames))
        return jnp.where(known[..., None, None], features, encoded)

    return jax.jit(encode, out_shardings=layout.micro_batches())


def encoder_identity(cfg: SpeechLMConfig, compute: ComputeConfig, params: Params) -> dict[str, Any]:
    """JSON of everything that decides what the encoder makes of log-mel frames; all processes have to call it.

    Args:
      cfg: the model.
      compute: how it is computed.
      params: of the whole model; the encoder's are read, in the dtype they are stored in.
    """
    weights = hashlib.sha256()
    for path, leaf in flatten(params).items():
        if path.startswith(ENCODER):
            weights.update(f"{path} {leaf.dtype} {leaf.shape} ".encode())
            weights.update(np.ascontiguousarray(on_host(leaf)).tobytes())
    return {
        "weights": weights.hexdigest(),
        "program": _program_digest(cfg, compute, params),
        "encoder": dataclasses.asdict(cfg.audio),
        "padding_masked": cfg.audio_mode == "true_length",
        "attention": compute.attention,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _program_digest(cfg: SpeechLMConfig, compute: ComputeConfig, params: Params) -> str:
    """Of what one chunk goes through, as XLA is given it: another version of the model's code has another."""

    def encode(params: Params, mel: jax.Array, mel_frames: jax.Array) -> jax.Array:
        return bind(cfg, params, compute).encode(mel, mel_frames)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    frames = min(CHUNK_MEL_FRAMES, CONV_STRIDE * cfg.audio.max_source_positions)
    mel = jax.ShapeDtypeStruct((1, 1, cfg.audio.num_mel_bins, frames), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    text = jax.jit(encode).lower(shapes, mel, lengths).as_text()
    return hashlib.sha256(text.encode()).hexdigest()
