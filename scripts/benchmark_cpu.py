"""Speed on a CPU beside PyTorch: the same weights and inputs on both sides, outputs checked equal first.

python scripts/benchmark_cpu.py [--repeats 10] [--cases encoder decoder align ...] [--no-compile] [--force]

Layers have the sizes of LLaSO-Base (Whisper-large-v3, Llama-3.2-3B) and are few: 2 of 32 and 2 of 28, with a 14th
of the vocabulary, so that layers and output head keep their proportions. Sides run in turn in one process with
two threads; a row gives the median and the least and most milliseconds, and how much faster we are in the same dtype.
torch runs eagerly, compiled, and in bfloat16; we in f32, and in bfloat16 where nothing is generated.

  encoder   Whisper encoder, one 30 s clip, forward
  decoder   Llama layers over 512 embeddings, forward
  align     the same and the gradient with respect to the embeddings: stage 1, weights frozen
  step      stage 1 end to end in `padded` mode: mel to AdamW, 1560 positions, 30 answers; torch as upstream does
            it, with logits at every position
  short     the same for a 9 s clip: ours in `true_length` mode, torch on 30 s as upstream pads it. The encoder
            sees different inputs by design, so outputs are not compared here
  decode    64 greedy tokens after a prompt of 32, 8 layers of width 1024; transformers' generate
"""

import argparse
import copy
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

CASES = ("encoder", "decoder", "align", "step", "short", "decode")
THREADS = 2
LAYERS = 2
F32_APART, BF16_APART = 1e-4, 0.05  # most that outputs may differ, over the largest
VOCABULARY = 128_256 * LAYERS // 28
PROMPT, ANSWERS = 30, 30
FRAMES_30_S, MEL_30_S = 1500, 3000
FRAMES_9_S, MEL_9_S = 450, 900


@dataclasses.dataclass(frozen=True)
class Case:
    """Sides by name, in the order they run; `checks` give how far ours of a dtype is from torch's f32."""

    sides: dict[str, Callable[[], Any]]
    checks: dict[str, Callable[[], float]]
    goal: float


def main() -> None:
    """Print one row per case and side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--force", action="store_true", help="run on a machine that is busy")
    args = parser.parse_args()
    load = start(force=args.force)
    print(f"{args.repeats} repeats, {THREADS} threads, load average before: {load:.2f}")
    print("| case | side | ms: median (least to most) | ours is faster by | goal |")
    print("|---|---|---|---|---|")
    makers = {
        "encoder": encoder_case,
        "decoder": decoder_case,
        "align": align_case,
        "step": step_case,
        "short": short_case,
        "decode": decode_case,
    }
    for name in args.cases:
        case = makers[name](compiled=not args.no_compile)
        for dtype, check in case.checks.items():
            apart, allowed = check(), F32_APART if dtype == "f32" else BF16_APART
            if apart > allowed:
                raise SystemExit(f"{name}, {dtype}: outputs are {apart:.1e} apart, not comparable")
            print(f"{name}, {dtype}: {apart:.1e} of the largest apart", file=sys.stderr)
        report(name, case, measure(case, args.repeats))


def start(*, force: bool) -> float:
    """Give torch its threads and a seed; the load average.

    Raises:
      SystemExit: the machine is busy, and that is not to be ignored by `force`.
    """
    load = os.getloadavg()[0]
    if load > 0.3 and not force:
        raise SystemExit(f"the load average is {load:.1f}: wait for a quiet machine, or --force")
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # before torch makes its pool
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    return load


def measure(case: Case, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every side, run in turn; the first run of each is not counted."""
    for run in case.sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in case.sides}
    for _ in range(repeats):
        for name, run in case.sides.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def report(name: str, case: Case, times: dict[str, list[float]]) -> None:
    """Rows of one case; torch is compared with ours of the same dtype, or of f32 if there is none."""
    medians = {side: statistics.median(spent) for side, spent in times.items()}
    for side, spent in times.items():
        faster = goal = ""
        if side.startswith("torch"):
            ours = medians.get(f"llaso_jax {side.split()[1]}", medians["llaso_jax f32"])
            faster = f"{medians[side] / ours:.2f}x"
        if side == "torch f32":
            goal = f"{case.goal}x"
        print(
            f"| {name} | {side} | {medians[side]:.0f} ({min(spent):.0f} to {max(spent):.0f}) | {faster} | {goal} |",
            flush=True,
        )


# --- torch's side ---------------------------------------------------------------------------------


