"""Sentences of a wide vocabulary: the examples of use in WordNet 3.0 (Debian package wordnet-base).

Princeton's licence lets anyone use, copy, change and distribute them with its notice; none is part of this project.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from llaso_jax.errors import DataError
from llaso_jax.preparation.texts import transcript

PACKAGE = "apt-get download wordnet-base"
KINDS = (".adj", ".adv", ".noun", ".verb")
WORDS = range(4, 17)  # of a sentence
HEADER = """\
# Examples of use in WordNet 3.0 (Debian package wordnet-base), one a line.
# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. Used under the WordNet 3.0 licence.
"""

_EXAMPLE = re.compile(r'"([^"]+)"')
_SPEAKABLE = re.compile(r"(?!.*\.\.)[A-Za-z][A-Za-z',.?! -]*")
_UNKIND = re.compile(r"slur|offensive|vulgar|obscen|derogat|disparag|taboo|insult", re.IGNORECASE)


def example_sentences(root: Path) -> list[str]:
    """Examples of nouns, verbs, adjectives and adverbs that can be read aloud, in the order of the files.

    Left out are those with digits or abbreviating marks, of fewer than 4 or more than 16 words, those whose words
    stand there already, and all of words that their gloss calls offensive.

    Raises:
        DataError: `root` does not hold the package.
    """
    files = sorted(path for path in root.rglob("data.*") if path.suffix in KINDS)
    if len(files) != len(KINDS):
        raise DataError(
            f"{root} holds {len(files)} of the {len(KINDS)} files {', '.join('data' + k for k in KINDS)}; "
            f"the package wordnet-base is needed: {PACKAGE}"
        )
    sentences: dict[str, str] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            gloss = line.partition(" | ")[2]
            if not _UNKIND.search(gloss):
                for example in map(str.strip, _EXAMPLE.findall(gloss)):
                    if _SPEAKABLE.fullmatch(example) and len(example.split()) in WORDS:
                        sentences.setdefault(transcript(example), example)
    return list(sentences.values())


def write_sentences(sentences: Sequence[str], output: Path) -> None:
    """A file for `llaso prepare mini --sentences`; says where they are from."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(HEADER + "".join(f"{text}\n" for text in sentences), encoding="utf-8")
