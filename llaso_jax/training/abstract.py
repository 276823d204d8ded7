"""A stage's training step over shapes: to be traced or compiled for devices that need not be there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llaso_jax.config import StageConfig
from llaso_jax.data.config import DataConfig
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.flops import train_flops
from llaso_jax.modeling.functional import Params, abstract_params, split, unflatten
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.training.objective import objective_of, stage_scales
from llaso_jax.training.optimizer import make_optimizer, trains_weights
from llaso_jax.training.state import Layout, TrainState, state_shardings
from llaso_jax.training.step import TrainStep, make_train_step


class AbstractStep(NamedTuple):
    """A step, and the shapes it takes with their shardings: `step.lower(*arguments)`.

    arguments: state, frozen parameters, batch, learning rate.
    """

    step: TrainStep
    arguments: tuple[TrainState, Params, dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]

    @property
    def state(self) -> TrainState:
        """Trained parameters and optimizer state."""
        return self.arguments[0]

    def compile(self) -> jax.stages.Compiled:
        """The program for the devices of the layout; none of them runs anything."""
        return self.step.lower(*self.arguments).compile()  # pyright: ignore[reportFunctionMemberAccess]


def abstract_step(
    model: SpeechLMConfig,
    stage: StageConfig,
    layout: Layout,
    compute: ComputeConfig,
    *,
    frozen_dtype: Any = jnp.bfloat16,
) -> AbstractStep:
    """What `StageRun` builds for `stage`, without any memory.

    Args:
      model: architecture.
      stage: whose trained parameters, optimizer and batch.
      layout: mesh and shardings; its devices may be those of `jax.experimental.topologies`.
      compute: compute choices.
      frozen_dtype: storage dtype of frozen parameters; trained ones are f32.

    Raises:
      ConfigError: rules of the stage that do not fit the model.
    """
    objective = objective_of(stage)
    infos = abstract_params(model) | objective.own_params(model)
    layout = layout.beside(objective.own_params(model))
    scales = stage_scales(model, stage)
    params = unflatten(
        {
            path: jax.ShapeDtypeStruct(
                info.shape,
                frozen_dtype if scales[path] is None else jnp.float32,
                sharding=(layout.frozen if scales[path] is None else layout.params)[path],
            )
            for path, info in infos.items()
        }
    )
    trainable, frozen = split(params, lambda path: scales[path] is not None)
    optimizer = make_optimizer(stage.optimizer, scales)
    step = make_train_step(model, compute, optimizer, trainable, layout, objective=objective)
    state = _abstract_state(trainable, optimizer, layout)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=layout.replicated)
    batch = abstract_batch(model, stage.data, stage.accumulation, layout)
    return AbstractStep(step, (state, frozen, batch, rate))


def stage_flops(model: SpeechLMConfig, stage: StageConfig) -> float:
    """FLOPs of one optimizer step of `stage` on all devices, without rematerialization (modeling/flops.py)."""
    scales = stage_scales(model, stage)
    data = stage.data
    answers = data.rows * data.answers_per_row
    return train_flops(
        model,
        chunks=data.rows * data.chunks_per_row,
        mel_frames=data.mel_buckets[-1],
        rows=data.rows,
        positions=data.sequence_length,
        answers=answers,
        trains_encoder=trains_weights(scales, "audio_tower"),
        trains_decoder=trains_weights(scales, "language_model"),
        classes=objective_of(stage).classes(model, answers),
    )


def _abstract_state(
    trainable: Params, optimizer: optax.GradientTransformationExtraArgs, layout: Layout
) -> TrainState:
    shardings = state_shardings(trainable, optimizer, layout)
    opt_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, trainable),
        shardings.opt_state,
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    return TrainState(step, trainable, opt_state)


def abstract_batch(
    model: SpeechLMConfig, data: DataConfig, accumulation: int, layout: Layout
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch contract [G, B, ...] at the sizes of `data`, with the longest audio a chunk may have."""
    rows, micro = data.rows // accumulation, layout.micro_batches()
    return {
        name: jax.ShapeDtypeStruct((accumulation, rows, *row.shape), row.dtype, sharding=micro)
        for name, row in abstract_row(model, data).items()
    }


def abstract_row(model: SpeechLMConfig, data: DataConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """One row of the batch contract, at the sizes of `abstract_batch`."""

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    s, c, a = data.sequence_length, data.chunks_per_row, data.answers_per_row
    return {
        "tokens": array(s),
        "audio_slot": array(s),
        "positions": array(s),
        "segment_ids": array(s),
        "mel": array(c, model.audio.num_mel_bins, data.mel_buckets[-1], dtype=jnp.float32),
        "mel_frames": array(c),
        "answer_index": array(a),
        "answer_token": array(a),
    }
