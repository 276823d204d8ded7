"""A recipe small enough to train in seconds: a two-layer model, the byte tokenizer, a corpus of tones."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import pytest
import soundfile as sf
import yaml
from data_corpus import PROMPT, ask, byte_tokenizer
from reference import _PLAIN, random_params
from rich.console import Console

from llaso_jax.config import RunConfig, parse_config, to_tree
from llaso_jax.data.batch import Batch
from llaso_jax.data.pipeline import make_pipeline
from llaso_jax.inference.prompts import layout_of
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import Params, abstract_params, flatten, merge, unflatten
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.training.objective import NextToken, Objective
from llaso_jax.training.optimizer import (
    OptimizerConfig,
    ParameterRule,
    learning_rate_scales,
    make_optimizer,
)
from llaso_jax.training.run import RunResult, train
from llaso_jax.training.state import Layout, TrainState, create_state, split_params, zero_params
from llaso_jax.training.step import StepMetrics, TrainStep, make_train_step, place_batch

EVERYTHING = ({"pattern": ".*"},)
PROJECTOR = (
    {"pattern": "projector/.*"},
    {"pattern": ".*", "learning_rate_scale": None},
)
PROJECTOR_AND_DECODER = (
    {"pattern": "(projector|language_model)/.*"},
    {"pattern": "audio_tower/.*", "learning_rate_scale": None},
)
HELD_OUT = 7
OPTIMIZER = OptimizerConfig(weight_decay=0.01)
FLOAT32 = ComputeConfig()
NEXT_TOKEN = NextToken()
# Compiles in a third of the time; for programs that run a few steps.
_jit = functools.partial(jax.jit, compiler_options=_PLAIN)
# Every axis that is split divides by 8 (fsdp) and by 4 (tensor).
MODEL = {
    "audio_mode": "true_length",
    "audio": {
        "num_mel_bins": 8,
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "max_source_positions": 32,
        "init_std": None,
    },
    "projector": {"type": "mlp2x_gelu", "stack": 5},
    "text": {
        "vocab_size": 264,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "initializer_range": None,
    },
}


def write_inputs(folder: Path, *, samples: int = 40) -> None:
    """A tokenizer, a corpus and a held-out file under `folder`: `samples` short tones, one sample each."""
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    corpus = folder / "corpus"
    corpus.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for i in range(samples):
        wave = np.sin(np.arange(rng.integers(1600, 7200)) * (0.05 + 0.01 * i))
        sf.write(corpus / f"{i}.wav", 0.5 * wave, 16_000)
        answer = "abcdefghijkl"[: 1 + i % 12]
        entries.append(ask("Say<audio>", answer, [f"{i}.wav"], id=f"s{i}"))
    (corpus / "train.json").write_text(json.dumps(entries))
    metadata = (
        {"task": "ASR", "metric": "wer"},
        {"task": "EE", "metric": "accuracy", "labels": ["red", "green", "blue", "grey"]},
        {"task": "SGC", "metric": "accuracy", "labels": ["male", "female"]},
    )
    held_out = [
        {**entry, "id": f"held-{i}", "metadata": metadata[i % 3]}
        for i, entry in enumerate(entries[:HELD_OUT])
    ]
    (corpus / "eval.json").write_text(json.dumps(held_out))


@pytest.fixture(scope="module", name="folder")
def inputs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs of `recipe`, for the module that imports this."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def recipe(folder: Path, *, stages: tuple[dict[str, Any], ...] = ({},), **changes: Any) -> dict:
    """The recipe as a tree; `stages` and their `data` change fields of a small default stage."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "tokenizer": str(folder / "tokenizer"),
        "model": MODEL,
        "prompt": dataclasses.asdict(PROMPT),
        "checkpoint": {"every_steps": 1000, "keep_latest": 100, "export_hf": False},
        "logging": {"every_steps": 1, "tensorboard": False},
        **changes,
    }
    tree["stages"] = []
    for number, stage in enumerate(stages):
        data = {
            "train_json": [str(folder / "corpus" / "train.json")],
            "sequence_length": 112,
            "rows": 8,
            "chunks_per_row": 2,
            "answers_per_row": 24,
            "mel_buckets": [50],
            "epochs": None,
            "window": 20,
            "num_threads": 2,
            **stage.get("data", {}),
        }
        defaults = {
            "name": ("align", "instruct", "third")[number],
            "parameters": list(EVERYTHING),
            "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.1, "weight_decay": 0.01},
            "max_steps": 4,
        }
        tree["stages"].append({**defaults, **stage, "data": data})
    return tree


