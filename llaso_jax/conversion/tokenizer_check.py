"""The tokenizer beside weights, read from its JSON: does it fit the embeddings, and which special tokens has it.

transformers is not needed for that, and would take seconds to import.
"""

import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llaso_jax.conversion.errors import CorruptFileError
from llaso_jax.conversion.gguf_file import MAGIC as GGUF_MAGIC
from llaso_jax.conversion.source import read_json
from llaso_jax.conversion.writing import GENERATION_CONFIG
from llaso_jax.data.tokenizer import ADDED_TOKENS, AUDIO_TAGS, PAD_TOKEN

TEMPLATE_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
"""What LLaSO's own chat template is written with (data/prompt.py)."""
_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class TokenizerCheck:
    """A tokenizer against the embeddings it is used with.

    Attributes:
      file: it was read from, None if there is none.
      length: number of its tokens, None if that cannot be told from JSON.
      rows: embedding rows of the model, without padding.
      added_tokens: LLaSO's own tokens -> id, None for one it lacks.
      template_tokens: those of LLaSO's chat template -> id, None for one it lacks.
      chat_template: whether it brings a template of its own.
      eos: ids that end an answer -> their token, None where it is not known.
      problems: what does not fit.
    """

    file: str | None
    length: int | None
    rows: int
    added_tokens: Mapping[str, int | None]
    template_tokens: Mapping[str, int | None]
    chat_template: bool
    eos: Mapping[int, str | None]
    problems: tuple[str, ...]


def check_tokenizer_files(
    source: Path, *, rows: int, config: Mapping[str, Any], is_llaso: bool
) -> TokenizerCheck:
    """Look at the tokenizer that goes with the language model at `source`.

    Args:
      source: folder of weights, or a file (GGUF files have their tokenizer inside).
      rows: embedding rows, without padding.
      config: config.json of the language model, for its EOS ids.
      is_llaso: whether the embeddings must have a row for each token already; those of a plain Llama grow.

    Raises:
      CorruptFileError: a file that is not the JSON it should be.
    """
    folder = source if source.is_dir() else source.parent
    file, ids, settings = _vocabulary(source, folder)
    tokens = {id: token for token, id in (ids or {}).items()}
    eos = _eos_ids(folder, config)
    problems = [
        f"eos_token_id {id} has no row among the {rows} embeddings" for id in eos if id >= rows
    ]
    if is_llaso and ids is not None:
        # What loading adds: the tags it lacks, and <unk> as pad token if it has none (data/tokenizer.py).
        added = [tag for tag in AUDIO_TAGS if tag not in ids]
        if settings.get("pad_token") is None and PAD_TOKEN not in ids:
            added.append(PAD_TOKEN)
        if len(ids) + len(added) > rows:
            lacking = f" and lacks {', '.join(added)}" if added else ""
            problems.append(
                f"the tokenizer in {file} has {len(ids)} tokens{lacking}, but the checkpoint has {rows} "
                "embedding rows: give the tokenizer that was saved with it (--tokenizer DIR)"
            )
    return TokenizerCheck(
        file=file,
        length=None if ids is None else len(ids),
        rows=rows,
        added_tokens={token: (ids or {}).get(token) for token in ADDED_TOKENS},
        template_tokens={token: (ids or {}).get(token) for token in TEMPLATE_TOKENS},
        chat_template="chat_template" in settings
        or any((folder / f"chat_template.{end}").is_file() for end in ("jinja", "json")),
        eos={id: tokens.get(id) for id in eos},
        problems=tuple(problems),
    )


def _vocabulary(
    source: Path, folder: Path
) -> tuple[str | None, dict[str, int] | None, dict[str, Any]]:
    """Where it is, token -> id (None: cannot be told), and tokenizer_config.json."""
    settings = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    if (folder / _TOKENIZER).is_file():
        return str(folder / _TOKENIZER), _tokens(folder / _TOKENIZER, settings), settings
    if settings:
        return str(folder / _CONFIG), None, settings
    for file in [source] if source.is_file() else sorted(folder.glob("*.gguf")):
        with file.open("rb") as opened:
            if opened.read(4) == GGUF_MAGIC:
                return str(file), _gguf_tokens(opened, file), {}
    return None, None, {}


def _tokens(path: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    tokenizer = read_json(path)
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {token: id for id, (token, _) in enumerate(vocabulary)}
        ids = dict(vocabulary)
        ids |= {added["content"]: added["id"] for added in tokenizer.get("added_tokens") or ()}
        for id, added in (settings.get("added_tokens_decoder") or {}).items():
            ids.setdefault(added["content"], int(id))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} does not describe a tokenizer ({error!r}).") from error
    return ids


def _eos_ids(folder: Path, config: Mapping[str, Any]) -> list[int]:
    path = folder / GENERATION_CONFIG
    named = read_json(path) if path.is_file() else {}
    ids = named.get("eos_token_id", config.get("eos_token_id"))
    if ids is None:
        return []
    return [int(id) for id in (ids if isinstance(ids, list) else [ids])]


_GGUF_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def _gguf_tokens(file: BinaryIO, path: Path) -> dict[str, int]:
    """Token -> id of an opened GGUF file; the package `gguf` takes seconds for them.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    def number(code: str) -> int:
        return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]

    def text() -> bytes:
        return file.read(number("Q"))

    def skip(kind: int) -> None:
        if kind == _GGUF_STRING:
            text()
        elif kind == _GGUF_ARRAY:
            kind, count = number("I"), number("Q")
            for _ in range(count):
                skip(kind)
        else:
            file.seek(_GGUF_NUMBERS[kind], 1)

    try:
        file.seek(16)  # magic, version, number of tensors
        for _ in range(number("Q")):
            name, kind = text(), number("I")
            if name == b"tokenizer.ggml.tokens":
                number("I")
                return {text().decode(errors="replace"): id for id in range(number("Q"))}
            skip(kind)
    except (struct.error, KeyError) as error:
        raise CorruptFileError(f"{path} is not a whole GGUF file ({error!r}).") from error
    return {}
