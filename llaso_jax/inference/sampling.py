"""The next token of every row: greedy, or drawn with temperature, top-k and top-p.

A row's random numbers come from (seed, the row's own content, step) alone. So a prompt is answered
with the same text alone, in any batch, at any row and behind any padding.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from llaso_jax.errors import ConfigError

# Finite, as in attention: no NaN where a whole row is masked.
REMOVED = -1e30


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How text is generated. Greedy unless `temperature` is above 0.

    Attributes:
      max_new_tokens: most tokens written per row.
      temperature: 0 is greedy; logits are divided by it otherwise.
      top_k: draw from the k most likely tokens only; 0 for all.
      top_p: draw from the fewest tokens whose probabilities sum to at least this; 1 for all.
      seed: of the random draws, 0 .. 2**32 - 1.
      eos_token_id: tokens that end a row; one id or several.
      pad_token_id: fills a row behind its end.

    Raises:
      ConfigError: a value out of range, or top_k / top_p in greedy decoding.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        ids = self.eos_token_id
        ids = (ids,) if isinstance(ids, int | np.integer) else tuple(ids)
        object.__setattr__(self, "eos_token_id", tuple(int(i) for i in ids))
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; at least 1 is needed.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature is {self.temperature}; 0 (greedy) or a positive number is needed."
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; 0 (all tokens) or more is needed.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; above 0 and at most 1 (all) is needed.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; 0 .. 2**32 - 1 is needed.")
        if self.greedy and (self.top_k or self.top_p < 1):
            raise ConfigError(
                f"top_k={self.top_k} and top_p={self.top_p} have no effect on greedy decoding: "
                "set temperature above 0 to sample, or leave them out."
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


class Method(NamedTuple):
    """What of a `GenerationConfig` decides the compiled program; the numbers are its inputs."""

    sample: bool
    top_k: int
    top_p: bool

    @classmethod
    def of(cls, config: GenerationConfig) -> "Method":
        """The method `config` asks for."""
        return cls(not config.greedy, config.top_k, config.top_p < 1)


class Knobs(NamedTuple):
    """Numbers of a `GenerationConfig` that may change without a new program.

    temperature, top_p: f32[]; seed: u32[]; rows: u32[B] identities (`row_identities`).
    """

    temperature: ArrayLike
    top_p: ArrayLike
    seed: ArrayLike
    rows: ArrayLike


def next_tokens(logits: jax.Array, step: jax.Array, knobs: Knobs, method: Method) -> jax.Array:
    """One token per row, i32[B], from f32[B, V] logits; `step` i32[] counts new tokens from 0."""
    if not method.sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / jnp.asarray(knobs.temperature)
    if method.top_k:
        logits = keep_top_k(logits, method.top_k)
    if method.top_p:
        logits = keep_top_p(logits, knobs.top_p)

    def draw(identity: jax.Array, row: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(knobs.seed), identity)
        return jax.random.categorical(jax.random.fold_in(key, step), row)

    return jax.vmap(draw)(jnp.asarray(knobs.rows), logits).astype(jnp.int32)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """f32[B, V] with all but the k largest of each row removed; ties with the k-th stay.

    Source: transformers TopKLogitsWarper.
    """
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < kth, REMOVED, logits)


def keep_top_p(logits: jax.Array, p: ArrayLike) -> jax.Array:
    """f32[B, V] with the least likely tokens removed whose probabilities sum to at most 1 - p.

    The most likely token always stays, and so do ties with the least likely one that stays.
    Source: transformers TopPLogitsWarper; arXiv 1904.09751.
    """
    ascending = jnp.sort(logits, axis=-1)
    tail = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    removed = (tail <= 1 - jnp.asarray(p)).sum(-1, keepdims=True)
    lowest = jnp.take_along_axis(ascending, jnp.minimum(removed, logits.shape[-1] - 1), axis=-1)
    return jnp.where(logits < lowest, REMOVED, logits)


def row_identities(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint32[B]: a checksum of what each row says and plays, whatever it is padded to.

    Equal prompts have equal identities, so drawing several answers to one takes several seeds.
    """
    valid = np.asarray(batch["segment_ids"]) > 0
    slots = np.asarray(batch["audio_slot"]) if "mel" in batch else np.full(valid.shape, -1)
    text = np.where(slots >= 0, -1, np.asarray(batch["tokens"])).astype("<i4")
    sums = []
    for row in range(len(valid)):
        checksum = zlib.crc32(text[row][valid[row]].tobytes())
        if "mel" in batch:
            mel = np.asarray(batch["mel"][row], "<f4")
            for chunk, frames in zip(mel, np.asarray(batch["mel_frames"][row]), strict=True):
                checksum = zlib.crc32(chunk[:, :frames].tobytes(), checksum)
        sums.append(checksum)
    return np.asarray(sums, np.uint32)
