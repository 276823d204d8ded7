"""Settings of the data pipeline."""

import math
from dataclasses import dataclass
from typing import Literal

from llaso_jax.data.audio import AudioPolicy
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.frames import AUDIO_MODES, CHUNK_MEL_FRAMES, AudioMode


@dataclass(frozen=True)
class AudioLayout:
    """What the model takes of a piece of audio; it belongs to the model and its checkpoint.

    Attributes:
        mode: see `llaso_jax.modeling.frames.AudioMode`.
        stack: encoder frames stacked before the projector (1 is LLaSO).
        mel_bins: M, 80 or 128 for released Whisper models.
    """

    mode: AudioMode = "padded"
    stack: int = 1
    mel_bins: int = 128

    def __post_init__(self) -> None:
        if self.mode not in AUDIO_MODES:
            raise ConfigError(f"audio mode {self.mode!r}; one of {AUDIO_MODES} is needed")
        _need_positive(self, "stack", "mel_bins")


@dataclass(frozen=True)
class MixtureSource:
    """Training files that are drawn together, and how often.

    Attributes:
        name: in metrics and logs.
        files: LLaSO-format files.
        weight: share of the samples that are drawn, relative to the weights of the other sources.
    """

    name: str
    files: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a source of `mixture` has an empty name")
        if not self.files:
            raise ConfigError(f"source {self.name!r} of `mixture` names no `files`")
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"`weight` of source {self.name!r} of `mixture` is {self.weight}; a number above 0 is needed"
            )


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Masks on the log-mel features of training samples (SpecAugment, arXiv 1904.08779, its "LD" policy).

    Attributes:
        frequency_masks: masks over mel bins, of each chunk of audio.
        frequency_width: bins of the widest; the width is drawn from 0 up to it.
        time_masks: masks over frames, of each chunk.
        time_width: mel frames (100 a second) of the longest; the length is drawn from 0 up to it.
        time_share: longest mask as a share of the audio in the chunk.
        except_tasks: tasks (`metadata.task` of a record) whose answers masks would falsify.
    """

    frequency_masks: int = 2
    frequency_width: int = 27
    time_masks: int = 2
    time_width: int = 100
    time_share: float = 0.2
    except_tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("frequency_masks", "frequency_width", "time_masks", "time_width"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"`spec_augment.{name}` is {getattr(self, name)}; 0 or more is needed"
                )
        if not 0 <= self.time_share <= 1:
            raise ConfigError(f"`spec_augment.time_share` is {self.time_share}; 0 to 1 is needed")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from, how they are read and what shape a batch has.

    Attributes:
        train_json: LLaSO-format files (JSON array or JSON lines) to train on.
        mixture: files to train on by weight, instead of `train_json`.
        eval_json: files to evaluate on.
        data_root: folder that relative audio paths start at; None for each JSON file's own.
        index_dir: folder for record offsets; None for each JSON file's own.
        sequence_length: S, token positions of a row, audio included.
        rows: B, rows of a batch over all processes.
        lanes: parts of a batch that are read and packed apart, lane i of L from samples i, i + L, …:
            a process loads the lanes its rows are in. Part of the order of the data, whatever the
            number of processes.
        chunks_per_row: C, most 30 s audio chunks in a row.
        answers_per_row: A, most supervised tokens in a row.
        mel_buckets: mel frames a chunk may be padded to, rising; (3000,) unless the audio
            mode is true_length.
        packing: several samples in a row; off, each has its own.
        window: samples held while packing, all lanes together; None for 2.5 x rows, at least 64.
            More pack denser and take more memory (about 0.5 MB per 9 s of audio).
        shuffle: draw training samples in an order set by `seed` and epoch.
        seed: of the order of samples.
        epochs: passes over the training data; None for no end. Of a `mixture`, as many samples are
            drawn as so many passes over all of its files have.
        spec_augment: masks on the features of training samples; None for none.
        num_workers: worker processes that load samples; 0 loads in threads of this process.
        num_threads: loading threads, of each worker process where there are some.
        read_ahead: samples loaded before they are asked for, per worker process.
        feature_cache_mb: log-mel features kept in memory for the next epoch, in MB per loading
            process (a 1 s clip takes 0.03, 30 s of 128 bins 1.5); 0 keeps none.
        encoder_cache: where outputs of a frozen speech encoder are kept for the next pass: a folder,
            `auto` (the user's cache folder, where that pays) or None.
        encoder_cache_gb: most that is kept there, in GB, of all encoders and data together.
        prefetch_batches: packed batches held ready.
        max_audio_seconds: longest audio file taken; None for no limit.
        audio_policy: what happens to longer ones: `error` (see `bad_sample_policy`) or `truncate`.
        bad_sample_policy: `raise` stops at the first sample that cannot be used; `quarantine`
            lists it in a file and goes on.
        max_quarantined_share: share of bad samples above which the run stops.
        quarantine_min_samples: samples read before that share is judged (and at the end of data).
    """

    train_json: tuple[str, ...] = ()
    mixture: tuple[MixtureSource, ...] = ()
    eval_json: tuple[str, ...] = ()
    data_root: str | None = None
    index_dir: str | None = None
    sequence_length: int = 4096
    rows: int = 8
    lanes: int = 1
    chunks_per_row: int = 4
    answers_per_row: int = 512
    mel_buckets: tuple[int, ...] = (CHUNK_MEL_FRAMES,)
    packing: bool = True
    window: int | None = None
    shuffle: bool = True
    seed: int = 0
    epochs: float | None = 1.0
    spec_augment: SpecAugmentConfig | None = None
    num_workers: int = 0
    num_threads: int = 4
    read_ahead: int = 16
    feature_cache_mb: int = 0
    encoder_cache: str | None = None
    encoder_cache_gb: float = 50.0
    prefetch_batches: int = 2
    max_audio_seconds: float | None = 600.0
    audio_policy: AudioPolicy = "error"
    bad_sample_policy: Literal["raise", "quarantine"] = "raise"
    max_quarantined_share: float = 0.01
    quarantine_min_samples: int = 100

    def __post_init__(self) -> None:
        _need_positive(
            self,
            *("sequence_length", "rows", "lanes", "chunks_per_row", "answers_per_row", "window"),
            *("epochs", "num_threads", "read_ahead", "max_audio_seconds", "encoder_cache_gb"),
        )
        for name in (
            *("num_workers", "feature_cache_mb", "prefetch_batches"),
            *("quarantine_min_samples", "seed"),
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; 0 or more is needed")
        if not 0 <= self.max_quarantined_share <= 1:
            raise ConfigError(
                f"`max_quarantined_share` is {self.max_quarantined_share}; 0 to 1 is needed"
            )
        if self.mixture and self.train_json:
            raise ConfigError(
                "`train_json` and `mixture` both name training files; give one of them"
            )
        names = [source.name for source in self.mixture]
        if len(set(names)) < len(names):
            raise ConfigError(f"sources of `mixture` need different names, got {', '.join(names)}")
        if self.encoder_cache == "":
            raise ConfigError("`encoder_cache` is empty; a folder, `auto` or null is needed")
        buckets = self.mel_buckets
        if (
            not buckets
            or list(buckets) != sorted(set(buckets))
            or not 0 < buckets[0] <= buckets[-1] <= CHUNK_MEL_FRAMES
        ):
            raise ConfigError(
                f"`mel_buckets` is {buckets}; rising numbers from 1 to {CHUNK_MEL_FRAMES} are needed"
            )

        if self.window is not None and self.window < self.rows:
            raise ConfigError(
                f"`window` is {self.window}, less than `rows` = {self.rows}: a batch takes no more "
                "samples than are held, so rows would stay empty; give more, or null"
            )

    @property
    def training_files(self) -> tuple[str, ...]:
        """Of `train_json`, or of all sources of the `mixture` in order."""
        return self.train_json or tuple(file for source in self.mixture for file in source.files)

    def total_samples(self, records: int) -> int | None:
        """Samples that are drawn of so many records in `epochs`; None for no end."""
        return None if self.epochs is None else max(1, round(self.epochs * records))

    @property
    def window_samples(self) -> int:
        """Samples held while packing."""
        return max(64, 5 * self.rows // 2) if self.window is None else self.window

    def check(self, layout: AudioLayout) -> None:
        """Raise ConfigError if these settings cannot serve `layout`."""
        full = (CHUNK_MEL_FRAMES,)
        if layout.mode != "true_length" and self.mel_buckets != full:
            raise ConfigError(
                f"`mel_buckets` is {self.mel_buckets}, but audio mode {layout.mode!r} encodes "
                f"padded 30 s chunks: set it to {full}, or the mode to 'true_length'"
            )
        if self.rows % self.lanes:
            raise ConfigError(f"`rows` is {self.rows}, not a multiple of `lanes` = {self.lanes}")
        if self.lanes > 1 and len(self.mel_buckets) > 1:
            raise ConfigError(
                f"`mel_buckets` is {self.mel_buckets} with `lanes` = {self.lanes}: each lane would choose its "
                "own bucket for a step, and one program needs one shape; give one bucket, or one lane"
            )


def _need_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"`{name}` is {value}; a number above 0 is needed")
