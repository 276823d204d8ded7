"""The sentences that ship with the project, and how a text becomes the words that are spoken.

Texts are split into train, dev and test by a hash of their words: the same text is in the same split in every corpus,
whatever its size and seed.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

SENTENCES = Path(__file__).parent / "sentences.txt"

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
DEV_SHARE, TEST_SHARE = 0.05, 0.05

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


def read_texts(path: Path = SENTENCES) -> list[str]:
    """The texts of a file, one a line; lines that start with # and empty ones are passed over."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not _is_remark(line)]


def source_of(path: Path = SENTENCES) -> str:
    """What the first lines of a file of texts say about it, those that start with #; empty if there are none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(_is_remark, lines))


def _is_remark(line: str) -> bool:
    return line.startswith("#")


def spoken_words(text: str) -> list[str]:
    """Its words in lower case, without punctuation; a hyphen separates. What a transcript of speech holds.

    Example: "Well-known: it's 'Ann'!" -> well known it's ann
    """
    return _WORD.findall(text.lower())


def transcript(text: str) -> str:
    """`spoken_words` in one string: the answer of speech recognition."""
    return " ".join(spoken_words(text))


def split_of(text: str) -> Split:
    """The split a text belongs to, by the words in it alone."""
    digest = hashlib.sha256(transcript(text).encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TEST_SHARE:
        return "test"
    return "dev" if share < TEST_SHARE + DEV_SHARE else "train"


def of_split(texts: Iterable[str], split: Split) -> list[str]:
    """Those of `texts` that belong to `split`, in their order."""
    return [text for text in texts if split_of(text) == split]
