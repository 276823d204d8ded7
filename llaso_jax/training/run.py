"""A whole training run: one recipe, one mesh, one output folder, all stages."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from llaso_jax.config import RunConfig, resolve_path, to_tree, to_yaml
from llaso_jax.conversion import ExportOptions, export_llaso, save_model
from llaso_jax.data.tokenizer import eos_token_ids, load_tokenizer
from llaso_jax.errors import CheckpointError, ConfigError
from llaso_jax.inference.pretrained import load_pretrained, read_config, save_prompt_config
from llaso_jax.modeling.functional import Params, abstract_params, count_params, flatten, merge
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.processes import is_first_process, wait_for_all
from llaso_jax.training.adapters import with_adapters
from llaso_jax.training.fit import check_stage
from llaso_jax.training.loop import StageRun, Workplace
from llaso_jax.training.metrics import MetricsWriter, plot_metrics
from llaso_jax.training.report import score_table, transcript_lines
from llaso_jax.training.state import Layout, random_params
from llaso_jax.training.validation import Report

logger = logging.getLogger(__name__)

# Settings that may differ when a run is resumed: they change speed, files or logs, not results.
FREE_ON_RESUME = (
    "description",
    "checkpoint",
    "logging",
    "sharding",
    "evaluation",
    "num_workers",
    "num_threads",
    "read_ahead",
    "feature_cache_mb",
    "encoder_cache",
    "encoder_cache_gb",
    "prefetch_batches",
    "index_dir",
)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Where a finished run left its things, and its scores before and after (None: not validated)."""

    output: Path
    model: Path
    hf: Path | None
    before: Report | None
    after: Report | None


