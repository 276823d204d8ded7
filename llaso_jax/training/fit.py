"""Whether the batches of a stage can be split over a mesh, known before anything is read or compiled."""

import math
from collections.abc import Mapping

from llaso_jax.config import StageConfig
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.kernels.attention.ulysses import check_heads
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.context import AXIS, check_length
from llaso_jax.sharding.rules import ShardingRules
from llaso_jax.training.objective import stage_scales


def check_stage(
    model: SpeechLMConfig, stage: StageConfig, rules: ShardingRules, sizes: Mapping[str, int]
) -> None:
    """Raise unless rows, audio chunks, positions and heads of `stage` split evenly over a mesh of `sizes`.

    Parameters are checked where their shardings are made (modeling.functional.param_shardings).

    Raises:
      ConfigError: rows or chunks that do not split, rows that lanes do not, or rules of `parameters` that do not fit.
      ShardingError: sequences or heads that do not.
    """
    stage_scales(model, stage)
    rows = stage.data.rows // stage.accumulation
    if rows % stage.data.lanes:
        raise ConfigError(
            f"stage {stage.name!r}: {rows} rows per micro-batch (data.rows / accumulation) are not a multiple of "
            f"data.lanes={stage.data.lanes}. Choose fewer lanes, or more rows."
        )
    _check(stage, rules, sizes, "rows", rows, "data.rows as a multiple of accumulation x")
    if rules.encoder is not None:
        chunks = rows * stage.data.chunks_per_row
        choice = (
            "data.chunks_per_row or data.rows so that their product is a multiple of accumulation x"
        )
        _check(stage, rules.encoder, sizes, "chunks", chunks, choice)
    ranks = sizes[AXIS]
    if rules.context is None or ranks == 1:
        return
    check_length(stage.data.sequence_length, 2 * ranks if rules.context == "ring" else ranks)
    if rules.context == "ulysses":
        tensor = math.prod(sizes[axis] for axis in rules.activation["heads"])
        check_heads(model.text.num_attention_heads // tensor, ranks)


def _check(
    stage: StageConfig,
    rules: ShardingRules,
    sizes: Mapping[str, int],
    what: str,
    count: int,
    choice: str,
) -> None:
    axes = rules.activation["batch"]
    parts = math.prod(sizes[axis] for axis in axes)
    if count % parts:
        raise ConfigError(
            f"stage {stage.name!r}: {count} {what} per micro-batch (data.rows / accumulation"
            f"{' x data.chunks_per_row' if what == 'chunks' else ''}) do not split over the {parts} devices of mesh "
            f"axes {', '.join(axes)}. Choose {choice} {parts}."
        )
