"""A LoRA adapter in numbers; what it changes is checked when it is merged into its base (lora_adapter.py)."""

from llaso_jax.conversion.part_description import Part, describe
from llaso_jax.conversion.source import Source

ADAPTER = "adapter"
_HALVES = {"lora_A": "lora_B", "lora_B": "lora_A"}
_HALVES |= {"lora_embedding_A": "lora_embedding_B", "lora_embedding_B": "lora_embedding_A"}


def adapter_part(source: Source) -> Part:
    """Its tensors; both halves of every pair must be there, and have one rank."""
    problems = []
    missing, pairs = [], 0
    for name, tensor in source.tensors.items():
        half = next((step for step in name.split(".") if step in _HALVES), None)
        if half is None:
            continue
        partner = name.replace(f".{half}", f".{_HALVES[half]}")
        if partner not in source.tensors:
            missing.append(partner)
        elif half.endswith("A"):
            pairs += 1
            a, b = tensor.shape, source.tensors[partner].shape
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                problems.append(f"{name} {a} and {partner} {b} have not one rank")
    if not isinstance(source.config.get("lora_alpha"), int | float):
        problems.append(
            f"{source.folder / 'adapter_config.json'} gives no lora_alpha: the scale is not known"
        )
    sizes = {
        "pairs": pairs,
        "r": source.config.get("r"),
        "lora_alpha": source.config.get("lora_alpha"),
        "use_rslora": bool(source.config.get("use_rslora")),
        "base_model_name_or_path": source.config.get("base_model_name_or_path"),
    }
    needed = {name: tensor.shape for name, tensor in source.tensors.items()}
    needed |= dict.fromkeys(missing, ())
    return describe(ADAPTER, sizes, source.tensors, needed, problems)
