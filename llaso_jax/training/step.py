"""One optimizer step: gradients with respect to the trainable tree only, over micro-batches."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.dropout import use_dropout
from llaso_jax.modeling.functional import (
    Params,
    abstract_params,
    bind,
    flatten,
    merge,
    unflatten,
)
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.rules import use_rules
from llaso_jax.training.objective import NextToken, Objective, Sums, model_part, own_part
from llaso_jax.training.optimizer import global_norm
from llaso_jax.training.state import Layout, TrainState, state_shardings

Batch = dict[str, Any]
_WHOLE_STEP = 2**31
"""Key of what is drawn once a step: no number of a micro-batch."""


class StepMetrics(NamedTuple):
    """Results of one step; stays on the device until it is read.

    loss: mean loss of the supervised tokens of all micro-batches (nats).
    grad_norm: global gradient norm before clipping.
    answers: supervised tokens.
    row_losses: f32[G, B] summed loss of each row: tells which rows a non-finite loss came from.
    unaligned: samples that CTC left out.
    """

    loss: jax.Array
    grad_norm: jax.Array
    answers: jax.Array
    row_losses: jax.Array
    unaligned: jax.Array


TrainStep = Callable[[TrainState, Params, Batch, Any], tuple[TrainState, StepMetrics]]


def make_train_step(
    cfg: SpeechLMConfig,
    compute: ComputeConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    trainable: Params,
    layout: Layout,
    *,
    objective: Objective | None = None,
    seed: int = 0,
) -> TrainStep:
    """The jitted step `(state, frozen, batch, learning_rate) -> (state, metrics)`; state is donated.

    batch holds micro-batches of the batch contract, leaves [G, B, ...] (see `place_batch`). The loss is
    the sum over supervised tokens divided by their number in all G micro-batches on all devices, so
    it does not depend on how the batch is split. Stages that train the same parameters with
    the same optimizer share one step and its compiled programs. `objective` says what the loss is; parameters
    of its own are part of `trainable`. `seed` draws what is dropped and sampled, the same on every mesh.
    """
    return _train_step(
        cfg, compute, optimizer, tuple(flatten(trainable)), layout, objective or NextToken(), seed
    )


@functools.lru_cache(maxsize=4)
def _train_step(
    cfg: SpeechLMConfig,
    compute: ComputeConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    paths: tuple[str, ...],
    layout: Layout,
    objective: Objective,
    seed: int,
) -> TrainStep:
    infos = abstract_params(cfg) | objective.own_params(cfg)
    trainable = unflatten(
        {path: jax.ShapeDtypeStruct(infos[path].shape, jnp.float32) for path in paths}
    )

    drops = objective.drops or any(rule.dropout for rule in cfg.lora)

    def summed_loss(
        trained: Params, frozen: Params, prepared: Any, micro: Batch, key: jax.Array
    ) -> tuple[jax.Array, Sums]:
        model = bind(cfg, merge(model_part(trained), frozen), compute)
        with use_dropout(key if drops else None):
            return objective.losses(model, own_part(trained), micro, prepared)

    gradient = jax.value_and_grad(summed_loss, has_aux=True)
    shardings = state_shardings(trainable, optimizer, layout)

    def step(
        state: TrainState, frozen: Params, batch: Batch, learning_rate: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        carry = (jax.tree.map(jnp.zeros_like, state.trainable), jnp.zeros(()))
        count = len(batch["tokens"])
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)
        keys = jax.random.split(step_key, count)
        with use_rules(layout.mesh, layout.rules):
            prepared = objective.prepare(cfg, batch, jax.random.fold_in(step_key, _WHOLE_STEP))

            def accumulate(carry, micro_and_key: tuple[Batch, jax.Array]):
                grads, total = carry
                (loss, sums), more = gradient(state.trainable, frozen, prepared, *micro_and_key)
                # Reduce-scattered into the storage layout: no device ever holds a whole gradient tree.
                more = jax.lax.with_sharding_constraint(more, shardings.trainable)
                return (jax.tree.map(jnp.add, grads, more), total + loss), sums

            if count == 1 or layout.on_cpu:
                # XLA:CPU runs the layers' loops inside another loop much slower (0.28 -> 0.64 s).
                parts = []
                for index in range(count):
                    micro = {name: leaves[index] for name, leaves in batch.items()}
                    carry, more_sums = accumulate(carry, (micro, keys[index]))
                    parts.append(more_sums)
                sums = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
            else:
                carry, sums = jax.lax.scan(accumulate, carry, (batch, keys))
        grads, total = carry
        answers = sums.tokens.sum()
        tokens = jnp.maximum(answers, 1).astype(jnp.float32)
        grads = jax.tree.map(lambda grad: grad / tokens, grads)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.trainable, learning_rate=learning_rate
        )
        trained = optax.apply_updates(state.trainable, updates)
        metrics = StepMetrics(
            total / tokens, global_norm(grads), answers, sums.rows, sums.unaligned.sum()
        )
        return TrainState(state.step + 1, cast(Params, trained), opt_state), metrics

    return jax.jit(
        step,
        out_shardings=(shardings, layout.replicated),
        donate_argnums=(0,),
        keep_unused=True,  # weights that an objective does not run are there too: plans count them
    )


@functools.lru_cache(maxsize=4)
def make_loss(cfg: SpeechLMConfig, compute: ComputeConfig, layout: Layout) -> Callable:
    """Jitted `(params, batch) -> (summed loss, supervised tokens)` of one batch [B, ...], for validation."""

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with use_rules(layout.mesh, layout.rules):
            return bind(cfg, params, compute).loss_sum(batch), (batch["answer_index"] >= 0).sum()

    return jax.jit(loss, out_shardings=layout.replicated)


def place_batch(arrays: dict[str, np.ndarray], accumulation: int, layout: Layout) -> Batch:
    """Host batch [G*B, ...] that every process holds -> device micro-batches [G, B, ...]; see `place_lanes`."""
    return place_lanes({0: arrays}, 1, accumulation, layout)


def place_lanes(
    lanes: Mapping[int, dict[str, np.ndarray]], count: int, accumulation: int, layout: Layout
) -> Batch:
    """Host rows, lane by lane -> device micro-batches [G, B, ...], rows split over the mesh.

    A lane is [G*B/L, ...]: its rows are dealt out to micro-batches in order, and lane i has rows
    i*B/L up to (i+1)*B/L of each. So the batch is the same on every mesh and in any number of processes.

    Args:
      lanes: at least those that rows of this process's devices are in.
      count: L, all lanes.
    """
    sharding = layout.micro_batches()
    placed = {}
    for name, some in next(iter(lanes.values())).items():
        width = some.shape[0] // accumulation
        shape = (accumulation, width * count, *some.shape[1:])
        placed[name] = jax.make_array_from_callback(
            shape, sharding, functools.partial(_shard, lanes, name, width, shape)
        )
    return placed


def _shard(
    lanes: Mapping[int, dict[str, np.ndarray]],
    name: str,
    width: int,
    shape: tuple[int, ...],
    index: Any,
) -> np.ndarray:
    """The box `index` of the whole array `name`, from the lanes that its rows are in."""
    start, stop, _ = index[1].indices(shape[1])
    parts = []
    for lane in range(start // width, -(-stop // width)):
        first = lane * width
        rows = lanes[lane][name].reshape(shape[0], width, *shape[2:])
        parts.append(rows[index[0], max(start - first, 0) : stop - first, *index[2:]])
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
