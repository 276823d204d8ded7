"""The adapters of a model, merged into the weights they change: W + scale * B A, in float32, when W is read."""

import dataclasses

from llaso_jax.conversion.binding import Pieces
from llaso_jax.conversion.lora_adapter import merged_tensor
from llaso_jax.conversion.tables import base_of
from llaso_jax.conversion.weights import Weights
from llaso_jax.modeling.lora import adapted_layer, rule_for
from llaso_jax.modeling.speech_lm import SpeechLMConfig


def merge_pieces(cfg: SpeechLMConfig, pieces: Pieces) -> Pieces:
    """The parameters of `cfg` without adapters: each changed weight keeps its dtype; nothing is read yet."""
    merged = {path: layers for path, layers in pieces.items() if adapted_layer(path) is None}
    for linear in sorted({layer for path in pieces if (layer := adapted_layer(path))}):
        rule = rule_for(linear, cfg.lora)
        assert rule is not None, linear
        names = ("weight", "lora_A/weight", "lora_B/weight")
        layers = zip(*(pieces[f"{linear}/{name}"] for name in names), strict=True)
        merged[f"{linear}/weight"] = [merged_tensor(w, a, b, rule.scale) for w, a, b in layers]
    return merged


def merge_weights(weights: Weights) -> Weights:
    """`weights` with their adapters merged."""
    pieces = merge_pieces(weights.cfg, weights.pieces)
    return dataclasses.replace(weights, cfg=base_of(weights.cfg), pieces=pieces)
