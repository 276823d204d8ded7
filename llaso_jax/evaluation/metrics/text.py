"""What is done to a text before it is compared, and which of it suits a language."""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from llaso_jax.evaluation.metrics.languages import UNSPACED

_SPACES = re.compile(r"\s\s+")
_PUNCTUATION = re.compile(r"[^\w\s]")


class Normalizer(NamedTuple):
    """A function on texts and the name a report gives it."""

    name: str
    apply: Callable[[str], str]


def raw(text: str) -> str:
    """Runs of two or more white-space characters become one blank; the ends are stripped."""
    return _SPACES.sub(" ", text).strip()


def lower_without_punctuation(text: str) -> str:
    """`raw`, lower-case, without anything that is neither a word character nor white space."""
    return raw(_PUNCTUATION.sub("", text.lower()))


# Every model of a report is scored on the same references. LLaSO-Eval's ASR alone brings 9,132 texts a model: a
# smaller cache would have lost its references before the next model.
@functools.lru_cache(maxsize=1 << 15)
def whisper_english(text: str) -> str:
    """Whisper's English normaliser: case, punctuation, fillers, numbers, British spelling."""
    return _english()(text)


def whisper_basic(text: str) -> str:
    """Whisper's normaliser of every other language: case, punctuation and brackets."""
    return _basic()(text)


def unspaced(text: str) -> str:
    """`whisper_basic` of the compatibility form (full-width letters become plain), without blanks."""
    return "".join(whisper_basic(unicodedata.normalize("NFKC", text)).split())


def normalizer_of(language: str) -> Normalizer:
    """The normaliser that the corrected protocol applies to references and answers in a `language_code`."""
    if language == "en":
        return Normalizer("whisper-normalizer English", whisper_english)
    if language in UNSPACED:
        return Normalizer("NFKC, whisper-normalizer basic, blanks removed", unspaced)
    return Normalizer("whisper-normalizer basic", whisper_basic)


@functools.cache
def _english() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()


@functools.cache
def _basic() -> BasicTextNormalizer:
    return BasicTextNormalizer()
