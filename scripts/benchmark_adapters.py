"""Speed of a LoRA step on a CPU beside PyTorch: the second stage of configs/mini_align.yaml on both sides.

python scripts/benchmark_adapters.py [--repeats 5] [--layers 30] [--force]

The decoder has the sizes of SmolLM2-135M, LoRA of rank 16 on all of its linear layers; projector and adapters learn by
AdamW, clipped to norm 1. Both sides get the same 15 clips of 1 to 9 seconds, encoded before, and the same weights; the
losses of two steps must agree. Torch runs peft on transformers' model, with logits at supervised positions only, on
a row for each clip, padded to the longest, and on our packed rows with a mask; eagerly, in f32 and in bfloat16.
Sides run in turn in one process with two threads. A row gives samples a second and core, at the median step and at
the slowest and quickest.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmark_cpu import (
    THREADS,
    Case,
    converted,
    measure,
    start,
    torch_llama,
    torch_projector,
    torch_whisper,
)

CLIPS, ROWS, LENGTH, CHUNKS, ANSWERS_PER_ROW = 15, 4, 384, 6, 64
BEFORE, AFTER, ANSWER = (
    18,
    7,
    15,
)  # tokens of a prompt before and after the audio, and of its answer
STACK, WIDTH, FRAMES = 4, 384, 500  # of the encoder: stacked frames, features, frames of a chunk
SLOTS = FRAMES // STACK
RANK = 16
LEARNING_RATE = 7e-4
F32_APART, BF16_APART = 1e-4, 0.02


class Clip(NamedTuple):
    """ids: of the prompt before and after the audio, and of the answer; features: [slots * STACK, WIDTH]."""

    before: Any
    after: Any
    answer: Any
    features: Any

    @property
    def slots(self) -> int:
        """Positions of the audio."""
        return len(self.features) // STACK

    @property
    def length(self) -> int:
        """Positions of all."""
        return len(self.before) + self.slots + len(self.after) + len(self.answer)


def main() -> None:
    """Print one row per side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--force", action="store_true", help="run on a machine that is busy")
    args = parser.parse_args()
    load = start(force=args.force)
    sides = make_sides(args.layers)
    (_, first), *others = sides.items()
    expected = [float(first()) for _ in range(2)]
    for name, run in others:
        apart = max(abs(float(run()) - loss) / loss for loss in expected)  # a step each
        if apart > (F32_APART if "f32" in name else BF16_APART):
            raise SystemExit(f"{name}: losses are {apart:.1e} apart, not comparable")
        print(f"{name}: losses of two steps are {apart:.1e} apart", file=sys.stderr)
    times = measure(Case(sides, {}, 0.0), args.repeats)
    print(
        f"{args.repeats} repeats, {THREADS} threads, {CLIPS} clips a step, load before: {load:.2f}"
    )
    print("| side | seconds a step: median (least to most) | samples a second and core |")
    print("|---|---|---|")
    for name, spent in times.items():
        seconds = [t / 1e3 for t in spent]
        median = statistics.median(seconds)
        print(
            f"| {name} | {median:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {CLIPS / median / THREADS:.2f} |"
        )


def make_sides(layers: int) -> dict[str, Callable[[], Any]]:
    """Steps by name; each returns its loss, before its update."""
    import torch

    llama = torch_llama(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    projector = torch_projector(WIDTH * STACK, 576)
    cfg, params = converted(
        torch_whisper(1, WIDTH, 6), llama, projector, audio_mode="true_length", stack=STACK
    )
    clips = make_clips()
    together = laid_out(packed(clips), LENGTH)
    apart = laid_out([[clip] for clip in clips], max(clip.length for clip in clips))
    ours = {
        f"llaso_jax {name}": our_step(cfg, params, together, dtype)
        for name, dtype in (("f32", "float32"), ("bf16", "bfloat16"))
    }
    first = ours["llaso_jax f32"].adapters  # pyright: ignore[reportFunctionMemberAccess]
    theirs = {
        f"torch {name}, {rows}": TorchStep(
            copy.deepcopy(projector), copy.deepcopy(llama), first, batch, dtype
        )
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))
        for rows, batch in (("padded", apart), ("packed", together))
    }
    return theirs | ours


def make_clips() -> list[Clip]:
    """Clips of 1 to 9 seconds, 12.5 positions a second."""
    import numpy as np

    draw = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return draw.integers(1, 49_000, count).astype(np.int32)

    return [
        Clip(
            ids(BEFORE),
            ids(AFTER),
            ids(ANSWER),
            draw.standard_normal((slots * STACK, WIDTH)).astype(np.float32),
        )
        for slots in draw.integers(12, 80, CLIPS)
    ]


