"""Who owns a device's memory when a training step needs most of it."""

import math
from collections.abc import Iterable
from typing import Any

import jax

from llaso_jax.modeling.functional import flatten
from llaso_jax.sharding.hlo import Program
from llaso_jax.sharding.liveness import buffers_at_peak
from llaso_jax.training.abstract import AbstractStep
from llaso_jax.training.objective import OWN

ARGUMENTS = ("encoder", "projector", "llm", "optimizer", "audio", "batch")
"""What a step is given: parameters by part of the model, the optimizer's state, mel and the rest of a batch."""
TEMPORARIES = ("weights_and_gradients", "activations", "logits", "other")
"""What it works with: arrays of the shape of a parameter (gathered or cast for use, and gradients), arrays of the
vocabulary's width, all others; and what the walk over the program does not see: padding, fragmentation, scratch."""

_PARTS = {
    "audio_tower": "encoder",
    "projector": "projector",
    "language_model": "llm",
    OWN: "projector",  # a vector that is compared with its outputs
}
_TABLE = "language_model/embed_tokens/weight"
_AUDIO = ("mel", "mel_frames")


def hbm_by_owner(step: AbstractStep, program: Program, peak: int) -> dict[str, int]:
    """The peak of a device's memory by what it holds: ARGUMENTS and TEMPORARIES, which sum to `peak`.

    Args:
      step: what was compiled.
      program: the result (sharding/hlo.py).
      peak: bytes, as the compiler says.
    """
    owners = argument_bytes(step) | dict.fromkeys(TEMPORARIES, 0)
    state, frozen, _, _ = step.arguments
    params = flatten(state.trainable) | flatten(frozen)
    weights = {shape for path, leaf in params.items() for shape in _forms(path, leaf)}
    table = params[_TABLE]
    vocabulary = {table.shape[0], table.sharding.shard_shape(table.shape)[0]}
    for buffer in buffers_at_peak(program):
        _, sizes = buffer.shape
        if _canonical(sizes) in weights:
            owners["weights_and_gradients"] += buffer.size
        elif vocabulary & set(sizes):
            owners["logits"] += buffer.size
        else:
            owners["activations"] += buffer.size
    owners["other"] = peak - sum(owners.values())
    if owners["other"] < 0:  # arrays that share memory in ways the walk does not see
        owners["activations"] += owners["other"]
        owners["other"] = 0
    return owners


def peak_bytes(memory: Any, platform: str) -> int:
    """Most memory that a device needs at a time for a compiled program, from its `memory_analysis()`."""
    if platform != "cpu":
        return memory.peak_memory_in_bytes
    # There the figure leaves out temporaries, which are one piece of memory all the time.
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept


def argument_bytes(step: AbstractStep) -> dict[str, int]:
    """Bytes on each device of what a step is given, without padding; they are there all the time."""
    state, frozen, batch, _ = step.arguments
    owners: dict[str, int] = dict.fromkeys(ARGUMENTS, 0)
    for params in (state.trainable, frozen):
        for path, leaf in flatten(params).items():
            owners[_PARTS[path.split("/")[0]]] += device_bytes([leaf])
    owners["optimizer"] = device_bytes(jax.tree.leaves(state.opt_state))
    owners["audio"] = device_bytes(batch[name] for name in _AUDIO)
    owners["batch"] = device_bytes(leaf for name, leaf in batch.items() if name not in _AUDIO)
    return owners


def device_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of the shards that one device holds of abstract arrays."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    )


def _forms(path: str, leaf: Any) -> set[tuple[int, ...]]:
    """Shapes a parameter has in a program: whole or a shard, all layers or one, heads apart or together."""
    forms = set()
    for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape)):
        for sizes in (shape, shape[1:]) if "/layers/" in path else (shape,):
            forms.add(_canonical(sizes))
            forms |= {
                _canonical((*sizes[:i], sizes[i] * sizes[i + 1], *sizes[i + 2 :]))
                for i in range(len(sizes) - 1)
                if len(sizes) > 2
            }
    return {form for form in forms if len(form) > 1}


def _canonical(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(n for n in sizes if n != 1))
