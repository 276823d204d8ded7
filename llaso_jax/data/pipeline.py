"""The data pipeline: files in, packed batches out, deterministic and resumable.

batches = iter(make_pipeline(config, split="train", tokenizer=tokenizer, ...))
batch = next(batches)
state = batches.get_state()   # JSON; or grain.checkpoint.CheckpointSave(batches)
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grain
from absl import flags

from llaso_jax.data.config import AudioLayout, DataConfig
from llaso_jax.data.encoder_cache import EncoderCache
from llaso_jax.data.mixture import mix, source_sizes
from llaso_jax.data.packer import PackedBatches, SampleStream
from llaso_jax.data.packing import BatchShape
from llaso_jax.data.prompt import LLASO_PROMPT, PromptConfig
from llaso_jax.data.quarantine import Quarantine
from llaso_jax.data.records import RecordSource
from llaso_jax.data.samples import SampleLoader, SampleSource
from llaso_jax.data.spec_augment import spec_augment
from llaso_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def make_pipeline(
    config: DataConfig,
    *,
    split: Literal["train", "eval"],
    tokenizer: "PreTrainedTokenizerFast",
    layout: AudioLayout,
    prompt: PromptConfig = LLASO_PROMPT,
    quarantine_file: str | Path | None = None,
) -> grain.IterDataset:
    """Batches of the `split`, as a Grain dataset of `llaso_jax.data.batch.Batch`.

    The train split is shuffled by seed and epoch and repeated `epochs` times, or mixed by weight
    (`llaso_jax.data.mixture`). The eval split is read once, in order. Close its iterator when
    done: `it.close()` ends worker processes.

    Args:
        config: files, shapes and policies; one lane. For the parts of a batch see `make_lanes`.
        tokenizer: with LLaSO's tokens (`llaso_jax.data.tokenizer`).
        layout: audio mode, stacking and mel bins of the model.
        prompt: chat format, system prompt, length limit.
        quarantine_file: where bad samples are listed; needed by `bad_sample_policy: quarantine`.

    Raises:
        ConfigError: settings that contradict each other or the layout.
        DataError: data files that are missing, malformed or empty; while iterating, bad samples
            by policy.
    """
    if config.lanes != 1:
        raise ConfigError(f"`lanes` is {config.lanes}; `make_lanes` reads them")
    if config.bad_sample_policy == "quarantine" and quarantine_file is None:
        raise ConfigError("`bad_sample_policy: quarantine` needs a file to list samples in")
    files = {} if quarantine_file is None else {0: Path(quarantine_file)}
    return make_lanes(
        config,
        (0,),
        split=split,
        tokenizer=tokenizer,
        layout=layout,
        prompt=prompt,
        quarantine_files=files,
    )[0]


def make_lanes(
    config: DataConfig,
    lanes: Collection[int],
    *,
    split: Literal["train", "eval"],
    tokenizer: "PreTrainedTokenizerFast",
    layout: AudioLayout,
    prompt: PromptConfig = LLASO_PROMPT,
    quarantine_files: Mapping[int, Path],
    cache: EncoderCache | None = None,
) -> dict[int, grain.IterDataset]:
    """Datasets of `Batch` of these `lanes`: each yields `rows` / `config.lanes` rows of every batch.

    A lane does not depend on which others are read here. They share loading threads, worker processes
    and memory for features. Lanes may end at different batch numbers: see `batch.empty_batch`.

    Args:
        quarantine_files: by lane, where its bad samples are listed; those of other lanes are
            counted only, for another process that reads the same lane lists them.
        cache: where features of the audio are looked for.
        (others): see `make_pipeline`.
    """
    loader = SampleLoader(
        tokenizer,
        prompt=prompt,
        layout=layout,
        max_audio_seconds=config.max_audio_seconds,
        audio_policy=config.audio_policy,
        feature_cache_mb=config.feature_cache_mb,
    )
    shape = BatchShape.of(config, layout, pad_id=loader.pad_id, lanes=config.lanes)
    files = config.training_files if split == "train" else config.eval_json
    records = RecordSource(files, data_root=config.data_root, index_dir=config.index_dir)
    if not len(records):
        raise DataError(f"{', '.join(files)} hold no records; `{split}_json` names them")
    source = SampleSource(records, loader)
    if split == "train" and config.mixture:
        samples, turns = mix(source, records, config)
    else:
        samples, turns = _ordered(source, config, split), None
    augment = None
    if split == "train" and config.spec_augment is not None:
        augment = functools.partial(spec_augment, config=config.spec_augment, seed=config.seed)
    share = _share(config, len(lanes))
    datasets: dict[int, grain.IterDataset] = {}
    for lane in lanes:
        stream = SampleStream(
            samples,
            lane=lane,
            lanes=config.lanes,
            read=lambda samples: _prefetched(samples, share),
            samples_per_epoch=len(records),
            order=_order(config, split, records),
            turns=turns,
            augment=augment,
        )
        quarantine = Quarantine(config, quarantine_files.get(lane))
        batches: grain.IterDataset = PackedBatches(stream, shape, config, quarantine, cache)
        if config.prefetch_batches:
            batches = grain.experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=config.prefetch_batches
            )
        datasets[lane] = batches
    return datasets


def _share(config: DataConfig, lanes: int) -> DataConfig:
    """The loading threads and processes that each of `lanes` lanes on one process has."""
    workers = config.num_workers and max(1, config.num_workers // lanes)
    share = max(1, config.num_workers) / (lanes * max(1, workers))  # of each worker's threads
    return dataclasses.replace(
        config,
        num_workers=workers,
        num_threads=max(1, int(config.num_threads * share)),
        read_ahead=max(1, int(config.read_ahead * share)),
    )


def _order(config: DataConfig, split: str, records: RecordSource) -> str:
    shuffled = split == "train" and config.shuffle
    order = f"{split}, shuffled by seed {config.seed}" if shuffled else f"{split}, in file order"
    if split == "train" and config.mixture:
        parts = zip(config.mixture, source_sizes(config, records), strict=True)
        order += ", mixed " + ", ".join(f"{s.name} {s.weight} of {size}" for s, size in parts)
    return order


def _ordered(samples: SampleSource, config: DataConfig, split: str) -> grain.MapDataset:
    """All samples of all epochs; nothing is loaded until one is asked for."""
    dataset = grain.MapDataset.source(samples)
    if split == "eval":
        return dataset
    if config.shuffle:
        dataset = dataset.seed(config.seed).shuffle()
    total = config.total_samples(len(samples))
    if total is None:
        return dataset.repeat()
    return dataset.repeat(math.ceil(total / len(samples))).slice(slice(total))


def _prefetched(samples: grain.MapDataset, config: DataConfig) -> grain.IterDataset:
    loaded = samples.to_iter_dataset(
        grain.ReadOptions(
            num_threads=config.num_threads,
            prefetch_buffer_size=max(config.read_ahead, config.num_threads),
        )
    )
    if not config.num_workers:
        return loaded
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags; this is no absl program
    return loaded.mp_prefetch(
        grain.multiprocessing.MultiprocessingOptions(
            num_workers=config.num_workers,
            per_worker_buffer_size=max(1, config.read_ahead // config.num_workers),
        )
    )
