"""Memory of a training step without any compiler: shapes of what is stored and of what the backward pass keeps.

What is stored is known exactly. What the backward pass keeps is asked of JAX itself: the gradient is traced, not run,
and its residuals counted, so every rematerialization policy and every model is covered. Only the working memory of one
layer and of the loss is a formula. docs/plan.md compares the result with compiled steps.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from llaso_jax.config import PrecisionConfig, StageConfig
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.frames import projected_frames
from llaso_jax.modeling.functional import (
    abstract_params,
    bind,
    merge,
    param_shardings,
    split,
    unflatten,
)
from llaso_jax.modeling.kernels.cross_entropy.chunked import CHUNK
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.token_ctc import SCORES
from llaso_jax.sharding.mesh import abstract_mesh
from llaso_jax.training.abstract import abstract_row
from llaso_jax.training.objective import abstract_own, objective_of
from llaso_jax.training.optimizer import ParameterRule, learning_rate_scales

MOMENTS = 2  # of AdamW, f32 as the weights they belong to
F32 = 4
OVERHEAD = 0.06
"""Copies, padding and fragmentation of compiled steps: what was missing, in the middle of docs/plan.md's table."""
HEAD = "language_model/embed_tokens/weight"  # its output side too, where they are tied


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on each device.

    Attributes:
      weights: parameters, trained ones in f32.
      optimizer: moments.
      gradients: of the trained parameters in f32: a micro-batch's, and the sum of several.
      saved: what the forward pass keeps for the backward pass.
      working: the larger of the loss and the backward pass of one layer.
    """

    weights: int
    optimizer: int
    gradients: int
    saved: int
    working: int

    @property
    def peak(self) -> int:
        """All of it, and OVERHEAD."""
        known = self.weights + self.optimizer + self.gradients + self.saved + self.working
        return round((1 + OVERHEAD) * known)


def estimate(
    model: SpeechLMConfig,
    stage: StageConfig,
    precision: PrecisionConfig,
    *,
    devices: int,
    rows: int,
) -> Estimate:
    """Memory of a step of `stage` on accelerators, rows and weights split over `devices` (fsdp).

    Args:
      model: architecture, adapters included.
      stage: whose trained parameters and sizes of a row.
      precision: dtypes and rematerialization, as on an accelerator.
      devices: of the mesh `devices x 1`.
      rows: that a device has at a time.

    Raises:
      ShardingError: parameters that do not split over so many devices.
      ConfigError: rules of the stage that do not fit the model.
    """
    compute, frozen = precision.resolve("gpu")
    held, trained = _stored_bytes(model, stage.parameters, frozen, devices)
    saved = rows * _saved_bytes(model, stage, compute, frozen)
    if compute.remat == "none" and devices > 1 and stage.objective == "lm":
        saved += _gathered_bytes(model, compute)
    return Estimate(
        weights=held + trained,
        optimizer=MOMENTS * trained,
        gradients=trained * min(2, stage.accumulation),
        saved=saved,
        working=_working_bytes(model, stage, compute, rows=rows, devices=devices),
    )


@functools.lru_cache(maxsize=256)
def _stored_bytes(
    model: SpeechLMConfig, rules: tuple[ParameterRule, ...], frozen: str, devices: int
) -> tuple[int, int]:
    """Bytes of the frozen and of the trained parameters on each of `devices`."""
    infos = abstract_params(model)
    scales = learning_rate_scales(infos, rules)
    shardings = param_shardings(model, abstract_mesh(f"{devices}x1"))
    trained = held = 0
    for path, info in infos.items():
        count = math.prod(shardings[path].shard_shape(info.shape))
        if scales[path] is None:
            held += count * jnp.dtype(frozen).itemsize
        else:
            trained += count * F32
    return held, trained


@functools.lru_cache(maxsize=64)
def _saved_bytes(
    model: SpeechLMConfig, stage: StageConfig, compute: ComputeConfig, frozen: str
) -> int:
    """Residuals of one row's gradient that are no parameters, and no scores of CTC's classes."""
    objective = objective_of(stage)
    infos = abstract_params(model)
    scales = learning_rate_scales(infos, stage.parameters)
    params = unflatten(
        {
            path: jax.ShapeDtypeStruct(info.shape, frozen if scales[path] is None else jnp.float32)
            for path, info in infos.items()
        }
    )
    trainable, rest = split(params, lambda path: scales[path] is not None)
    # Any implementation keeps results and logsumexp; this one can be traced without a device.
    compute = dataclasses.replace(compute, attention="chunked")

    def backward(trainable: Any, rest: Any, own: Any, row: dict[str, Any], answers: Any) -> Any:
        prepared = objective.prepare(model, answers, jax.random.key(0))

        def loss(trained: Any) -> jax.Array:
            bound = bind(model, merge(trained, rest), compute)
            return objective.losses(bound, own, row, prepared)[0]

        return jax.vjp(loss, trainable)[1]

    row = {
        name: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype)
        for name, leaf in abstract_row(model, stage.data).items()
    }
    answers = {
        name: jax.ShapeDtypeStruct((stage.data.rows, *array.shape[1:]), array.dtype)
        for name, array in row.items()
        if name.startswith("answer_")
    }
    own = abstract_own(objective, model)
    residuals = jax.eval_shape(backward, trainable, rest, own, row, answers)
    weights = {tuple(sorted(info.shape)) for info in infos.values()}
    classes = _classes(model, stage)
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(residuals)
        if tuple(sorted(leaf.shape)) not in weights and classes not in leaf.shape
    )


def _classes(model: SpeechLMConfig, stage: StageConfig) -> int | None:
    return objective_of(stage).classes(model, stage.data.rows * stage.data.answers_per_row)


def _gathered_bytes(model: SpeechLMConfig, compute: ComputeConfig) -> int:
    """Of the decoder's layers as gathered for use, which the backward pass reads again if nothing is recomputed."""
    layers = "language_model/layers/"
    count = sum(
        info.size for path, info in abstract_params(model).items() if path.startswith(layers)
    )
    return count * compute.jnp_dtype.itemsize


def _working_bytes(
    model: SpeechLMConfig,
    stage: StageConfig,
    compute: ComputeConfig,
    *,
    rows: int,
    devices: int,
) -> int:
    """The loss of a chunk of answers, or the backward pass of one layer of the decoder, whichever is more.

    Of CTC: the scores of its frames, their gradient, and the vectors of its classes.
    """
    text, item, data = model.text, compute.jnp_dtype.itemsize, stage.data
    classes = _classes(model, stage)
    if classes is not None:
        heard = projected_frames(data.mel_buckets[-1], stack=model.projector.stack)
        frames = rows * min(data.sequence_length, data.chunks_per_row * heard)
        scores = min(SCORES, frames * classes)
        return 2 * scores * F32 + classes * text.hidden_size * item
    table = text.padded_vocab_size * text.hidden_size
    scales = learning_rate_scales(abstract_params(model), stage.parameters)
    head_is_trained = scales[HEAD] is not None
    answers = min(CHUNK, rows * data.answers_per_row)
    logits = 2 * answers * text.padded_vocab_size * F32
    # The gradient of a trained head is split like the head itself (kernels/cross_entropy).
    loss = table * item + logits + (table * F32 // devices if head_is_trained else 0)
    positions = rows * data.sequence_length
    # Of the feed-forward network: gradients of its inside, of its inputs and outputs; its weights and their gradient.
    inside = 3 * text.intermediate_size + 4 * text.hidden_size
    weights = 2 * 3 * text.hidden_size * text.intermediate_size
    return max(loss, (positions * inside + weights) * item)
