"""Prefill and decode: a batch of prompts in, the tokens that follow out.

Two programs per shape: `prefill` reads the prompts into a key/value cache; `decode` is a while loop
that takes tokens until every row has ended, its cache donated and updated in place. Prompt and cache
lengths are rounded up to few sizes and everything else is an input, so programs are compiled once
and serve every batch, temperature and seed.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from llaso_jax.errors import ConfigError
from llaso_jax.inference.prompts import Prompts, bucket, check_prompts, pad_prompts, prompts_of
from llaso_jax.inference.sampling import (
    GenerationConfig,
    Knobs,
    Method,
    next_tokens,
    row_identities,
)
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import Params, bind, flatten, param_shardings, unflatten
from llaso_jax.modeling.llama import KVCache
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.rules import FSDP_TENSOR, ShardingRules, constrain, to_spec, use_rules

EOS_PLACES = 8  # so that another number of EOS ids is no other program


class Generated(NamedTuple):
    """tokens: int32[B, max_new_tokens], padded behind the end; lengths: int32[B], end included."""

    tokens: np.ndarray
    lengths: np.ndarray


class Progress(NamedTuple):
    """A generation under way.

    tokens: i32[B, N] taken so far; lengths: i32[B] of them; ended: bool[B]; step: i32[] tokens
    taken per row; logits: f32[B, V] of the next; cache: prompts and taken tokens.
    """

    tokens: jax.Array
    lengths: jax.Array
    ended: jax.Array
    step: jax.Array
    logits: jax.Array
    cache: KVCache


class Ends(NamedTuple):
    """What ends a row, eos i32[E] (-1: none), and what fills it then, pad i32[]."""

    eos: ArrayLike
    pad: ArrayLike


def generate_tokens(
    cfg: SpeechLMConfig,
    params: Params,
    batch: Mapping[str, np.ndarray],
    generation: GenerationConfig,
    *,
    compute: ComputeConfig | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules = FSDP_TENSOR,
) -> Generated:
    """Generate for a batch of right-padded prompts, one per row.

    Args:
      cfg: architecture.
      params: parameters; on a mesh, stored there (`place_params`).
      batch: of the batch contract: tokens, positions, segment_ids (1, padding 0) and, with audio,
        audio_slot, mel, mel_frames. Other entries are not read. An empty row gets no tokens.
      generation: what to generate.
      compute: dtype and kernels; f32 by default.
      mesh: rows are split over some of its axes (rows added for that are dropped again).
      rules: of the mesh; those of a training run as `whole_rows`.

    Returns:
      New tokens only, on the host: for a row the same in whatever batch, padding and mesh it is,
      as far as the order of floating-point sums does not decide a near tie.

    Raises:
      ConfigError: a batch that is not such prompts, or an id outside the vocabulary.
    """
    prompts = _checked(cfg, batch, mesh, rules)
    for token in (*generation.eos_token_id, generation.pad_token_id):
        if not 0 <= token < cfg.text.vocab_size:
            raise ConfigError(
                f"eos_token_id or pad_token_id {token} is outside the model's vocabulary of "
                f"{cfg.text.vocab_size}: read ids from the tokenizer of this model's folder."
            )
    rows = len(batch["tokens"])

    method = Method.of(generation)
    knobs = Knobs(
        temperature=np.float32(generation.temperature),
        top_p=np.float32(generation.top_p),
        seed=np.uint32(generation.seed),
        rows=_place_rows(row_identities(prompts), mesh, rules),
    )
    eos = np.asarray(generation.eos_token_id, np.int32)
    eos = np.pad(eos, (0, -len(eos) % EOS_PLACES), constant_values=-1)
    ends = Ends(eos, np.int32(generation.pad_token_id))
    placed = {name: _place_rows(array, mesh, rules) for name, array in prompts.items()}

    programs = _programs(cfg, compute or ComputeConfig(), mesh, _ByIdentity(rules))
    capacity = bucket(generation.max_new_tokens)
    progress = programs.prefill(params, placed, ends.pad, capacity=capacity)
    until = np.int32(generation.max_new_tokens)
    progress = programs.decode(params, progress, until, knobs, ends, method=method)
    tokens, lengths = programs.fetch((progress.tokens, progress.lengths))
    return Generated(tokens[:rows, : generation.max_new_tokens], lengths[:rows])


def prompt_logits(
    cfg: SpeechLMConfig,
    params: Params,
    batch: Mapping[str, np.ndarray],
    *,
    at: np.ndarray | None = None,
    compute: ComputeConfig | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules = FSDP_TENSOR,
) -> np.ndarray:
    """f32[B, A, V] next-token logits at the positions `at` i32[B, A], None for all S, on the host.

    The other arguments are those of `generate_tokens`.
    """
    rows, length = batch["tokens"].shape
    prompts = _checked(cfg, batch, mesh, rules)
    if at is None:
        at = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    added = len(prompts["tokens"]) - rows
    prompts["answer_index"] = np.pad(np.asarray(at, np.int32), ((0, added), (0, 0)))
    placed = {name: _place_rows(array, mesh, rules) for name, array in prompts.items()}
    programs = _programs(cfg, compute or ComputeConfig(), mesh, _ByIdentity(rules))
    (logits,) = programs.fetch((programs.logits(params, placed),))
    return logits[:rows]


def place_params(
    cfg: SpeechLMConfig, params: Params, mesh: Mesh, rules: ShardingRules = FSDP_TENSOR
) -> Params:
    """`params` stored on `mesh` as `rules` says.

    Raises:
      ShardingError: a dimension that does not divide over the mesh.
    """
    shardings = param_shardings(cfg, mesh, rules)
    return unflatten(
        {path: jax.device_put(leaf, shardings[path]) for path, leaf in flatten(params).items()}
    )


def _checked(
    cfg: SpeechLMConfig,
    batch: Mapping[str, np.ndarray],
    mesh: Mesh | None,
    rules: ShardingRules,
) -> Prompts:
    prompts = prompts_of(batch)
    check_prompts(cfg, prompts)
    axes = rules.activation["batch"] if mesh is not None else ()
    return pad_prompts(prompts, row_multiple=math.prod(mesh.shape[axis] for axis in axes))


class _ByIdentity:
    """Rules as a key: they hold dicts, which cannot be hashed."""

    def __init__(self, rules: ShardingRules) -> None:
        self.rules = rules

    def __hash__(self) -> int:
        return id(self.rules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.rules is other.rules


class _Programs(NamedTuple):
    prefill: Callable[..., Progress]
    decode: Callable[..., Progress]
    logits: Callable[..., jax.Array]
    fetch: Callable[[tuple[jax.Array, ...]], tuple[np.ndarray, ...]]


@functools.lru_cache(maxsize=8)
def _programs(
    cfg: SpeechLMConfig, compute: ComputeConfig, mesh: Mesh | None, key: _ByIdentity
) -> _Programs:
    """The jitted functions of one model on one mesh; jit compiles them once per shape."""

    def placed():
        return contextlib.nullcontext() if mesh is None else use_rules(mesh, key.rules)

    @functools.partial(jax.jit, static_argnames="capacity")
    def prefill(params, prompts, pad, *, capacity: int) -> Progress:
        rows, length = prompts["tokens"].shape
        with placed():
            model = bind(cfg, params, compute)
            logits, cache = model.prefill(prompts, max_length=length + capacity)
            return Progress(
                tokens=jnp.full((rows, capacity), pad, jnp.int32),
                lengths=jnp.zeros(rows, jnp.int32),
                ended=cache.length == 0,  # rows that only fill up the mesh
                step=jnp.int32(0),
                logits=logits,
                cache=_pin(cache),
            )

    # Donated and returned, the cache is one buffer from the first token to the last.
    @functools.partial(jax.jit, static_argnames="method", donate_argnames="progress")
    def decode(params, progress: Progress, until, knobs: Knobs, ends: Ends, *, method: Method):
        def unfinished(progress: Progress) -> jax.Array:
            return (progress.step < until) & ~progress.ended.all()

        def advance(progress: Progress) -> Progress:
            tokens, lengths, ended, step, logits, cache = progress
            token = next_tokens(logits, step, knobs, method)
            token = jnp.where(ended, ends.pad, token)
            logits, cache = bind(cfg, params, compute).decode(token, cache)
            return Progress(
                jax.lax.dynamic_update_slice(tokens, token[:, None], (jnp.int32(0), step)),
                lengths + (~ended).astype(jnp.int32),
                ended | (token[:, None] == jnp.asarray(ends.eos)[None, :]).any(-1),
                step + 1,
                logits,
                _pin(cache),
            )

        with placed():
            return jax.lax.while_loop(unfinished, advance, progress)

    @jax.jit
    def logits(params, prompts) -> jax.Array:
        with placed():
            return bind(cfg, params, compute).answer_logits(prompts)[..., : cfg.text.vocab_size]

    # On several hosts no process holds every row: gather them all everywhere.
    gather = None if mesh is None else jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))

    def fetch(arrays):
        return jax.device_get(arrays if gather is None else gather(arrays))

    return _Programs(prefill, decode, logits, fetch)


def _pin(cache: KVCache) -> KVCache:
    """Rows over data and fsdp, heads over tensor: the layout attention reads the cache in."""
    axes = (None, "batch", "kv_heads", "sequence", "head_dim")
    return KVCache(
        constrain(cache.k, *axes),
        constrain(cache.v, *axes),
        constrain(cache.length, "batch"),
    )


def _place_rows(array: np.ndarray, mesh: Mesh | None, rules: ShardingRules) -> jax.Array:
    if mesh is None:
        return jnp.asarray(array)
    axes = ("batch", *(None,) * (array.ndim - 1))
    return jax.device_put(array, NamedSharding(mesh, to_spec(axes, rules.activation)))
