"""Who owns a device's memory when a training step needs most of it."""

from collections.abc import Iterable
from typing import Any

import jax

from llaso_jax.modeling.functional import flatten
from llaso_jax.training.abstract import AbstractStep

OWNERS = (
    *("encoder", "projector", "llm", "optimizer", "audio", "batch"),
    *("gradients", "activations", "logits", "other"),
)
_PARTS = {"audio_tower": "encoder", "projector": "projector", "language_model": "llm"}
_AUDIO = ("mel", "mel_frames")


def argument_bytes(step: AbstractStep) -> dict[str, int]:
    """Bytes on each device of what a step is given: parameters by part of the model, optimizer state, and the batch.

    They are there all the time. The compiler may pad them: a TPU's arrays take whole tiles.
    """
    state, frozen, batch, _ = step.arguments
    owners = dict.fromkeys(("encoder", "projector", "llm", "optimizer", "audio", "batch"), 0)
    for params in (state.trainable, frozen):
        for path, leaf in flatten(params).items():
            owners[_PARTS[path.split("/")[0]]] += device_bytes([leaf])
    owners["optimizer"] = device_bytes(jax.tree.leaves(state.opt_state))
    owners["audio"] = device_bytes(batch[name] for name in _AUDIO)
    owners["batch"] = device_bytes(leaf for name, leaf in batch.items() if name not in _AUDIO)
    return owners


def hbm_by_owner(step: AbstractStep, peak: int) -> dict[str, int]:
    """The peak of a device's memory by what it holds; the parts sum to `peak`.

    gradients are the sums that micro-batches add to, and activations all else that the program works with: what the
    forward pass keeps, gradients on their way, weights gathered for use, the logits of a chunk, and padding.
    """
    owners = dict.fromkeys(OWNERS, 0) | argument_bytes(step)
    _, _, batch, _ = step.arguments
    if len(batch["tokens"].shape) and batch["tokens"].shape[0] > 1:
        owners["gradients"] = device_bytes(jax.tree.leaves(step.state.trainable))
    owners["activations"] = peak - sum(owners.values())
    return owners


def device_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of the shards that one device holds of abstract arrays."""
    total = 0
    for leaf in leaves:
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total
