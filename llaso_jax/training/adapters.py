"""The adapters that a recipe adds to a model."""

import dataclasses

from llaso_jax.errors import ConfigError
from llaso_jax.modeling.functional import abstract_params
from llaso_jax.modeling.lora import LoraError, LoraRule
from llaso_jax.modeling.speech_lm import SpeechLMConfig


def with_adapters(model: SpeechLMConfig, rules: tuple[LoraRule, ...]) -> SpeechLMConfig:
    """`model` with the adapters `rules`, or with its own where there are none.

    Raises:
      ConfigError: a model that has other adapters already, or rules that do not fit it.
    """
    if model.lora and rules and model.lora != rules:
        own = ", ".join(repr(rule.pattern) for rule in model.lora)
        raise ConfigError(
            f"'lora' of the recipe differs from the adapters the model has ({own}): leave 'lora' out to train "
            f"those, or merge them first with `llaso convert to-hf`."
        )
    adapted = dataclasses.replace(model, lora=rules or model.lora)
    try:
        abstract_params(adapted)
    except LoraError as error:
        raise ConfigError(f"lora: {error}") from error
    return adapted