def train(
    cfg: RunConfig,
    *,
    mesh: str,
    output: Path,
    overwrite: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Run the recipe `cfg` on `mesh`, resuming in `output` where a run of the same recipe stopped.

    Weights come from the first of: the newest checkpoint in `output`, the stage before,
    `cfg.weights`, random numbers.

    Raises:
      ConfigError, ShardingError: settings that cannot work.
      CheckpointError: `output` holds another run and `overwrite` is off.
      NonFiniteLossError, DataError, InterruptedRunError: see `StageRun.run`.
    """
    console = console or Console()

    # 1. Mesh and model.
    device_mesh = make_mesh(mesh)
    model = model_config(cfg)
    rules = cfg.sharding.rules()
    layout = Layout.of(model, device_mesh, rules, frozen=cfg.sharding.frozen)
    for stage in cfg.stages:
        check_stage(model, stage, rules, device_mesh.shape)

    # 2. Output folder: one, which all processes reach; the first writes what is written once.
    first_process = is_first_process()
    tokenizer = load_tokenizer(resolve_path(cfg.tokenizer))
    check_vocabulary(model, tokenizer, cfg.tokenizer)
    text_files = output / "tokenizer"
    if first_process:
        _prepare_output(cfg, output, overwrite=overwrite)
        _save_tokenizer(tokenizer, text_files)
    wait_for_all("output folder prepared")

    # 3. Parameters to start from.
    params, hf_config = initial_params(cfg, model, layout)
    logger.info(
        "%s: %.2f M parameters, strategy %s, mesh %s (%d %s devices)",
        cfg.name,
        count_params(model) / 1e6,
        rules.name,
        mesh,
        device_mesh.devices.size,
        device_mesh.devices.flat[0].platform,
    )

    # 4. Stages.
    first: Report | None = None
    last: Report | None = None
    with MetricsWriter(
        output if first_process else None, tensorboard=cfg.logging.tensorboard
    ) as metrics:
        place = Workplace.of(
            cfg,
            model=model,
            layout=layout,
            tokenizer=tokenizer,
            output=output,
            metrics=metrics,
            console=console,
        )
        for index, stage in enumerate(cfg.stages):
            if index > 0 and stage.objective != cfg.stages[index - 1].objective:
                first = last = None  # scores of another kind
            same_data = index > 0 and stage.data.eval_json == cfg.stages[index - 1].data.eval_json
            run = StageRun(place, stage, params, before=last if same_data else None)
            del params  # the run holds them: a second copy would double memory
            result = run.run(final=index == len(cfg.stages) - 1)
            params = result.params
            first = first or result.before
            last = result.after or last
            del run

    # 5. Results.
    if first_process:
        plot_metrics(output / "metrics.jsonl", output / "metrics.png")
    save_model(
        output / "model",
        model,
        params,
        tokenizer_files_from=text_files,
        hf_config=hf_config,
        overwrite=True,
    )
    hf = None
    if cfg.checkpoint.export_hf:
        hf = export_llaso(
            output / "hf",
            model,
            params,
            hf_config=hf_config,
            files_from=text_files,
            options=ExportOptions(overwrite=True),
        )
    if first_process:
        for folder in filter(None, (output / "model", hf)):
            save_prompt_config(folder, cfg.prompt)
    wait_for_all("results written")
    if last is not None:
        console.print(score_table(first, last))
        for line in transcript_lines(last.answers):
            console.print(line, markup=False, highlight=False)
    return RunResult(output, output / "model", hf, first, last)


def model_config(cfg: RunConfig) -> SpeechLMConfig:
    """The architecture that is trained, with the adapters the recipe adds."""
    if cfg.weights is None:
        assert cfg.model is not None
        model = cfg.model
    else:
        model = read_config(resolve_path(cfg.weights))
        # Adapters may stand in 'model', in 'lora' (compared below), or only with the weights.
        own = model.lora if cfg.model is None or not cfg.model.lora else cfg.model.lora
        if cfg.model is not None and dataclasses.replace(cfg.model, lora=own) != model:
            raise ConfigError(
                f"'model' of the recipe differs from the architecture of weights={cfg.weights!r}: leave "
                f"'model' out, or leave 'weights' out to train from random weights."
            )
    return with_adapters(model, cfg.lora)


def initial_params(
    cfg: RunConfig, model: SpeechLMConfig, layout: Layout
) -> tuple[Params, dict[str, Any]]:
    """Parameters, and the Hugging Face configuration they came with (or {})."""
    if cfg.weights is None:
        return random_params(model, layout, cfg.seed), {}
    _, params, hf_config = load_pretrained(resolve_path(cfg.weights), shardings=layout.params)
    there = flatten(params)
    if new := [path for path in abstract_params(model) if path not in there]:  # adapters
        params = merge(params, random_params(model, layout, cfg.seed, wanted=set(new).__contains__))
    return params, hf_config


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": list(eos_token_ids(tokenizer)), "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(
        json.dumps(ends, indent=2) + "\n", encoding="utf-8"
    )


def check_vocabulary(model: SpeechLMConfig, tokenizer: Any, name: str) -> None:
    """Raise ConfigError unless the model has an embedding for every token."""
    if len(tokenizer) > model.text.vocab_size:
        raise ConfigError(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, the model model.text.vocab_size="
            f"{model.text.vocab_size}: embeddings must cover every token. Convert the weights together "
            f"with this tokenizer, or raise model.text.vocab_size."
        )


def _prepare_output(cfg: RunConfig, output: Path, *, overwrite: bool) -> None:
    """Make the folder, or check that the run in it is this one. Only runs are ever overwritten."""
    resolved, partial = output / "config.yaml", output / ".config.yaml.incomplete"
    earlier = _settings_of_run(resolved)
    if earlier is None:
        if output.is_dir() and any(path != partial for path in output.iterdir()):
            raise CheckpointError(
                f"{output} is not empty and holds no run of ours (no config.yaml of a run): "
                f"choose another --output."
            )
    elif overwrite:
        # The settings go last: a deletion cut short leaves a run that can still be overwritten.
        for path in [path for path in output.iterdir() if path != resolved] + [resolved]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif changed := differences(earlier, to_tree(cfg)):
        raise CheckpointError(
            f"{output} holds a run of other settings ({'; '.join(changed[:5])}). Choose another "
            f"--output, use the settings of {resolved}, or pass --overwrite to start over."
        )
    output.mkdir(parents=True, exist_ok=True)
    partial.write_text(to_yaml(cfg), encoding="utf-8")
    partial.replace(resolved)  # a kill leaves the whole file or none


def _settings_of_run(path: Path) -> dict[str, Any] | None:
    """The config.yaml of a run; None if there is none or it is something else's."""
    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    is_run = isinstance(tree, dict) and {"name", "tokenizer", "stages"} <= set(tree)
    return tree if is_run else None


def differences(
    earlier: Any, now: Any, key: str = "", *, free: Collection[str] = FREE_ON_RESUME
) -> list[str]:
    """Where two trees of settings differ, in words; settings named in `free` may, at any depth."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        return [
            difference
            for name in {**earlier, **now}
            if name not in free
            for difference in differences(
                earlier.get(name), now.get(name), f"{key}.{name}" if key else name, free=free
            )
        ]
    if isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        return [
            difference
            for index, pair in enumerate(zip(earlier, now, strict=True))
            for difference in differences(*pair, f"{key}.{index}", free=free)
        ]
    return [] if earlier == now else [f"{key}: {earlier!r} there, {now!r} now"]
