"""adapter_config.json of the LoRA adapters of a model, as peft reads it."""

import re
from collections.abc import Mapping

from llaso_jax.conversion.errors import UnsupportedConfigError
from llaso_jax.conversion.hf_config import Json
from llaso_jax.conversion.tables import PEFT_PREFIX, Slot
from llaso_jax.modeling.lora import LoraRule, adapted_layer, rule_for
from llaso_jax.modeling.speech_lm import SpeechLMConfig

_HALF = ".lora_A.weight"


def adapter_config(cfg: SpeechLMConfig, table: Mapping[str, Slot], base_model: str | None) -> Json:
    """The configuration of the adapters in `table` (from tables.adapter_slots).

    peft finds modules, ranks and scales by regular expressions on names; here each kind of linear layer has one,
    with the number of the layer left open.

    Raises:
      UnsupportedConfigError: no adapters, or some of other dropout or other kind of scale.
    """
    rules: dict[str, LoraRule] = {}
    for name, slot in table.items():
        if name.endswith(_HALF):
            module = re.escape(name.removeprefix(PEFT_PREFIX).removesuffix(_HALF))
            kind = (
                module if slot.layer is None else re.sub(r"\.\d+\\\.", r".\\d+\\.", module, count=1)
            )
            linear = adapted_layer(slot.path)
            rule = rule_for(linear, cfg.lora) if linear else None
            assert rule is not None, slot.path
            rules[kind] = rule
    if not rules:
        raise UnsupportedConfigError(
            "there is no LoRA adapter in what is to be written: train one ('lora' of a recipe), or convert "
            "one with `llaso convert from-hf BASE ADAPTER --keep-adapter`."
        )
    first = next(iter(rules.values()))
    if any(rule.rank_stabilized != first.rank_stabilized for rule in rules.values()):
        raise UnsupportedConfigError(
            "peft scales all adapters by alpha / r, or all by alpha / sqrt(r) (use_rslora); these are of "
            "both kinds. Write them one part at a time, or merged."
        )
    if any(rule.dropout != first.dropout for rule in rules.values()):
        raise UnsupportedConfigError(
            "peft has one lora_dropout for all adapters, and these have several. Write them one part at a time, "
            "or merged."
        )
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rank_stabilized,
        "bias": "none",
        "target_modules": "|".join(rules),
        "rank_pattern": {
            kind: rule.rank for kind, rule in rules.items() if rule.rank != first.rank
        },
        "alpha_pattern": {
            kind: rule.alpha for kind, rule in rules.items() if rule.alpha != first.alpha
        },
    }