def packed(clips: list[Clip]) -> list[list[Clip]]:
    """Clips of each row, first fit."""
    rows: list[list[Clip]] = [[] for _ in range(ROWS)]
    for clip in clips:
        row = next(
            row
            for row in rows
            if sum(c.length for c in row) + clip.length <= LENGTH
            and len(row) < min(CHUNKS, ANSWERS_PER_ROW // ANSWER)
        )
        row.append(clip)
    return rows


def laid_out(rows: list[list[Clip]], length: int) -> dict[str, Any]:
    """The batch contract, with features in the place of mel."""
    import numpy as np

    batch: dict[str, Any] = {
        "tokens": np.zeros((len(rows), length), np.int32),
        "audio_slot": np.full((len(rows), length), -1, np.int32),
        "positions": np.zeros((len(rows), length), np.int32),
        "segment_ids": np.zeros((len(rows), length), np.int32),
        "features": np.zeros((len(rows), CHUNKS, FRAMES, WIDTH), np.float32),
        "mel_frames": np.zeros((len(rows), CHUNKS), np.int32),
        "answer_index": np.full((len(rows), ANSWERS_PER_ROW), -1, np.int32),
        "answer_token": np.zeros((len(rows), ANSWERS_PER_ROW), np.int32),
    }
    for b, row in enumerate(rows):
        start = 0
        for number, clip in enumerate(row):
            audio = start + len(clip.before)
            text, end = audio + clip.slots, start + clip.length
            batch["tokens"][b, start:audio] = clip.before
            batch["tokens"][b, text:end] = [*clip.after, *clip.answer]
            batch["audio_slot"][b, audio:text] = number * SLOTS + np.arange(clip.slots)
            batch["positions"][b, start:end] = np.arange(clip.length)
            batch["segment_ids"][b, start:end] = number + 1
            batch["features"][b, number, : len(clip.features)] = clip.features
            batch["mel_frames"][b, number] = 2 * len(clip.features)
            places = slice(number * ANSWER, (number + 1) * ANSWER)
            batch["answer_index"][b, places] = np.arange(end - ANSWER - 1, end - 1)
            batch["answer_token"][b, places] = clip.answer
            start = end
    return batch


# --- torch's side ---------------------------------------------------------------------------------


class TorchStep:
    """A step on a batch whose rows have one clip, or several with a mask between them."""

    def __init__(
        self,
        projector: Any,
        llama: Any,
        adapters: dict[str, Any],
        batch: dict[str, Any],
        dtype: Any,
    ) -> None:
        import peft
        import torch

        config = peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", bias="none"
        )
        self.llama = peft.get_peft_model(llama, config).to(dtype)
        for name, weight in self.llama.named_parameters():
            if "lora_A" in name:
                weight.data.copy_(torch.tensor(adapters[name[name.index("layers.") :]]))
        self.projector = projector.to(dtype)
        self.dtype = dtype
        self._take(batch)
        self.trained = [
            *self.projector.parameters(),
            *(p for p in self.llama.parameters() if p.requires_grad),
        ]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )

    def _take(self, batch: dict[str, Any]) -> None:
        """Torch's form of the batch contract: flat places of audio and answers, a mask between clips."""
        import torch

        given = {name: torch.tensor(array) for name, array in batch.items()}
        slots, answers, segment = (
            given[name] for name in ("audio_slot", "answer_index", "segment_ids")
        )
        row = torch.arange(len(slots))[:, None]
        self.ids, self.positions = given["tokens"], given["positions"]
        self.heard = (slots >= 0).flatten().nonzero()[:, 0]
        stacked = given["features"].view(len(slots), -1, STACK * WIDTH)
        self.features = stacked[row.expand_as(slots)[slots >= 0], slots[slots >= 0]].to(self.dtype)
        self.answers = (answers + row * slots.shape[1])[answers >= 0]
        self.labels = given["answer_token"][answers >= 0].long()
        same = (segment[:, None, :, None] == segment[:, None, None, :]).tril()
        self.mask = torch.zeros(same.shape, dtype=self.dtype).masked_fill(
            ~same, torch.finfo(self.dtype).min
        )

    def __call__(self) -> Any:
        import torch

        model: Any = self.llama.get_base_model()
        x = model.get_input_embeddings()(self.ids).flatten(0, 1)
        x = x.index_copy(0, self.heard, self.projector(self.features)).view(*self.ids.shape, -1)
        hidden = model.model(
            inputs_embeds=x,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[self.answers]).float()
        loss = torch.nn.functional.cross_entropy(logits, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.detach()


# --- our side -------------------------------------------------------------------------------------


def our_step(cfg: Any, params: Any, batch: dict[str, Any], dtype: Any) -> Callable[[], Any]:
    """The training step of the recipe. Its attribute `adapters` has the first lora_A by peft's names."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llaso_jax.config import load_config
    from llaso_jax.modeling.compute import ComputeConfig
    from llaso_jax.modeling.functional import abstract_params, flatten, merge
    from llaso_jax.sharding.mesh import make_mesh
    from llaso_jax.training.adapters import with_adapters
    from llaso_jax.training.optimizer import learning_rate_scales, make_optimizer
    from llaso_jax.training.state import Layout, create_state, random_params, split_params
    from llaso_jax.training.step import make_train_step, place_batch

    recipe = load_config("mini_align")
    stage = recipe.stages[-1]
    cfg = with_adapters(cfg, recipe.lora)
    layout = Layout.of(cfg, make_mesh("1x1", devices=jax.devices()[:1]))
    adapters = random_params(cfg, layout, 0, wanted=lambda path: "lora_" in path)
    params = merge(jax.tree.map(jnp.copy, params), adapters)  # a step donates its state
    scales = {
        path: None if scale is None else 1.0
        for path, scale in learning_rate_scales(abstract_params(cfg), stage.parameters).items()
    }
    optimizer = make_optimizer(stage.optimizer, scales)
    trainable, frozen = split_params(params, scales, dtype, layout)
    state = create_state(trainable, optimizer, layout)
    compute = ComputeConfig(dtype=dtype, remat=recipe.precision.remat)
    step = make_train_step(cfg, compute, optimizer, trainable, layout)
    placed = place_batch(batch, 1, layout)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, frozen, placed, np.float32(LEARNING_RATE))
        return metrics.loss.block_until_ready()

    run.adapters = {  # pyright: ignore[reportFunctionMemberAccess]
        f"layers.{layer}.{'.'.join(path.split('/')[2:4])}.lora_A.default.weight": np.asarray(
            stacked[layer]
        ).reshape(RANK, -1)
        for path, stacked in flatten(adapters).items()
        if path.endswith("lora_A/weight")
        for layer in range(len(stacked))
    }
    return run


if __name__ == "__main__":
    main()
