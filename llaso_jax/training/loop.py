"""One stage of training, from its first batch (or the newest checkpoint) to its last."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from llaso_jax.config import (
    CheckpointConfig,
    LoggingConfig,
    PrecisionConfig,
    RunConfig,
    StageConfig,
)
from llaso_jax.data.batch import PipelineStats
from llaso_jax.data.config import DataConfig
from llaso_jax.data.prompt import PromptConfig
from llaso_jax.data.samples import SampleLoader
from llaso_jax.data.tokenizer import eos_token_ids
from llaso_jax.errors import InterruptedRunError, NonFiniteLossError
from llaso_jax.inference.prompts import layout_of
from llaso_jax.modeling.flops import train_flops
from llaso_jax.modeling.functional import Params, merge
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.training.cache_choice import open_cache
from llaso_jax.training.checkpoint import StageCheckpoints
from llaso_jax.training.ctc_validation import CTCValidator
from llaso_jax.training.feed import GlobalBatch
from llaso_jax.training.frozen_encoder import FrozenEncoder, encoder_identity
from llaso_jax.training.interrupt import StopRequest
from llaso_jax.training.metrics import MetricsWriter, peak_flops
from llaso_jax.training.objective import model_part, objective_of, stage_scales
from llaso_jax.training.optimizer import learning_rate_at, make_optimizer, trains_weights
from llaso_jax.training.report import StepBar
from llaso_jax.training.stage_data import StageData
from llaso_jax.training.state import Layout, TrainState, create_state, split_params, zero_params
from llaso_jax.training.step import Batch, StepMetrics, make_train_step, place_lanes
from llaso_jax.training.validation import SCORES, Report, Validator

logger = logging.getLogger(__name__)

Validate = Callable[[Params], Report]
"""Of all parameters of a stage: the model's, and those of its objective."""


@dataclasses.dataclass(frozen=True)
class Workplace:
    """What all stages of a run share."""

    model: SpeechLMConfig
    layout: Layout
    tokenizer: Any
    prompt: PromptConfig
    precision: PrecisionConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    seed: int
    output: Path
    metrics: MetricsWriter
    console: Console

    @classmethod
    def of(
        cls,
        cfg: RunConfig,
        *,
        model: SpeechLMConfig,
        layout: Layout,
        tokenizer: Any,
        output: Path,
        metrics: MetricsWriter,
        console: Console,
    ) -> "Workplace":
        """What the recipe `cfg` says, and where it is run."""
        return cls(
            model=model,
            layout=layout,
            tokenizer=tokenizer,
            prompt=cfg.prompt,
            precision=cfg.precision,
            checkpoint=cfg.checkpoint,
            logging=cfg.logging,
            seed=cfg.seed,
            output=output,
            metrics=metrics,
            console=console,
        )


@dataclasses.dataclass(frozen=True)
class StageResult:
    """Parameters after a stage, and its validation before and after (None: not validated)."""

    params: Params
    before: Report | None
    after: Report | None


@dataclasses.dataclass
class _Dispatched:
    """A step whose results are still on the device."""

    number: int
    metrics: StepMetrics
    batch: GlobalBatch
    learning_rate: float