def torch_llama(**sizes: Any) -> Any:
    """A random Llama with the layers of Llama-3.2-3B, unless `sizes` say others."""
    import transformers

    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            **sizes,
        }
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def torch_whisper(layers: int = LAYERS, d_model: int = 1280, heads: int = 20) -> Any:
    """A random Whisper encoder with the layers of large-v3."""
    import transformers

    config = transformers.WhisperConfig(
        num_mel_bins=128,
        d_model=d_model,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * d_model,
        decoder_layers=1,
        decoder_attention_heads=heads,
    )
    return transformers.WhisperModel(config).eval().requires_grad_(False)


def torch_projector(d_in: int, d_out: int) -> Any:
    """LLaSO's projector."""
    import torch

    return torch.nn.Sequential(
        torch.nn.Linear(d_in, d_out), torch.nn.GELU(), torch.nn.Linear(d_out, d_out)
    )


def variants(make: Callable[[Any], Callable[[], Any]], module: Any, *, compiled: bool) -> dict:
    """`make(module)` for the module in f32, compiled, and in bfloat16."""
    import torch

    sides = {"torch f32": make(module)}
    if compiled:
        sides["torch f32 compiled"] = make(torch.compile(module))
    sides["torch bf16"] = make(copy.deepcopy(module).to(torch.bfloat16))
    return sides


# --- our side -------------------------------------------------------------------------------------


def converted(whisper: Any, llama: Any, projector: Any, **options: Any) -> tuple[Any, Any]:
    """Architecture and parameters of the torch modules, through the converter."""
    from pathlib import Path

    from llaso_jax.conversion import gather_weights, load_params
    from llaso_jax.conversion.source import Source
    from llaso_jax.conversion.tensors import Tensor, array_tensor

    def source(kind: Any, state: dict, config: Any) -> Source:
        tensors: dict[str, Tensor] = {
            name: array_tensor(value.numpy()) for name, value in state.items()
        }
        return Source(Path(kind), kind, "memory", tensors, config, ())

    side_file = {f"projector.{k}": v.detach() for k, v in projector.state_dict().items()}
    weights = gather_weights(
        source("whisper", dict(whisper.state_dict()), whisper.config.to_dict()),
        source("llama", dict(llama.state_dict()), llama.config.to_dict()),
        source("projector", side_file, {}),
        **options,
    )
    return weights.cfg, load_params(weights)


def our_sides(make: Callable[[Any, Any], Callable[[], Any]], params: Any) -> dict:
    """`make(compute, params)` in f32 and in bfloat16."""
    import jax

    from llaso_jax.modeling.compute import ComputeConfig

    low = ComputeConfig(dtype="bfloat16")
    cast = jax.tree.map(lambda value: value.astype(low.jnp_dtype), params)
    return {"llaso_jax f32": make(ComputeConfig(), params), "llaso_jax bf16": make(low, cast)}


def checks_of(sides: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], float]]:
    """How far the outputs of our sides are from torch's in f32."""

    def check(dtype: str) -> Callable[[], float]:
        return lambda: relative(sides[f"llaso_jax {dtype}"](), sides["torch f32"]())

    return {dtype: check(dtype) for dtype in ("f32", "bf16")}


