"""The data pipeline: files in, packed batches out, deterministic and resumable.

batches = iter(make_pipeline(config, split="train", tokenizer=tokenizer, ...))
batch = next(batches)
state = batches.get_state()   # JSON; or grain.checkpoint.CheckpointSave(batches)
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grain
from absl import flags

from llaso_jax.data.config import AudioLayout, DataConfig
from llaso_jax.data.packer import PackedBatches, SampleStream
from llaso_jax.data.packing import BatchShape
from llaso_jax.data.prompt import LLASO_PROMPT, PromptConfig
from llaso_jax.data.quarantine import Quarantine
from llaso_jax.data.records import RecordSource
from llaso_jax.data.samples import SampleLoader, SampleSource
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
    process_index: int = 0,
    process_count: int = 1,
    quarantine_file: str | Path | None = None,
) -> grain.IterDataset:
    """Batches of the `split`, as a Grain dataset of `llaso_jax.data.batch.Batch`.

    The train split is shuffled by seed and epoch and repeated `epochs` times; the eval split is
    read once, in order. Close its iterator when done: `it.close()` ends worker processes.

    Args:
        config: files, shapes and policies.
        tokenizer: with LLaSO's tokens (`llaso_jax.data.tokenizer`).
        layout: audio mode, stacking and mel bins of the model.
        prompt: chat format, system prompt, length limit.
        process_index, process_count: this process's share: `rows` / `process_count` rows of
            every batch. Processes may end at different batch numbers: see `batch.empty_batch`.
        quarantine_file: where bad samples are listed; needed by `bad_sample_policy: quarantine`,
            one file per process and split.

    Raises:
        ConfigError: settings that contradict each other, the layout or the process count.
        DataError: data files that are missing, malformed or empty; while iterating, bad samples
            by policy.
    """
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} of {process_count} processes does not exist")
    if config.bad_sample_policy == "quarantine" and quarantine_file is None:
        raise ConfigError("`bad_sample_policy: quarantine` needs a file to list samples in")
    loader = SampleLoader(
        tokenizer,
        prompt=prompt,
        layout=layout,
        max_audio_seconds=config.max_audio_seconds,
        audio_policy=config.audio_policy,
        feature_cache_mb=config.feature_cache_mb,
    )
    shape = BatchShape.of(config, layout, pad_id=loader.pad_id, process_count=process_count)
    files = config.train_json if split == "train" else config.eval_json
    records = RecordSource(files, data_root=config.data_root, index_dir=config.index_dir)
    if not len(records):
        raise DataError(f"{', '.join(files)} hold no records; `{split}_json` names them")
    stream = SampleStream(
        _ordered(SampleSource(records, loader), config, split),
        process_index=process_index,
        process_count=process_count,
        read=lambda samples: _prefetched(samples, config),
        samples_per_epoch=len(records),
        order=_order(config, split),
    )
    quarantine = Quarantine(config, None if quarantine_file is None else Path(quarantine_file))
    batches = PackedBatches(stream, shape, config, quarantine)
    if not config.prefetch_batches:
        return batches
    return grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=config.prefetch_batches
    )


def _order(config: DataConfig, split: str) -> str:
    shuffled = split == "train" and config.shuffle
    return f"{split}, shuffled by seed {config.seed}" if shuffled else f"{split}, in file order"


def _ordered(samples: SampleSource, config: DataConfig, split: str) -> grain.MapDataset:
    """All samples of all epochs; nothing is loaded until one is asked for."""
    dataset = grain.MapDataset.source(samples)
    if split == "eval":
        return dataset
    if config.shuffle:
        dataset = dataset.seed(config.seed).shuffle()
    if config.epochs is None:
        return dataset.repeat()
    total = max(1, round(config.epochs * len(samples)))
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
