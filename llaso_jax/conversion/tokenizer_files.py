"""The tokenizer that goes with converted weights: found, given LLaSO's tokens, checked against the embeddings."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from llaso_jax.conversion.errors import ConfigMismatchError
from llaso_jax.conversion.gguf_file import MAGIC as GGUF_MAGIC
from llaso_jax.conversion.weights import Weights, grow_vocabulary
from llaso_jax.conversion.writing import GENERATION_CONFIG, TOKENIZER_FILES, copy_files
from llaso_jax.data.tokenizer import AUDIO_TAGS, add_audio_tokens, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_LOADABLE = ("tokenizer.json", "tokenizer_config.json")


def fit_tokenizer(
    weights: Weights,
    folder: Path,
    *,
    tokenizer_from: str | Path | None = None,
    multiple_of: int = 1,
) -> Weights:
    """Put the tokenizer's files into `folder` and give `weights` a row for each of its tokens.

    A plain Llama's tokenizer gets LLaSO's added tokens, and its embeddings grow. The files of a LLaSO
    checkpoint are copied as they are: its tokenizer must fit its embeddings already.

    Args:
      weights: from `gather_weights`.
      folder: an existing folder that gets the tokenizer files and generation_config.json.
      tokenizer_from: folder or tokenizer.json; default what lies beside the weights.
      multiple_of: pad the embedding rows with zeros to a multiple of it.

    Raises:
      ConfigMismatchError: a LLaSO checkpoint's tokenizer has more tokens than it has embeddings.
      ConfigError: `tokenizer_from` holds no fast tokenizer.
    """
    if "language_model" not in weights.parts:
        return weights
    is_llaso = weights.hf_config.get("model_type") == "llava_llama"
    copy_files(weights.folder, folder, (GENERATION_CONFIG,))
    source = Path(tokenizer_from) if tokenizer_from is not None else weights.folder
    tokenizer = _load(weights, source, folder, chosen=tokenizer_from is not None)
    if tokenizer is None:
        logger.warning(
            "no tokenizer beside %s: embeddings keep their %d rows, and the model folder needs one "
            "before it can read text (--tokenizer)",
            weights.source,
            weights.cfg.text.vocab_size,
        )
        return grow_vocabulary(weights, 0, multiple_of=multiple_of)
    if is_llaso:
        _check(weights, tokenizer, source)
    if not (is_llaso and any((folder / name).is_file() for name in _LOADABLE)):
        tokenizer.save_pretrained(folder)
    weights = grow_vocabulary(weights, len(tokenizer), multiple_of=multiple_of)
    ids = {
        f"{kind}_token_id": token
        for kind in ("bos", "eos", "pad")
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None
    }
    # What the checkpoint says of its own tokens counts, except that the pad token may be new.
    kept = {**ids, **{k: v for k, v in weights.hf_config.items() if v is not None}}
    if not is_llaso and "pad_token_id" in ids:
        kept["pad_token_id"] = ids["pad_token_id"]
    return dataclasses.replace(weights, hf_config=kept)


def _load(
    weights: Weights, source: Path | None, folder: Path, *, chosen: bool
) -> "PreTrainedTokenizerFast | None":
    """The tokenizer, with LLaSO's tokens added; files it is made of are in `folder` afterwards."""
    if source is not None and source.is_dir():
        # transformers would also read a config.json beside them, and fails on LLaSO's model type.
        copy_files(source, folder, TOKENIZER_FILES)
        if any((folder / name).is_file() for name in _LOADABLE):
            return load_tokenizer(folder)
    if source is not None and chosen:
        return load_tokenizer(source)
    if weights.source is None or not weights.source.exists():
        return None
    files = [weights.source] if weights.source.is_file() else sorted(weights.source.glob("*.gguf"))
    for file in files:
        with file.open("rb") as opened:
            if opened.read(4) != GGUF_MAGIC:
                continue
        from transformers import AutoTokenizer

        logger.info("the tokenizer is the one inside %s", file)
        inside = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return add_audio_tokens(inside)
    return None


def _check(weights: Weights, tokenizer: "PreTrainedTokenizerFast", source: Path | None) -> None:
    rows = weights.cfg.text.vocab_size
    if len(tokenizer) <= rows:
        return
    ids = tokenizer.get_vocab()
    late = {tag: ids[tag] for tag in AUDIO_TAGS if ids[tag] >= rows}
    raise ConfigMismatchError(
        f"the tokenizer in {source} has {len(tokenizer)} tokens, but {weights.source} has {rows} "
        f"embedding rows; audio tokens without a row: {late or 'none'}. Give the tokenizer that was "
        "saved with this checkpoint (--tokenizer DIR)."
    )