def relative(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest entry."""
    import numpy as np

    ours, theirs = np.asarray(ours, np.float32), theirs.detach().float().numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# --- the cases ------------------------------------------------------------------------------------


def encoder_case(*, compiled: bool) -> Case:
    """Forward pass of the encoder."""
    import jax
    import torch

    from llaso_jax.modeling.functional import bind

    whisper = torch_whisper()
    small = torch_llama(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    cfg, params = converted(whisper, small, torch_projector(1280, 64))
    mel = torch.randn(1, 128, MEL_30_S)

    def make(encoder: Any) -> Callable[[], Any]:
        given = mel.to(next(encoder.parameters()).dtype)

        @torch.inference_mode()
        def run() -> Any:
            return encoder(given).last_hidden_state

        return run

    def ours(compute: Any, params: Any) -> Callable[[], Any]:
        given = mel.numpy().astype(compute.jnp_dtype)
        encode = jax.jit(lambda p, m: bind(cfg, p, compute).audio_tower(m)[0])
        return lambda: encode(params, given).block_until_ready()

    sides = variants(make, whisper.encoder, compiled=compiled) | our_sides(ours, params)
    return Case(sides, checks_of(sides), 1.0)


def _decoder(positions: int = 512) -> tuple[Any, Any, Any, Any, Any]:
    """Torch's layers, our architecture and parameters, embeddings, and weights of a sum of the outputs."""
    import torch

    llama = torch_llama()
    tiny = torch_whisper(1, 64, 2)
    cfg, params = converted(tiny, llama, torch_projector(64, 3072))
    return (
        llama.model,
        cfg,
        params,
        torch.randn(1, positions, 3072),
        torch.randn(1, positions, 3072),
    )


def decoder_case(*, compiled: bool) -> Case:
    """Forward pass of decoder layers."""
    import jax
    import jax.numpy as jnp
    import torch

    from llaso_jax.modeling.functional import bind

    model, cfg, params, x, _ = _decoder()

    def make(model: Any) -> Callable[[], Any]:
        given = x.to(next(model.parameters()).dtype)

        @torch.inference_mode()
        def run() -> Any:
            return model(inputs_embeds=given, use_cache=False).last_hidden_state

        return run

    positions = jnp.arange(x.shape[1])[None]

    def ours(compute: Any, params: Any) -> Callable[[], Any]:
        given = x.numpy().astype(compute.jnp_dtype)
        forward = jax.jit(
            lambda p, x: bind(cfg, p, compute).language_model(x, positions, positions * 0 + 1)[0]
        )
        return lambda: forward(params, given).block_until_ready()

    sides = variants(make, model, compiled=compiled) | our_sides(ours, params)
    return Case(sides, checks_of(sides), 1.1)


def align_case(*, compiled: bool) -> Case:
    """Decoder layers and the gradient with respect to their input."""
    import jax
    import jax.numpy as jnp

    from llaso_jax.modeling.functional import bind

    model, cfg, params, x, weight = _decoder()

    def make(model: Any) -> Callable[[], Any]:
        dtype = next(model.parameters()).dtype
        given, scale = x.clone().to(dtype).requires_grad_(True), weight.to(dtype)

        def run() -> Any:
            given.grad = None
            out = model(inputs_embeds=given, use_cache=False).last_hidden_state
            (out * scale).sum().backward()
            return given.grad

        return run

    positions = jnp.arange(x.shape[1])[None]

    def ours(compute: Any, params: Any) -> Callable[[], Any]:
        given, scale = (array.numpy().astype(compute.jnp_dtype) for array in (x, weight))

        def objective(x: Any, p: Any, scale: Any) -> Any:
            out = bind(cfg, p, compute).language_model(x, positions, positions * 0 + 1)[0]
            return (out * scale).astype(jnp.float32).sum()

        gradient = jax.jit(jax.grad(objective))
        return lambda: gradient(given, params, scale).block_until_ready()

    sides = variants(make, model, compiled=compiled) | our_sides(ours, params)
    return Case(sides, checks_of(sides), 1.2)


class UpstreamStep:
    """A stage-1 step as upstream's trainer runs it: 1500 positions a clip, logits everywhere."""

    def __init__(self, whisper: Any, projector: Any, llama: Any, ids: Any, mel: Any) -> None:
        import torch

        self.whisper, self.projector, self.llama = whisper, projector, llama
        dtype = next(llama.parameters()).dtype
        self.mel, self.ids = mel.to(dtype), ids
        self.labels = torch.full((1, len(ids) + FRAMES_30_S), -100)
        self.labels[0, -ANSWERS:] = ids[-ANSWERS:]
        self.optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, fused=True)

    def __call__(self) -> Any:
        import torch

        with torch.no_grad():
            features = self.whisper.encoder(self.mel).last_hidden_state
            text = self.llama.get_input_embeddings()(self.ids)[None]
        audio = self.projector(features)
        x = torch.cat([text[:, :PROMPT], audio, text[:, PROMPT:]], dim=1)
        loss = self.llama(inputs_embeds=x, labels=self.labels, use_cache=False).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def _step_sides(*, compiled: bool, audio_mode: str) -> dict[str, Callable[[], Any]]:
    """Torch's steps on 30 s, and ours on 30 s or, in `true_length` mode, on 9 s; all from equal weights."""
    import torch

    whisper, llama, projector = torch_whisper(), torch_llama(), torch_projector(1280, 3072)
    ids = torch.randint(1, VOCABULARY, (PROMPT + ANSWERS,))
    mel = torch.randn(1, 128, MEL_30_S)
    cfg, params = converted(whisper, llama, projector, audio_mode=audio_mode)
    modules = (whisper, projector, llama)
    sides: dict[str, Callable[[], Any]] = {
        "torch f32": UpstreamStep(*copy.deepcopy(modules), ids, mel)
    }
    if compiled:
        own = copy.deepcopy(modules)
        sides["torch f32 compiled"] = UpstreamStep(
            own[0], torch.compile(own[1]), torch.compile(own[2]), ids, mel
        )
        sides["torch f32 compiled"].whisper.encoder.compile()  # pyright: ignore[reportFunctionMemberAccess]
    low = [module.to(torch.bfloat16) for module in copy.deepcopy(modules)]
    sides["torch bf16"] = UpstreamStep(low[0], low[1], low[2], ids, mel)
    short = audio_mode == "true_length"
    data = ids.numpy(), mel.numpy()
    for name, dtype in (("f32", "float32"), ("bf16", "bfloat16")):
        sides[f"llaso_jax {name}"] = our_step(cfg, params, *data, short=short, dtype=dtype)
    return sides


