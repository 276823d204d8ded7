"""What a recipe will train, known before its weights are on this machine."""

import dataclasses

from llaso_jax.config import RunConfig, StageConfig, resolve_path
from llaso_jax.errors import ConfigError
from llaso_jax.inference.pretrained import read_config
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.training.adapters import with_adapters

LLASO_BASE = dataclasses.replace(
    SpeechLMConfig(),
    # Llama 3.2's 128,256 tokens and LLaSO's five, padded to a number that any tensor axis divides.
    text=dataclasses.replace(SpeechLMConfig().text, vocab_size=128_261, vocab_multiple_of=128),
)


def planned_model(recipe: RunConfig) -> tuple[SpeechLMConfig, str]:
    """Architecture that `recipe` trains, its adapters included, and where its sizes are from.

    Sizes are those of `model`, of the model folder `weights`, or of LLaSO-Base where that is not here yet.

    Raises:
      ConfigError: adapters that do not fit the model.
    """
    if recipe.model is not None:
        model, source = recipe.model, "the recipe"
    elif recipe.weights and resolve_path(recipe.weights).exists():
        model, source = read_config(resolve_path(recipe.weights)), recipe.weights
    else:
        model, source = LLASO_BASE, f"LLaSO-Base ({recipe.weights} is not on this machine)"
    return with_adapters(model, recipe.lora), source


def planned_stage(recipe: RunConfig, number: int) -> StageConfig:
    """Stage `number` of `recipe`, from 0; raises ConfigError if it has fewer."""
    if not 0 <= number < len(recipe.stages):
        raise ConfigError(
            f"--stage {number}: {recipe.name!r} has the stages 0 to {len(recipe.stages) - 1} "
            f"({', '.join(stage.name for stage in recipe.stages)})."
        )
    return recipe.stages[number]