class StageRun:
    """One stage: `run()` trains it and returns the parameters it ends with."""

    def __init__(
        self, place: Workplace, stage: StageConfig, params: Params, *, before: Report | None = None
    ) -> None:
        """`before`: validation of `params`, where the stage before has just made it."""
        self.place, self.stage = place, stage
        compute, frozen_dtype = place.precision.resolve(jax.devices()[0].platform)
        scales = stage_scales(place.model, stage)
        trainable, self.frozen = split_params(params, scales, frozen_dtype, place.layout)
        self.objective = objective_of(stage)
        own = self.objective.own_params(place.model)
        layout = place.layout.beside(own)
        trainable = merge(trainable, zero_params(own, layout))
        optimizer = make_optimizer(stage.optimizer, scales)
        self.state: TrainState = create_state(trainable, optimizer, layout)
        self.train_step = make_train_step(
            place.model,
            compute,
            optimizer,
            trainable,
            layout,
            objective=self.objective,
            seed=place.seed,
        )
        self.trains_encoder = trains_weights(scales, "audio_tower")
        self.trains_decoder = trains_weights(scales, "language_model")
        self.compute = compute

        self.data = StageData(
            stage,
            output=place.output,
            layout=place.layout,
            tokenizer=place.tokenizer,
            audio=layout_of(place.model),
            prompt=place.prompt,
            open_cache=functools.partial(
                open_cache,
                stage,
                model=place.model,
                compute=compute,
                scales=scales,
                loader=self._loader(stage.data),
                identity=lambda: encoder_identity(place.model, compute, self.params()),
            ),
        )
        self.encoder: FrozenEncoder | None = None
        if self.data.cache is not None:
            self.encoder = FrozenEncoder(
                place.model,
                compute,
                place.layout,
                self.data.cache,
                accumulation=stage.accumulation,
            )
        self.step = self.samples = self.unaligned = 0
        self.stats, self.steps_timed = PipelineStats(), 0
        self.before = before
        self.scored: tuple[int, Report] | None = None

    # --- the loop -----------------------------------------------------------------------------

    def run(self, *, final: bool = True) -> StageResult:
        """Train to the end of the stage; `final`: no stage follows.

        Raises:
          NonFiniteLossError: naming the step and its samples; nothing is saved after it.
          InterruptedRunError: after Ctrl-C or SIGTERM, once the state is saved.
          DataError: data that cannot be used, by the policies of `data`.
        """
        folder = self.place.output / "checkpoints" / self.stage.name
        # Closed whatever happens: worker processes left behind would keep this one from ending.
        with (
            contextlib.closing(self.data),
            StageCheckpoints(folder, self.place.checkpoint) as checkpoints,
        ):
            resumed_at = self._resume(checkpoints)
            validate = self._validator()
            early = self.stage.evaluation.before and self.step == 0
            if validate is not None and early and self.before is None:
                self.before = self._validate(validate)
            self._train(checkpoints, validate)
            # A stage that was already complete is scored again only if nothing follows it.
            scored = validate is not None and (final or self.step != resumed_at)
            after = self._validate(validate) if validate is not None and scored else None
        return StageResult(self.params(), self.before, after)

    def _train(self, checkpoints: StageCheckpoints, validate: Validate | None) -> None:
        every = self.stage.evaluation.every_steps
        pending: _Dispatched | None = None
        total = self.stage.max_steps or self.data.total_samples
        unit = "steps" if self.stage.max_steps else "samples"
        self.stats, self.steps_timed = PipelineStats(), 0
        with (
            StopRequest() as stop,
            StepBar(self.place.console, self.stage.name, total, unit) as bar,
        ):
            feed = self.data.feed(lambda: stop.requested)
            while self.step != self.stage.max_steps:
                batch = feed.take()
                if batch is None:
                    break
                rate = learning_rate_at(self.progress(), self.stage.optimizer)
                arrays = self.place_batch(batch)
                self.state, metrics = self.train_step(
                    self.state, self.frozen, arrays, np.float32(rate)
                )
                self.step += 1
                self.samples += batch.stats.samples
                self.data.note(self.step, batch)
                # The step before is read only now: the device is never left waiting for the host.
                pending = self._report(pending, bar, _Dispatched(self.step, metrics, batch, rate))
                # Before the save: a run killed between the two would never score this step again.
                stopped_by = feed.stop()
                if validate is not None and every and self.step % every == 0 and not stopped_by:
                    pending = self._report(pending, bar)
                    self._validate(validate)
                if stopped_by or self.step % self.place.checkpoint.every_steps == 0:
                    pending = self._report(pending, bar)
                    self._save(checkpoints)
                if stopped_by:
                    checkpoints.wait()
                    raise InterruptedRunError(
                        f"{stopped_by}: stage {self.stage.name!r} is saved at step {self.step}. "
                        f"Run the same command again to continue from there."
                    )
            self._report(pending, bar)
        if self.encoder is not None:
            self.encoder.keep()
        self._save(checkpoints)

    # --- parts ----------------------------------------------------------------------------------

    def params(self) -> Params:
        """All parameters of the model as they stand, trained and frozen."""
        return merge(model_part(self.state.trainable), self.frozen)

    def place_batch(self, batch: GlobalBatch) -> Batch:
        """What the step takes of `batch`, on the devices; all processes have to call it."""
        if self.encoder is not None:
            return self.encoder.place(self.params(), batch)
        return place_lanes(batch.arrays, batch.count, self.stage.accumulation, self.place.layout)

    def progress(self) -> float:
        """Share of the stage that is done, 0..1."""
        if self.stage.max_steps is not None:
            return self.step / self.stage.max_steps
        return self.samples / self.data.total_samples

    def _save(self, checkpoints: StageCheckpoints) -> None:
        progress = {
            "samples": self.samples,
            "unaligned": self.unaligned,
            **self.data.progress(),
            "before": None if self.before is None else dataclasses.asdict(self.before),
        }
        checkpoints.save(self.state, progress, step=self.step)

    def _resume(self, checkpoints: StageCheckpoints) -> int | None:
        """Continue from the newest checkpoint; its step, or None if there is none."""
        newest = checkpoints.latest_step()
        if newest is None:
            self.data.begin()
            return None
        self.state, progress = checkpoints.restore(self.state, newest)
        self.step, self.samples = newest, progress["samples"]
        self.unaligned = progress["unaligned"]
        self.data.resume(newest, progress)
        self.before = Report.from_dict(progress["before"]) if progress["before"] else None
        logger.info("stage %s continues from step %d", self.stage.name, newest)
        return newest

    def _validator(self) -> Validate | None:
        data, cfg = self.data.config, self.stage.evaluation
        if not data.eval_json:
            return None
        place = self.place
        of_both = (
            *(place.model, self.compute, place.layout),
            *(data, self._loader(data), place.tokenizer),
        )
        if self.stage.objective == "ctc":
            return CTCValidator(*of_both, max_samples=cfg.max_samples, ctc=self.stage.ctc)
        return Validator(
            *of_both,
            eos_token_id=eos_token_ids(place.tokenizer),
            max_samples=cfg.max_samples,
            max_new_tokens=cfg.max_new_tokens,
            batch_rows=cfg.batch_rows,
        )

    def _loader(self, data: DataConfig) -> SampleLoader:
        return SampleLoader(
            self.place.tokenizer,
            prompt=self.place.prompt,
            layout=layout_of(self.place.model),
            max_audio_seconds=data.max_audio_seconds,
            audio_policy=data.audio_policy,
        )

    def _validate(self, validate: Validate) -> Report:
        if self.scored is not None and self.scored[0] == self.step:
            return self.scored[1]  # the last step is often one of evaluation.every_steps too
        started = time.monotonic()
        report = validate(merge(self.state.trainable, self.frozen))
        self.scored = self.step, report
        self.place.metrics.write("eval", self.stage.name, self.step, report.numbers())
        scores = ", ".join(
            f"{name} {value:.3f}"
            for name in ("loss", *SCORES)
            if (value := getattr(report, name)) is not None
        )
        logger.info(
            "stage %s, step %d, held out: %s (%.0f s)",
            self.stage.name,
            self.step,
            scores,
            time.monotonic() - started,
        )
        return report

    def _report(
        self, done: _Dispatched | None, bar: StepBar, newer: _Dispatched | None = None
    ) -> _Dispatched | None:
        """Read a dispatched step's results, check and write them; returns `newer`, now dispatched."""
        if done is None:
            return newer
        loss, grad_norm = float(done.metrics.loss), float(done.metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLossError(_describe_non_finite(self.stage.name, done, loss, grad_norm))
        self.stats.add(done.batch.stats)
        seconds = max(time.monotonic() - self.stats.started, 1e-9)
        values = {
            "loss": loss,
            "learning_rate": done.learning_rate,
            "grad_norm": grad_norm,
            "answers": int(done.metrics.answers),
            "samples": self.samples - (newer.batch.stats.samples if newer else 0),
            "padding": done.batch.stats.padding,
            "tokens_per_second": self.stats.tokens / seconds,
            "audio_seconds_per_second": self.stats.audio_seconds / seconds,
            "samples_per_second": self.stats.samples / seconds,
            "quarantined": done.batch.stats.quarantined,
        }
        if self.stage.objective == "ctc":
            self._count_unaligned(int(done.metrics.unaligned), done.number)
            values["unaligned"] = self.unaligned
        if self.data.sources:
            values["passes"] = self.data.passes(before=newer.batch if newer else None)
        if self.encoder is not None:
            values["chunks_encoded"] = done.batch.stats.chunks_to_encode
        self.steps_timed += 1
        mfu = self._mfu(done.batch, seconds / self.steps_timed)
        if mfu is not None:
            values["mfu"] = mfu
        if done.number % self.place.logging.every_steps == 0 or newer is None:
            self.place.metrics.write("train", self.stage.name, done.number, values)
        bar.update(
            done.number if self.stage.max_steps else values["samples"],
            f"loss {loss:.3f}  lr {done.learning_rate:.1e}  {values['tokens_per_second']:.0f} tok/s  "
            f"{values['audio_seconds_per_second']:.0f} s audio/s  padding {values['padding']:.0%}"
            + (f"  MFU {mfu:.0%}" if mfu is not None else ""),
        )
        return newer

    def _count_unaligned(self, count: int, step: int) -> None:
        if count and not self.unaligned:
            logger.warning(
                "stage %s, step %d: %d samples have fewer audio frames than CTC needs for the tokens of their "
                "answers, and teach nothing; metrics.jsonl counts them as `unaligned`. If they are many, stack fewer "
                "frames (model.projector.stack).",
                *(self.stage.name, step, count),
            )
        self.unaligned += count

    def _mfu(self, batch: GlobalBatch, seconds: float) -> float | None:
        devices = self.place.layout.mesh.devices.flat
        peak = peak_flops(devices[0].device_kind)
        if peak is None:
            return None
        arrays = next(iter(batch.arrays.values()))  # all lanes have the same shapes
        answers = arrays["answer_index"].size * batch.count
        flops = train_flops(
            self.place.model,
            chunks=arrays["mel_frames"].size * batch.count,
            mel_frames=arrays["mel"].shape[-1],
            rows=len(arrays["tokens"]) * batch.count,
            positions=arrays["tokens"].shape[1],
            answers=answers,
            trains_encoder=self.trains_encoder,
            trains_decoder=self.trains_decoder,
            classes=self.objective.classes(self.place.model, answers),
            runs_encoder=self.encoder is None or batch.stats.chunks_to_encode > 0,
        )
        return flops / seconds / (peak * len(devices))


def _describe_non_finite(stage: str, done: _Dispatched, loss: float, grad_norm: float) -> str:
    row_losses = np.asarray(done.metrics.row_losses)
    bad = [
        done.batch.row_samples(micro_batch, row, len(row_losses))
        for micro_batch, row in np.argwhere(~np.isfinite(row_losses)).tolist()
    ]
    here = [ids for ids in bad if ids is not None]
    if bad and not here:
        where = f"rows of other processes, whose samples the ledger lists under step {done.number}"
    else:
        ids = [i for row in here or done.batch.sample_ids for i in row]
        what = "samples of the rows it came from" if bad else "all samples of the step"
        where = f"{what}{'' if bad else ' (no row stands out)'}: {', '.join(ids)}"
    return (
        f"stage {stage!r}: loss {loss} (gradient norm {grad_norm}) in step {done.number}, computed from "
        f"the parameters after step {done.number - 1}; {where}. Lower "
        f"optimizer.learning_rate, or look at these samples; the newest checkpoint is unharmed."
    )
