"""Whether training data holds texts or recordings of evaluation data.

Texts: equal ones, and runs of words in common (see grams.py). Compared are what `metadata.text` says is spoken and
answers of `SHORTEST` words or more; instructions and short answers are the same everywhere by intent.
Recordings: equal samples, and the same sound after re-encoding, in another level or in a longer file (fingerprint.py).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from llaso_jax.data.audio import load_audio
from llaso_jax.data.records import Record, RecordSource
from llaso_jax.errors import ConfigError
from llaso_jax.preparation.fingerprint import (
    Fingerprint,
    FingerprintIndex,
    content_hash,
    fingerprint,
)
from llaso_jax.preparation.grams import RUN, SHORTEST, runs, words_of

EXAMPLES = 20  # kept of each kind of finding


class Source(NamedTuple):
    """A text or a recording: `value`, and the first record that has it."""

    record: str
    value: Any


@dataclasses.dataclass(frozen=True)
class TextFindings:
    """Texts of training that evaluation has too.

    Attributes:
        train, evaluation: distinct texts compared.
        equal: training texts that are an evaluation text.
        overlapping: training texts that share a run of `run` words with one, or hold all of a shorter one; not
            looked for where `run` is 0.
        short: equal ones below `SHORTEST` words, which are no leak.
        touched: evaluation texts that are found in training, in whole or in part.
        examples: of equal and overlapping ones.
    """

    run: int
    train: int
    evaluation: int
    equal: int
    overlapping: int
    short: int
    touched: int
    examples: tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True)
class AudioFindings:
    """Recordings of training that evaluation has too.

    Attributes:
        train, evaluation: files compared.
        equal: training files with the samples of an evaluation file.
        similar: others that sound the same, or hold the same sound.
        examples: of both, with the share of fingerprint bits that differ.
    """

    train: int
    evaluation: int
    equal: int
    similar: int
    examples: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found; `audio` is None where recordings were not compared."""

    texts: TextFindings
    audio: AudioFindings | None

    @property
    def leaks(self) -> int:
        """Texts and recordings of training that evaluation holds."""
        texts = self.texts.equal + self.texts.overlapping
        return texts + (self.audio.equal + self.audio.similar if self.audio else 0)

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return {"leaks": self.leaks, **dataclasses.asdict(self)}

    def lines(self) -> list[str]:
        """The same to read."""
        t = self.texts
        told = [
            f"{'LEAKS' if self.leaks else 'no leak'}: {self.leaks}",
            f"texts: {t.train} of training, {t.evaluation} of evaluation",
            f"  equal: {t.equal} (and {t.short} below {SHORTEST} words, which do not count)",
        ]
        if t.run:
            told.append(
                f"  with {t.run} words in a row in common, or all of a shorter text: {t.overlapping}"
            )
        told.append(f"  evaluation texts touched: {t.touched}")
        told += [
            f"    {e['train']}: {e['train_text']!r} has {e['shared']!r} of {e['evaluation']}"
            for e in t.examples
        ]
        if self.audio is None:
            return [*told, "recordings: not compared"]
        a = self.audio
        told += [
            f"recordings: {a.train} of training, {a.evaluation} of evaluation",
            f"  equal samples: {a.equal}",
            f"  the same sound, whole or in part: {a.similar}",
        ]
        told += [
            f"    {e['train']} has {e['evaluation']} ({e['wrong']:.0%} of the bits differ)"
            for e in a.examples
        ]
        return told


def texts_of(record: Record) -> list[str]:
    """What of a record is compared: the spoken text that its metadata names, and answers that are no label."""
    spoken = record.metadata.get("text", ())
    texts = (
        [spoken] if isinstance(spoken, str) else [text for text in spoken if isinstance(text, str)]
    )
    answers = [turn.text for turn in record.turns if turn.role == "gpt"]
    return [*texts, *(text for text in answers if len(words_of(text)) >= SHORTEST)]


def audit(
    train: Sequence[Path],
    evaluation: Sequence[Path],
    *,
    run: int = RUN,
    audio: bool = True,
    data_root: Path | None = None,
    workers: int = 1,
    advance: Callable[[], object] = lambda: None,
) -> Audit:
    """Compare LLaSO-format files.

    Args:
        run: words in a row that two texts may not share; 0 looks for equal texts only.
        audio: compare recordings too, all of which are decoded.
        data_root: where paths of recordings start; None for each JSON file's folder.
        workers: processes that decode.
        advance: called after each recording.

    Raises:
        ConfigError: `run` below `SHORTEST` and not 0.
        DataError, AudioError: files that cannot be read.
    """
    if run and run < SHORTEST:
        raise ConfigError(
            f"a run of {run} words is common property; 0 (equal texts only) or {SHORTEST} and more is needed"
        )
    sides = [list(_records(files, data_root)) for files in (train, evaluation)]
    texts = [_distinct((r.sample_id, text) for r in side for text in texts_of(r)) for side in sides]
    found = compare_texts(*texts, run=run)
    if not audio:
        return Audit(found, None)
    files = [
        _distinct((r.sample_id, str(voice)) for r in side for voice in r.voices) for side in sides
    ]
    return Audit(found, compare_audio(*files, workers=workers, advance=advance))


