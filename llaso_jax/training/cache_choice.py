"""Whether a stage keeps its encoder's outputs: whether it may, whether that pays, and whether there is room."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llaso_jax.config import StageConfig
from llaso_jax.data.config import DataConfig
from llaso_jax.data.encoder_cache import EncoderCache
from llaso_jax.data.json_index import user_cache
from llaso_jax.data.packing import BatchShape
from llaso_jax.data.records import RecordSource
from llaso_jax.data.samples import BadSample, Sample, SampleLoader, SampleSource
from llaso_jax.errors import ConfigError, DataError
from llaso_jax.inference.prompts import layout_of
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import ENCODER
from llaso_jax.modeling.lora import adapted_layer
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.processes import gather_bytes

logger = logging.getLogger(__name__)

AUTO = "auto"
PROBED = 64
"""Records that are read to learn how long audio is and how many samples share a row."""

UNKNOWN = "none of the records that were tried for an estimate can be used"


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a cache would come to, from some records of the data.

    Attributes:
      passes: over the data in this stage.
      hours: of audio in the data.
      size: bytes of its features, each record's counted once.
      present: share of their chunks that is kept already.
    """

    passes: float
    hours: float
    size: int
    present: float

    @property
    def spared(self) -> float:
        """Passes that need no encoder: all but one over what is not there yet."""
        return self.passes - (1 - self.present)

    @property
    def missing_bytes(self) -> int:
        """What is still to be written."""
        return round(self.size * (1 - self.present))

    def __str__(self) -> str:
        return (
            f"about {self.passes:.1f} passes over {self.hours:.2f} h of audio, {self.size / 1e9:.2f} GB, "
            f"{self.present:.0%} of it there"
        )


def open_cache(
    stage: StageConfig,
    data: DataConfig,
    records: RecordSource,
    *,
    model: SpeechLMConfig,
    compute: ComputeConfig,
    scales: Mapping[str, float | None],
    loader: SampleLoader,
    identity: Callable[[], dict[str, Any]],
) -> EncoderCache | None:
    """The cache that `data.encoder_cache` asks for, or None where that is wiser; a line in the log says why.

    `auto` keeps features where that spares at least one whole pass of the encoder over the data and there
    is room for all of them. All processes have to call it, and all do the same.

    Args:
      stage: which is trained.
      data: its data settings, paths resolved.
      records: its training data.
      model, compute: the architecture and how it is computed.
      scales: learning rates of its parameters (None: frozen).
      loader: makes samples of records.
      identity: what decides the encoder's outputs; called if they may be kept.

    Raises:
      ConfigError: a folder is named and the stage's encoder is not frozen, or the folder cannot be used.
    """
    setting = data.encoder_cache
    if setting is None:
        return None
    obstacle = why_not(scales, data)
    if obstacle is not None and setting != AUTO:
        raise ConfigError(
            f"stage {stage.name!r}: data.encoder_cache={setting!r}, but {obstacle}, so its outputs cannot be kept. "
            f"Set it to null for this stage, or to {AUTO!r}, which leaves it out where it cannot be."
        )
    if obstacle is not None:
        logger.info("stage %s: no encoder cache: %s", stage.name, obstacle)
        return None
    cache = against = expected = None
    known = identity()
    try:
        cache = EncoderCache(
            user_cache() / "encoder" if setting == AUTO else Path(setting),
            identity=known,
            layout=layout_of(model),
            width=model.audio.d_model,
            dtype=compute.jnp_dtype,
            limit_bytes=round(data.encoder_cache_gb * 1e9),
            writers=jax.process_count(),
        )
        shape = BatchShape.of(data, layout_of(model), pad_id=loader.pad_id)
        expected = forecast(stage, records, loader, shape, cache)
        against = _against(expected, cache)
    except ConfigError as error:
        if setting != AUTO:
            raise
        against = str(error)
    if setting == AUTO:
        # Disks differ between machines; what is done must not.
        found = [json.loads(part) for part in gather_bytes(json.dumps(against).encode())]
        if refused := [reason for reason in found if reason is not None]:
            logger.info("stage %s: no encoder cache: %s", stage.name, refused[0])
            return None
    assert cache is not None
    logger.info("stage %s: encoder cache in %s: %s", stage.name, cache.folder, expected or UNKNOWN)
    return cache


def why_not(scales: Mapping[str, float | None], data: DataConfig) -> str | None:
    """Why a stage's encoder may give another output for the same audio; None if it does not."""
    if data.spec_augment is not None:
        return "data.spec_augment masks its input anew in every pass"
    for path, scale in scales.items():
        if path.startswith(ENCODER) and scale is not None:
            return f"the stage trains {path}"
        if path.startswith(ENCODER) and adapted_layer(path):
            return f"the encoder has adapters ({path})"
    return None


def forecast(
    stage: StageConfig,
    records: RecordSource,
    loader: SampleLoader,
    shape: BatchShape,
    cache: EncoderCache,
) -> Forecast | None:
    """What `cache` would come to for `stage`; None if none of the records that were read can be used."""
    numbers = sorted(set(np.linspace(0, len(records) - 1, PROBED).round().astype(int).tolist()))
    with ThreadPoolExecutor(stage.data.num_threads) as pool:
        items = list(pool.map(SampleSource(records, loader).__getitem__, numbers))
    samples = [item for item in items if not isinstance(item, BadSample) and _fits(item, shape)]
    if not samples:
        return None
    chunks = [
        (mel, int(valid), shape.bucket(sample))
        for sample in samples
        for mel, valid in zip(sample.mels, sample.mel_frames, strict=True)
    ]
    count = len(records) / len(samples)
    seconds = sum(sample.audio_seconds for sample in samples)
    kept = sum(cache.name(*chunk) in cache for chunk in chunks)
    return Forecast(
        passes=_passes(stage, len(records), samples, shape),
        hours=count * seconds / 3600,
        size=round(count * sum(cache.chunk_bytes(*chunk[1:]) for chunk in chunks)),
        present=kept / len(chunks) if chunks else 1.0,
    )


def _fits(sample: Sample, shape: BatchShape) -> bool:
    try:
        shape.bucket(sample)
    except DataError:
        return False  # the data's policy decides when it is read
    return True


def _passes(stage: StageConfig, records: int, samples: list[Sample], shape: BatchShape) -> float:
    passes = [] if stage.data.epochs is None else [stage.data.epochs]
    if stage.max_steps is not None:
        per_row = 1.0
        if stage.data.packing:
            used = (
                (shape.tokens, sum(len(s.tokens) for s in samples)),
                (shape.chunks, sum(len(s.mels) for s in samples)),
                (shape.answers, sum(len(s.answer_token) for s in samples)),
            )
            per_row = min(room * len(samples) / total for room, total in used if total)
        passes.append(stage.max_steps * stage.data.rows * per_row / records)
    return min(passes)


def _against(expected: Forecast | None, cache: EncoderCache) -> str | None:
    """Why `auto` does without it here; None if it pays."""
    if expected is None:
        return UNKNOWN
    if expected.spared < 1:
        return f"it would not spare a whole pass of the encoder ({expected})"
    if not cache.has_room(expected.missing_bytes):
        return (
            f"no room in {cache.root} ({expected}): raise data.encoder_cache_gb, or free the disk; "
            "every folder there belongs to one encoder and may be deleted"
        )
    return None
