"""Generate for any number of prompts: batches of one size and similar length, results in order."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from jax.sharding import Mesh

from llaso_jax.data.samples import Sample
from llaso_jax.inference.decoding import generate_tokens
from llaso_jax.inference.prompts import bucket, collate, layout_of
from llaso_jax.inference.sampling import GenerationConfig
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import Params
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.rules import FSDP_TENSOR, ShardingRules

WINDOW = 16  # batches sorted by length together


def generate_samples(
    cfg: SpeechLMConfig,
    params: Params,
    samples: Iterable[Sample],
    generation: GenerationConfig,
    *,
    batch_rows: int,
    window: int = WINDOW,
    compute: ComputeConfig | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules = FSDP_TENSOR,
) -> Iterator[list[int]]:
    """The new token ids of every prompt, in input order, the end token included where one came.

    Prompts are read `window` batches at a time and sorted by length within them; every batch has
    `batch_rows` rows (the last is filled up with empty ones) and a rounded length, so few programs are
    compiled. A prompt's tokens do not depend on the batch it fell into.

    Args:
      samples: prompts (`prompt_sample`, or `Sample.prompt()`), read as they are needed.
      batch_rows: prompts per batch; on a mesh best a multiple of its data times fsdp size.
      (others): see `generate_tokens`.
    """
    layout = layout_of(cfg)
    source = iter(samples)
    while held := list(islice(source, batch_rows * window)):
        results: dict[int, list[int]] = {}
        order = sorted(range(len(held)), key=lambda i: _size(held[i]))
        for start in range(0, len(order), batch_rows):
            numbers = order[start : start + batch_rows]
            batch = collate([held[i] for i in numbers], layout=layout, rows=batch_rows)
            new = generate_tokens(
                cfg, params, batch, generation, compute=compute, mesh=mesh, rules=rules
            )
            for i, tokens, length in zip(numbers, new.tokens, new.lengths, strict=False):
                results[i] = tokens[:length].tolist()
        yield from (results[i] for i in range(len(held)))


def _size(sample: Sample) -> tuple[int, int, int, int]:
    longest = int(np.max(sample.mel_frames, initial=0))
    return len(sample.mels), bucket(longest), bucket(len(sample.tokens)), len(sample.tokens)
