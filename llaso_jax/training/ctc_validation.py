"""Validation of a stage with objective ctc: what the audio frames of held-out records say by themselves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llaso_jax.data.config import DataConfig
from llaso_jax.data.samples import Sample, SampleLoader
from llaso_jax.evaluation.metrics.error_rate import symbol_errors
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import Params, bind, flatten
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.modeling.token_ctc import BLANK as BLANK_TOKEN
from llaso_jax.modeling.token_ctc import CTCConfig, read
from llaso_jax.sharding.rules import use_rules
from llaso_jax.training.objective import BLANK, model_part, own_part
from llaso_jax.training.state import Layout
from llaso_jax.training.validation import HeldOutSet, Report


class CTCValidator:
    """Reads held-out records by greedy CTC: the likeliest token of the whole vocabulary, or blank, at every frame.

    Raises:
      DataError: see `HeldOutSet`.
    """

    def __init__(
        self,
        cfg: SpeechLMConfig,
        compute: ComputeConfig,
        layout: Layout,
        data: DataConfig,
        loader: SampleLoader,
        tokenizer: Any,
        *,
        max_samples: int | None,
        ctc: CTCConfig,
    ) -> None:
        self._held_out = HeldOutSet(cfg, data, loader, max_samples=max_samples, whole=True)
        self._layout, self._tokenizer = layout, tokenizer
        self._read = _reader(cfg, compute, layout, ctc)

    def __call__(self, params: Params) -> Report:
        """Validate `params`: the model's, and the objective's own."""
        heard: dict[int, list[int]] = {}
        total, labels, unaligned = 0.0, 0, 0
        for rows, arrays in self._held_out.batches(self._layout):
            sums, reading = jax.device_get(self._read(params, arrays))
            total += float(sums.rows.sum(dtype=np.float64))
            labels, unaligned = labels + int(sums.labels), unaligned + int(sums.unaligned)
            for row, tokens, segments in zip(rows, reading.tokens, reading.segments, strict=True):
                for segment, sample in enumerate(row.samples, 1):
                    heard[id(sample)] = collapse(tokens[segments == segment])
        samples = [item.sample for item in self._held_out.items]
        said = [heard[id(sample)] for sample in samples]
        errors = symbol_errors([label_tokens(sample) for sample in samples], said)
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
        return self._held_out.report(
            texts,
            loss=total / max(labels, 1),
            token_error_rate=float(errors.value()),
            unaligned=unaligned,
        )


def collapse(tokens: Sequence[int] | np.ndarray) -> list[int]:
    """What frames say: repetitions once, then without blanks.

    Example: with `_` for blank, [_, a, a, _, a, b] -> [a, a, b].
    """
    frames = np.asarray(tokens)
    new = np.diff(frames, prepend=BLANK_TOKEN) != 0
    return frames[new & (frames != BLANK_TOKEN)].tolist()


def label_tokens(sample: Sample) -> list[int]:
    """The tokens of a sample's answers without those that end a turn (modeling.ctc.label_places)."""
    return sample.answer_token[np.diff(sample.answer_index, append=-1) == 1].tolist()


@functools.lru_cache(maxsize=4)
def _reader(
    cfg: SpeechLMConfig, compute: ComputeConfig, layout: Layout, ctc: CTCConfig
) -> Callable:
    """Jitted `(params, batch [B, ...]) -> (CTCSums, Reading)`."""

    def run(params: Params, batch: dict[str, jax.Array]):
        with use_rules(layout.mesh, layout.rules):
            model = bind(cfg, model_part(params), compute)
            return read(model, flatten(own_part(params))[BLANK], batch, ctc)

    return jax.jit(run, out_shardings=layout.replicated)
