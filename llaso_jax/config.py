"""One validated, frozen configuration from a recipe (YAML) and command-line overrides.

    cfg = load_config("mini", ["stages.0.optimizer.learning_rate=2e-3"])

An unknown key is an error that names the nearest known one; a value of a wrong type, or one that a
dataclass refuses, is an error that names its key.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from llaso_jax.data.config import DataConfig
from llaso_jax.data.prompt import PromptConfig
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.compute import ComputeConfig, RematPolicy
from llaso_jax.modeling.kernels.attention.api import Implementation
from llaso_jax.modeling.lora import LoraRule
from llaso_jax.modeling.speech_lm import LossConfig, SpeechLMConfig
from llaso_jax.modeling.token_ctc import CTCConfig
from llaso_jax.sharding.strategies import ShardingConfig
from llaso_jax.training.optimizer import OptimizerConfig, ParameterRule

RECIPES = Path(__file__).parent / "configs"
PACKAGE_DATA_PREFIX = "package:"


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Numbers and memory. `auto` is float32 on CPU, bfloat16 on accelerators.

    Attributes:
      compute: dtype of activations and matrix products (norms, softmax, RoPE and loss are f32 always).
      frozen: storage dtype of frozen weights; trained weights are f32 masters always.
      remat: rematerialization policy of the layers.
      attention: attention implementation (docs/kernels.md).
    """

    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    frozen: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: RematPolicy = "none"
    attention: Implementation = "auto"

    def resolve(self, platform: str) -> tuple[ComputeConfig, str]:
        """ComputeConfig and frozen storage dtype on a "cpu", "gpu" or "tpu" platform."""
        auto: Literal["float32", "bfloat16"] = "float32" if platform == "cpu" else "bfloat16"
        dtype = auto if self.compute == "auto" else self.compute
        compute = ComputeConfig(dtype=dtype, remat=self.remat, attention=self.attention)
        return compute, auto if self.frozen == "auto" else self.frozen


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Validation on the stage's `data.eval_json`: loss, and what greedy generation scores.

    Attributes:
      every_steps: validate every so many optimizer steps; 0: only before and after the stage.
      before: validate before the first step. An untrained model rarely ends its answers, which takes its time.
      max_samples: records used (the first ones); null for all.
      batch_rows: prompts generated at a time.
      max_new_tokens: longest answer.
    """

    every_steps: int = 0
    before: bool = True
    max_samples: int | None = 512
    batch_rows: int = 32
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("batch_rows", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name}={getattr(self, name)} must be at least 1.")
        if self.every_steps < 0:
            raise ConfigError(f"evaluation.every_steps={self.every_steps} must not be negative.")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
      name: `align`, `instruct`, or any other: names the stage's folder and its lines in the log.
      data: training data and batches.
      parameters: which parameters are trained; the first rule whose pattern matches a path decides.
      optimizer: AdamW and its schedule.
      objective: `lm` trains the model to write the answers; `ctc` its audio frames to say them, against the
        embeddings of the language model, which is not run: a warm-up of projector or encoder.
      loss: of objective lm: what is minimized besides the cross-entropy.
      ctc: of objective ctc: its settings.
      accumulation: micro-batches per optimizer step (data.rows must be a multiple); the result is
        that of one large batch.
      max_steps: optimizer steps; null runs through data.epochs.
      evaluation: validation of this stage.
    """

    name: str
    data: DataConfig
    parameters: tuple[ParameterRule, ...]
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: Literal["lm", "ctc"] = "lm"
    loss: LossConfig = LossConfig()
    ctc: CTCConfig = CTCConfig()
    accumulation: int = 1
    max_steps: int | None = None
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ConfigError(f"stage name {self.name!r} must be a folder name.")
        unused, default = ("ctc", CTCConfig()) if self.objective == "lm" else ("loss", LossConfig())
        if getattr(self, unused) != default:
            raise ConfigError(
                f"stage {self.name!r} has settings under {unused!r}, which objective: {self.objective} does not "
                f"read: leave them out, or choose the other objective (lm reads loss, ctc reads ctc)."
            )
        if self.accumulation < 1 or self.data.rows % self.accumulation:
            raise ConfigError(
                f"stage {self.name!r}: data.rows={self.data.rows} is not a multiple of "
                f"accumulation={self.accumulation}."
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(
                f"stage {self.name!r}: max_steps={self.max_steps} must be at least 1."
            )
        if self.max_steps is None and self.data.epochs is None:
            raise ConfigError(f"stage {self.name!r} never ends: set max_steps or data.epochs.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every_steps: save every so many optimizer steps (and at the end of a stage, and on Ctrl-C).
      keep_latest: newest checkpoints kept.
      keep_every_steps: also keep every checkpoint whose step is a multiple; null for none.
      export_hf: write a LLaSO-layout Hugging Face folder at the end of the run.
    """

    every_steps: int = 500
    keep_latest: int = 2
    keep_every_steps: int | None = None
    export_hf: bool = True

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep_latest < 1:
            raise ConfigError(
                "checkpoint.every_steps and checkpoint.keep_latest must be at least 1."
            )


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is written while training.

    Attributes:
      every_steps: log metrics every so many steps.
      tensorboard: also write TensorBoard events.
    """

    every_steps: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"logging.every_steps={self.every_steps} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run.

    Attributes:
      name: name of the run; the default output folder is runs/<name>.
      description: what the recipe is and the result it is expected to give.
      tokenizer: tokenizer folder, or `package:…` for a folder inside the package.
      weights: model folder (of `llaso convert from-hf`, or of an earlier run) to start from; null for
        random weights of `model`.
      model: architecture; null takes it from `weights`.
      lora: adapters to add to the model; which of them are trained, a stage's `parameters` say.
      stages: stages in order; each starts from the weights of the one before.
      prompt: chat format and system prompt.
      precision: dtypes, rematerialization, attention.
      sharding: how the model is split over the axes of the mesh (docs/sharding.md).
      checkpoint: saving.
      logging: metrics.
      seed: seed of random weights and of dropout (data order has its own, data.seed).
    """

    name: str
    tokenizer: str
    stages: tuple[StageConfig, ...]
    description: str = ""
    weights: str | None = None
    model: SpeechLMConfig | None = None
    lora: tuple[LoraRule, ...] = ()
    prompt: PromptConfig = PromptConfig()
    precision: PrecisionConfig = PrecisionConfig()
    sharding: ShardingConfig = ShardingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a run needs at least one entry under 'stages'.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(f"stage names must differ, got {', '.join(names)}.")
        if self.weights is None and self.model is None:
            raise ConfigError(
                "give 'weights' (a model folder written by `llaso convert from-hf`) or 'model' "
                "(an architecture to train from random weights)."
            )


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `any.field=value` overrides.

    Args:
      recipe: path of a YAML file, or the name of a recipe in configs/ (without .yaml).
      overrides: assignments; values are read as YAML, list entries are named by their index.

    Raises:
      ConfigError: no such recipe, malformed YAML or override, unknown key, value refused.
    """
    path = find_recipe(recipe)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, as the recipes in configs/ do.")
    for override in overrides:
        apply_override(tree, override)
    return parse_config(RunConfig, tree)


def find_recipe(recipe: str) -> Path:
    """Path of a recipe given as a file or by the name it has in configs/."""
    candidates = [Path(recipe), RECIPES / f"{recipe}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise ConfigError(
        f"there is no recipe {recipe!r}: give --config the path of a YAML file or one of {known}."
    )


def resolve_path(path: str) -> Path:
    """A path of the configuration: `package:x` lies inside the installed package."""
    if path.startswith(PACKAGE_DATA_PREFIX):
        return Path(__file__).parent / path.removeprefix(PACKAGE_DATA_PREFIX)
    return Path(path)


def resolve_data(data: DataConfig, *, index_dir: Path) -> DataConfig:
    """`data` with `package:` paths resolved; offsets of packaged files are kept in `index_dir`."""
    files = (*data.training_files, *data.eval_json)
    packaged = any(file.startswith(PACKAGE_DATA_PREFIX) for file in files)
    return dataclasses.replace(
        data,
        train_json=_resolved(data.train_json),
        mixture=tuple(
            dataclasses.replace(source, files=_resolved(source.files)) for source in data.mixture
        ),
        eval_json=_resolved(data.eval_json),
        index_dir=str(index_dir) if packaged and data.index_dir is None else data.index_dir,
    )


def _resolved(files: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(resolve_path(file)) for file in files)


def to_tree(cfg: Any) -> Any:
    """A configuration as plain dicts, lists and scalars: what `parse_config` reads back."""
    return pydantic.TypeAdapter(type(cfg)).dump_python(cfg, mode="json")


def to_yaml(cfg: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_tree(cfg), sort_keys=False, allow_unicode=True)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in a nested tree, in place.

    Raises:
      ConfigError: no '=', or a path through something that is not there.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(
            f"override {override!r} is not understood: write any.field=value, "
            f"such as stages.0.optimizer.learning_rate=1e-3."
        )
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        node = _enter(node, name, key)
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: its value is not valid YAML: {error}") from error
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def parse_config(kind: type, tree: Any) -> Any:
    """A frozen dataclass `kind` from plain dicts, lists and scalars.

    Raises:
      ConfigError: unknown key (with the nearest known), wrong type, or a refused value.
    """
    _reject_unknown_keys(kind, tree, "")
    try:
        return pydantic.TypeAdapter(kind).validate_python(tree)
    except pydantic.ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or kind.__name__
            given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {message}{given}")
        raise ConfigError("\n".join(lines)) from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _enter(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, key)]
    child = node.setdefault(name, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {key}: {name!r} holds the value {child!r}, it has no fields.")
    return child


def _index(node: list, name: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= len(node):
        raise ConfigError(
            f"override {key}: {name!r} must be an index below {len(node)} of the list there."
        )
    return int(name)


def _reject_unknown_keys(kind: Any, tree: Any, prefix: str) -> None:
    """Walk the tree along the type: every key of a mapping must be a field of its dataclass."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if dataclasses.is_dataclass(option) and isinstance(tree, Mapping):
                _reject_unknown_keys(option, tree, prefix)
        return
    if origin is tuple and isinstance(tree, Sequence) and not isinstance(tree, str):
        for index, item in enumerate(tree):
            _reject_unknown_keys(args[0], item, f"{prefix}{index}.")
        return
    if not dataclasses.is_dataclass(kind) or not isinstance(tree, Mapping):
        return
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    for key, value in tree.items():
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown key '{prefix}{key}': did you mean '{prefix}{nearest}'? "
                f"Keys there: {', '.join(fields)}."
            )
        _reject_unknown_keys(hints[key], value, f"{prefix}{key}.")