def _records(files: Sequence[Path], data_root: Path | None) -> Iterator[Record]:
    for file in files:
        source = RecordSource([file], data_root=data_root)
        yield from (source[i] for i in range(len(source)))


def _distinct(pairs: Iterable[tuple[str, str]]) -> list[Source]:
    first: dict[str, str] = {}
    for record, value in pairs:
        first.setdefault(value, record)
    return [Source(record, value) for value, record in first.items()]


def compare_texts(
    train: Sequence[Source], evaluation: Sequence[Source], *, run: int = RUN
) -> TextFindings:
    """Find equal and overlapping texts; each training text counts once, as equal if it is that."""
    whole: dict[tuple[str, ...], list[int]] = defaultdict(list)
    parts: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, (_, text) in enumerate(evaluation):
        words = words_of(text)
        whole[words].append(number)
        if run:
            for gram in runs(words, run=run):
                parts[gram].append(number)
    lengths = {len(gram) for gram in parts}
    counts = dict.fromkeys(("equal", "overlapping", "short"), 0)
    touched: set[int] = set()
    examples: list[dict[str, str]] = []
    for record, text in train:
        words = words_of(text)
        equal = bool(words) and words in whole
        shared = words if equal else _first_shared(words, parts, lengths)
        if shared is None:
            continue
        if equal and len(words) < SHORTEST:
            counts["short"] += 1
            continue
        counts["equal" if equal else "overlapping"] += 1
        hit = whole[words] if equal else parts[shared]
        touched.update(hit)
        if len(examples) < EXAMPLES:
            other = evaluation[hit[0]]
            example = {"train": record, "train_text": text, "shared": " ".join(shared)}
            examples.append(example | {"evaluation": other.record, "evaluation_text": other.value})
    return TextFindings(
        run, len(train), len(evaluation), **counts, touched=len(touched), examples=tuple(examples)
    )


def _first_shared(
    words: tuple[str, ...], parts: Mapping[tuple[str, ...], Any], lengths: Iterable[int]
) -> tuple[str, ...] | None:
    for length in sorted(lengths):
        for start in range(len(words) - length + 1):
            if words[start : start + length] in parts:
                return words[start : start + length]
    return None


class _Heard(NamedTuple):
    digest: str
    print_: Fingerprint


def _hear(path: str) -> _Heard:
    samples = load_audio(path).samples
    return _Heard(content_hash(samples), fingerprint(samples))


def compare_audio(
    train: Sequence[Source],
    evaluation: Sequence[Source],
    *,
    workers: int = 1,
    advance: Callable[[], object] = lambda: None,
) -> AudioFindings:
    """Find equal and similar recordings; `value` of a source is a path."""
    known: dict[str, _Heard] = {}
    for source, heard in _heard(evaluation, workers):
        known[source.value] = heard
        advance()
    digests = {heard.digest: path for path, heard in known.items()}
    index = FingerprintIndex({path: heard.print_ for path, heard in known.items()})
    counts = dict.fromkeys(("equal", "similar"), 0)
    examples: list[dict[str, Any]] = []
    for source, heard in _heard(train, workers):
        advance()
        if path := digests.get(heard.digest):
            counts["equal"] += 1
            match = {"evaluation": path, "wrong": 0.0}
        elif matches := index.find(heard.print_):
            counts["similar"] += 1
            best = min(matches, key=lambda m: m.wrong)
            match = {"evaluation": best.name, "wrong": round(best.wrong, 3)}
        else:
            continue
        if len(examples) < EXAMPLES:
            examples.append({"train": source.value, "record": source.record, **match})
    return AudioFindings(len(train), len(evaluation), **counts, examples=tuple(examples))


def _heard(sources: Sequence[Source], workers: int) -> Iterator[tuple[Source, _Heard]]:
    paths = [source.value for source in sources]
    if workers <= 1 or len(paths) < 2:
        yield from zip(sources, map(_hear, paths), strict=True)
        return
    # Spawned: a fork of a process that has JAX's threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        size = min(64, -(-len(paths) // workers))
        yield from zip(sources, pool.map(_hear, paths, chunksize=size), strict=True)
