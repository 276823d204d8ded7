"""Tokenizers with LLaSO's added tokens. Ids are always read from the tokenizer, never assumed."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llaso_jax.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<unk>"
AUDIO_TAGS = ("<Audio>", "</Audio>", "<audio_start>", "<audio_end>")
ADDED_TOKENS = (PAD_TOKEN, *AUDIO_TAGS)

LLAMA3_RESERVED = 256
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """Load a Hugging Face tokenizer folder, or a single tokenizer.json, and add LLaSO's tokens.

    Raises:
        ConfigError: nothing there, or not a fast tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path)
    if path.is_file():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    elif (path / "tokenizer.json").is_file():
        # Not AutoTokenizer: it reads config.json first and fails on LLaSO's model_type.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    elif (path / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    else:
        raise ConfigError(
            f"no tokenizer at {path}: a folder with tokenizer.json, or that file, is needed; "
            "`tokenizer` names it"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"{path} holds a {type(tokenizer).__name__}; a fast tokenizer is needed")
    return add_audio_tokens(tokenizer)


def add_audio_tokens(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """Add `<unk>` as pad, then the four audio tags, in upstream's order; returns the tokenizer.

    Tokens that are there already keep their ids, and a tokenizer with a pad token keeps it.
    Source: llaso/train/train.py `smart_tokenizer_and_embedding_resize`.
    """
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    known = tokenizer.get_vocab()
    missing = [tag for tag in AUDIO_TAGS if tag not in known]
    tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


@cache
def llama3_tokenizer() -> "PreTrainedTokenizerFast":
    """The Llama-3 tokenizer of the `llama-models` package with Llama-3.2's and LLaSO's tokens.

    Converted once per process (seconds); save it with `save_pretrained` to load it faster.

    Raises:
        ConfigError: the package is not installed.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = importlib.util.find_spec("llama_models")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the Llama-3 tokenizer needs the package `llama-models`: pip install 'llaso-jax[mini]'"
        )
    reserved = LLAMA3_RESERVED - len(LLAMA3_SPECIAL_TOKENS)
    specials = (
        *LLAMA3_SPECIAL_TOKENS,
        *(f"<|reserved_special_token_{2 + i}|>" for i in range(reserved)),
    )
    backend = TikTokenConverter(
        vocab_file=str(Path(spec.origin).parent / "llama3" / "tokenizer.model"),
        extra_special_tokens=list(specials),
    ).converted()
    return add_audio_tokens(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
        )
    )


END_TOKENS = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")


def eos_token_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's own eos and Llama-3's three, as far as it has them."""
    vocabulary = tokenizer.get_vocab()
    names = [token for token in (tokenizer.eos_token, *END_TOKENS) if token in vocabulary]
    return tuple(dict.fromkeys(vocabulary[name] for name in names))
