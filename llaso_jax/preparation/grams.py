"""Runs of words that held-out texts hold: what no training text may share with them.

Words are compared after Whisper's English normaliser, so that "press 1" and "Press one," are the same. A text is
known by its runs of `RUN` words; one with fewer words by the whole of it. Five words: shorter runs are common
property of telephone English and of English at all ("press one to", "at the end of the"), and dropping what shares them
would thin out the style of a test set, not its texts. docs/prepare.md has the counts for 3 to 7.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from llaso_jax.errors import DataError
from llaso_jax.evaluation.metrics.text import whisper_english

RUN = 5
SHORTEST = 4  # words; shorter texts ("yes", "seven", "thank you") are anybody's
HELD_OUT_GRAMS = Path(__file__).parent / "held_out_grams.json"
"""Hashes of the runs in the project's held-out prompts: the check needs neither the recordings nor the texts."""


def words_of(text: str) -> tuple[str, ...]:
    """What is compared: "Press one, please." -> press 1 please."""
    return tuple(whisper_english(text).split())


def runs(
    words: tuple[str, ...], *, run: int = RUN, shortest: int = SHORTEST
) -> Iterator[tuple[str, ...]]:
    """The runs of `run` words, or all words of a shorter text; nothing of one below `shortest` words."""
    if len(words) >= run:
        yield from (words[i : i + run] for i in range(len(words) - run + 1))
    elif len(words) >= shortest:
        yield words


@dataclasses.dataclass(frozen=True)
class Grams:
    """Hashed runs of words.

    Attributes:
        hashes: of the runs, 48 bits each.
        lengths: words of the runs that are in it: `run`, and those of whole texts that are shorter.
    """

    hashes: frozenset[str]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, texts: Iterable[str], *, run: int = RUN, shortest: int = SHORTEST) -> "Grams":
        """The runs of `texts`."""
        found = {
            gram for text in texts for gram in runs(words_of(text), run=run, shortest=shortest)
        }
        return cls(frozenset(map(_hash, found)), tuple(sorted({len(gram) for gram in found})))

    @classmethod
    def load(cls, path: Path) -> "Grams":
        """Read what `save` wrote.

        Raises:
            DataError: no such file, or not of this kind.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            return cls(frozenset(tree["hashes"]), tuple(tree["lengths"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds no runs of held-out texts ({error})") from error

    def save(self, path: Path) -> None:
        """Write as JSON, in order."""
        tree = {"lengths": self.lengths, "hashes": sorted(self.hashes)}
        path.write_text(json.dumps(tree, indent=0) + "\n", encoding="utf-8")

    def shared(self, text: str) -> str | None:
        """The first run of `text` that is among them, or None."""
        words = words_of(text)
        for length in self.lengths:
            for start in range(len(words) - length + 1):
                gram = words[start : start + length]
                if _hash(gram) in self.hashes:
                    return " ".join(gram)
        return None


def _hash(gram: tuple[str, ...]) -> str:
    return hashlib.blake2b(" ".join(gram).encode(), digest_size=6).hexdigest()