def our_step(
    cfg: Any, params: Any, ids: Any, mel: Any, *, short: bool, dtype: Any
) -> Callable[[], Any]:
    """Our training step on one row, state carried from call to call; frozen weights are of the compute dtype."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llaso_jax.modeling.compute import ComputeConfig
    from llaso_jax.modeling.functional import abstract_params
    from llaso_jax.sharding.mesh import make_mesh
    from llaso_jax.training.optimizer import (
        OptimizerConfig,
        ParameterRule,
        learning_rate_scales,
        make_optimizer,
    )
    from llaso_jax.training.state import Layout, create_state, split_params
    from llaso_jax.training.step import make_train_step, place_batch

    frames, mel_frames = (FRAMES_9_S, MEL_9_S) if short else (FRAMES_30_S, MEL_30_S)
    length = len(ids) + frames
    layout = Layout.of(cfg, make_mesh("1x1", devices=jax.devices()[:1]))
    rules = (ParameterRule("projector/.*"), ParameterRule(".*", None))
    scales = learning_rate_scales(abstract_params(cfg), rules)
    # As torch's AdamW: nothing is clipped, decay 0.01.
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1e9, weight_decay=0.01), scales)
    params = jax.tree.map(jnp.copy, params)  # a step donates its state
    trainable, frozen = split_params(params, scales, dtype, layout)
    state = create_state(trainable, optimizer, layout)
    step = make_train_step(cfg, ComputeConfig(dtype=dtype), optimizer, trainable, layout)
    at = np.concatenate([np.arange(PROMPT), np.arange(PROMPT + frames, length)])
    tokens, slots = np.zeros(length, np.int32), np.full(length, -1, np.int32)
    tokens[at] = ids
    slots[PROMPT : PROMPT + frames] = np.arange(frames)
    rows = {
        "tokens": tokens,
        "audio_slot": slots,
        "positions": np.arange(length, dtype=np.int32),
        "segment_ids": np.ones(length, np.int32),
        "mel": mel[..., :mel_frames],
        "mel_frames": np.array([mel_frames], np.int32),
        "answer_index": np.arange(length - ANSWERS - 1, length - 1, dtype=np.int32),
        "answer_token": ids[-ANSWERS:].astype(np.int32),
    }
    batch = place_batch({name: array[None] for name, array in rows.items()}, 1, layout)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, frozen, batch, np.float32(1e-3))
        return metrics.loss.block_until_ready()

    return run


def step_case(*, compiled: bool) -> Case:
    """The whole step in `padded` mode; losses of the first two steps must agree."""
    sides = _step_sides(compiled=compiled, audio_mode="padded")

    def losses(side: str) -> list[float]:
        return [float(sides[side]()) for _ in range(2)]

    def apart(dtype: str) -> float:
        pairs = zip(losses(f"llaso_jax {dtype}"), theirs, strict=True)
        return max(abs(ours - their) / their for ours, their in pairs)

    theirs = losses("torch f32")
    return Case(sides, {"f32": lambda: apart("f32"), "bf16": lambda: apart("bf16")}, 1.35)


def short_case(*, compiled: bool) -> Case:
    """The whole step on 9 s of audio."""
    sides = _step_sides(compiled=compiled, audio_mode="true_length")
    return Case(sides, {}, 5.0)


def decode_case(*, compiled: bool) -> Case:
    """Greedy decoding."""
    import jax.numpy as jnp
    import numpy as np
    import torch

    from llaso_jax.inference.decoding import generate_tokens
    from llaso_jax.inference.sampling import GenerationConfig

    new = 64
    llama = torch_llama(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    cfg, params = converted(torch_whisper(1, 64, 2), llama, torch_projector(64, 1024))
    ids = torch.randint(1, 32_000, (1, 32))

    def make(model: Any) -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> Any:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
            return out[:, ids.shape[1] :]

        return run

    batch = {
        "tokens": ids.numpy().astype(np.int32),
        "positions": np.arange(32, dtype=np.int32)[None],
        "segment_ids": np.ones((1, 32), np.int32),
    }
    settings = GenerationConfig(max_new_tokens=new, eos_token_id=(), pad_token_id=0)
    run = lambda: jnp.asarray(generate_tokens(cfg, params, batch, settings).tokens)  # noqa: E731
    sides = variants(make, llama, compiled=False)
    differ = lambda: float((np.asarray(run()) != sides["torch f32"]().numpy()).mean())  # noqa: E731
    return Case({**sides, "llaso_jax f32": run}, {"f32": differ}, 1.5)


if __name__ == "__main__":
    main()