def write_recipe(folder: Path, tree: dict, name: str = "tiny.yaml") -> Path:
    """The recipe as a file."""
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def run(tree: dict, output: Path, *, mesh: str = "1x1", **options: Any) -> RunResult:
    """Train the recipe without drawing on the terminal."""
    cfg = parse_config(RunConfig, json.loads(json.dumps(tree)))
    return train(cfg, mesh=mesh, output=output, console=Console(quiet=True), **options)


def records(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Every line of metrics.jsonl of one kind, in the order of writing."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def losses(output: Path) -> dict[tuple[str, int], float]:
    """Training loss by stage and step, the newest where a step was done twice."""
    return {(r["stage"], r["step"]): r["loss"] for r in records(output)}


@contextmanager
def compilation_cache(folder: Path, *, plain: bool = True) -> Iterator[None]:
    """Compile a program once, however many runs of it there are; `plain`: and in a third of the time."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        with patch.object(jax, "jit", _jit) if plain else nullcontext():
            yield
    finally:
        _configure(before)


@pytest.fixture(scope="module", autouse=True, name="compile_once")
def shared_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`compilation_cache` around all tests of the module that imports this."""
    with compilation_cache(tmp_path_factory.mktemp("compiled")):
        yield


def _configure(settings: dict[str, Any]) -> None:
    from jax.experimental.compilation_cache import compilation_cache as cache

    for name, value in settings.items():
        jax.config.update(name, value)
    cache.reset_cache()


def read_batches(cfg: RunConfig, count: int) -> list[Batch]:
    """The first batches of a recipe's first stage, through the real pipeline."""
    assert cfg.model is not None
    stage = cfg.stages[0]
    pipeline = make_pipeline(
        stage.data,
        split="train",
        tokenizer=byte_tokenizer(),
        layout=layout_of(cfg.model),
        prompt=cfg.prompt,
    )
    iterator = iter(pipeline)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


@dataclasses.dataclass
class Trainer:
    """The training step of a model on a mesh, with the state it has come to."""

    state: TrainState
    frozen: Params
    step: TrainStep
    layout: Layout
    accumulation: int

    def __call__(self, arrays: dict[str, np.ndarray], learning_rate: float = 1e-2) -> StepMetrics:
        """One step on a host batch."""
        placed = place_batch(arrays, self.accumulation, self.layout)
        self.state, metrics = self.step(self.state, self.frozen, placed, np.float32(learning_rate))
        return metrics

    def trained(self) -> dict[str, np.ndarray]:
        """Trained parameters on the host, by path."""
        return {path: np.asarray(leaf) for path, leaf in flatten(self.state.trainable).items()}


def trainer(
    model: SpeechLMConfig,
    *,
    mesh: str = "1x1",
    rules: tuple = EVERYTHING,
    accumulation: int = 1,
    optimizer: OptimizerConfig = OPTIMIZER,
    frozen_dtype: str = "float32",
    compute: ComputeConfig = FLOAT32,
    objective: Objective = NEXT_TOKEN,
) -> Trainer:
    """Everything `StageRun` puts together, without files."""
    layout, scales, update, step = _program(
        model, mesh, tuple(ParameterRule(**rule) for rule in rules), optimizer, compute, objective
    )
    start = random_params(unflatten(abstract_params(model)))
    start = jax.device_put(start, layout.nested(start))
    trainable, frozen = split_params(start, scales, frozen_dtype, layout)
    with patch.object(jax, "jit", _jit):
        own = zero_params(objective.own_params(model), layout)
        state = create_state(merge(trainable, own), update, layout)
    return Trainer(state, frozen, step, layout, accumulation)


@functools.cache
def _program(
    model: SpeechLMConfig,
    mesh: str,
    rules: tuple[ParameterRule, ...],
    optimizer: OptimizerConfig,
    compute: ComputeConfig,
    objective: Objective,
) -> tuple[Layout, dict[str, float | None], Any, TrainStep]:
    """What is the same for all trainers of one kind: they share compiled steps."""
    own = objective.own_params(model)
    layout = Layout.of(model, make_mesh(mesh)).beside(own)
    infos = abstract_params(model) | own
    scales = learning_rate_scales(abstract_params(model), rules) | dict.fromkeys(own, 1.0)
    update = make_optimizer(optimizer, scales)
    trainable = unflatten({p: infos[p] for p, scale in scales.items() if scale is not None})
    with patch.object(jax, "jit", _jit):
        step = make_train_step(model, compute, update, trainable, layout, objective=objective)
    return layout, scales, update, step


def config(tree: dict) -> RunConfig:
    """A recipe tree, validated."""
    cfg = parse_config(RunConfig, json.loads(json.dumps(tree)))
    assert to_tree(cfg)["name"] == tree["name"]
    return cfg
