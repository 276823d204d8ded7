"""`llaso prepare mini`: a corpus of synthetic speech in LLaSO's format, made from nothing but text.

Plan, render (several processes; an interrupted build goes on), drop what an ASR model does not understand, then write
the JSON files, the manifest, the audit and the data card.
"""

import contextlib
import csv
import dataclasses
import json
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

from llaso_jax.data.records import RecordSource
from llaso_jax.errors import ConfigError
from llaso_jax.evaluation.metrics.text import whisper_english
from llaso_jax.preparation.audit import Audit, audit, texts_of
from llaso_jax.preparation.data_card import data_card
from llaso_jax.preparation.grams import HELD_OUT_GRAMS, Grams
from llaso_jax.preparation.plan import FAMILIES, RULE_SHARE, Plan, PlannedClip, make_plan
from llaso_jax.preparation.records import write_records
from llaso_jax.preparation.texts import SENTENCES, SPLITS, Split, read_texts
from llaso_jax.speech.render import RenderedClip, render

MAX_WER = 0.3
SETTINGS_FILE = "settings.json"


def align_file(split: Split) -> str:
    """Speech recognition of every clip."""
    return "align_train.json" if split == "train" else f"{split}_align.json"


def instruct_file(split: Split, family: str) -> str:
    """All tasks. In training a file for each family, to be mixed by weight: a voice is told in a word or two, a
    transcript takes fifteen."""
    return f"instruct_train_{family}.json" if split == "train" else f"{split}_instruct.json"


FILES: dict[Split, tuple[str, ...]] = {
    split: (align_file(split), *dict.fromkeys(instruct_file(split, name) for name in FAMILIES))
    for split in SPLITS
}


@dataclasses.dataclass(frozen=True)
class MiniSettings:
    """What decides the corpus.

    Attributes:
        clips: recordings of all splits.
        seed: of every random choice.
        engines: that speak.
        recognizer: that checks every clip; None for no filter.
        max_wer: most word errors a clip may have, over its words, to be used where its words matter.
        sentences: file of texts, one a line.
        rule_share: of what clips of speech recognition say, texts by rule instead of sentences.
        held_out: LLaSO-format files of evaluation, besides the project's own, that no text may share words with.
    """

    clips: int = 5000
    seed: int = 0
    engines: tuple[str, ...] = ("espeak", "piper")
    recognizer: str | None = "whisper-tiny.en"
    max_wer: float = MAX_WER
    sentences: Path = SENTENCES
    rule_share: float = RULE_SHARE
    held_out: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.max_wer <= 1:
            raise ConfigError(f"max_wer is {self.max_wer}; 0 (no error) to 1 is needed")
        if not 0 <= self.rule_share <= 1:
            raise ConfigError(f"rule_share is {self.rule_share}; 0 (sentences) to 1 is needed")
        if not self.sentences.is_file():
            raise ConfigError(
                f"{self.sentences} is no file; --sentences needs one of texts, one a line, as `llaso prepare wordnet` "
                "writes it"
            )

    def identity(self) -> dict[str, Any]:
        """What may not change in a folder: another number of clips, or another filter, goes on with what is there."""
        return {
            "seed": self.seed,
            "engines": sorted(self.engines),
            "sentences": self.sentences.name,
            "rule_share": self.rule_share,
            "held_out": [path.name for path in self.held_out],
        }


class Made(NamedTuple):
    """A clip with its plan, and whether its words can be understood (True where nobody listened)."""

    planned: PlannedClip
    rendered: RenderedClip
    understood: bool


class Corpus(NamedTuple):
    """What was written: the clips, the records of each file, and the audits by what was compared."""

    made: list[Made]
    files: dict[str, list[dict[str, Any]]]
    audits: dict[str, Audit]

    @property
    def leaks(self) -> int:
        """Of all audits."""
        return sum(found.leaks for found in self.audits.values())


def build(
    output: Path,
    settings: MiniSettings,
    *,
    workers: int,
    advance: Callable[[int, int], object] = lambda done, of: None,
) -> Corpus:
    """Make the corpus in `output`, or go on with it.

    Args:
        workers: processes that render and listen; 0 for none but this one.
        advance: called with clips done and clips in all, as they are made.

    Raises:
        ConfigError: settings that cannot work, or a folder with a corpus of other ones.
        SpeechError: an engine or recognizer that is missing, or a text that cannot be spoken.
        DataError: a file of texts or of `held_out` that cannot be read.
    """
    claim(output, settings)
    plan = plan_of(settings)
    made = list(_made(plan, output, settings, workers, advance))
    files = records_of(made, settings.seed)
    for name, records in files.items():
        write_records(records, output / name)
    write_manifest(made, output / "manifest.csv")
    audits = audits_of(output, settings, workers)
    tree = {name: found.tree() for name, found in audits.items()}
    (output / "audit.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    card = data_card(settings, plan, made, files, audits)
    (output / "README.md").write_text(card, encoding="utf-8")
    return Corpus(made, files, audits)


def _made(
    plan: Plan,
    output: Path,
    settings: MiniSettings,
    workers: int,
    advance: Callable[[int, int], object],
) -> Iterator[Made]:
    specs = [clip.spec for clip in plan.clips]
    rendered = render(specs, output, workers=workers, recognizer=settings.recognizer)
    # Closed on every way out: what is under way goes into the journal.
    with contextlib.closing(cast(Generator[RenderedClip, None, None], rendered)):
        for number, (planned, clip) in enumerate(zip(plan.clips, rendered, strict=True), 1):
            yield Made(planned, clip, understood(clip, planned.spec.text, settings.max_wer))
            advance(number, len(specs))


def understood(clip: RenderedClip, text: str, max_wer: float) -> bool:
    """Whether the recognizer got the words; True if nobody listened.

    It is enough that the letters agree without blanks: digits are written apart or in groups ("3 5 8", "894-00").
    """
    if clip.wer is None or clip.wer <= max_wer:
        return True
    said, heard = (
        "".join(filter(str.isalnum, whisper_english(t))) for t in (text, clip.heard or "")
    )
    return said == heard


def claim(output: Path, settings: MiniSettings) -> None:
    """Note in the folder what it holds, or find that it is the same.

    Raises:
        ConfigError: they differ, or the folder holds something else.
    """
    note = output / SETTINGS_FILE
    if not note.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise ConfigError(
                f"{output} is not empty, and holds no corpus of this command; choose another --output"
            )
        output.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(settings.identity(), indent=2) + "\n", encoding="utf-8")
        return
    earlier, now = json.loads(note.read_text(encoding="utf-8")), settings.identity()
    differ = sorted(key for key in {*earlier, *now} if earlier.get(key) != now.get(key))
    if differ:
        told = ", ".join(f"{key} {earlier.get(key)!r} (now {now.get(key)!r})" for key in differ)
        raise ConfigError(
            f"{output} holds a corpus of other settings: {told}. Choose another --output, or delete it"
        )


def plan_of(settings: MiniSettings) -> Plan:
    """The clips that `settings` ask for, free of held-out texts."""
    grams = [Grams.load(HELD_OUT_GRAMS)]
    for path in settings.held_out:
        source = RecordSource([path])
        grams.append(Grams.of(text for i in range(len(source)) for text in texts_of(source[i])))
    return make_plan(
        read_texts(settings.sentences),
        clips=settings.clips,
        seed=settings.seed,
        engines=settings.engines,
        rule_share=settings.rule_share,
        held_out=grams,
    )


def records_of(made: Iterable[Made], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Records by file name, shuffled.

    `align` is speech recognition of every clip; `instruct` has it for the clips that nothing else is asked about, and
    every other task. A record whose answer hangs on the words is left out where they cannot be understood.
    """
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in chain(*FILES.values())}
    for planned, _, understood in made:
        for record, spoken in zip(planned.records, planned.spoken, strict=True):
            if spoken and not understood:
                continue
            recognition = record["metadata"]["task"] == "ASR"
            if recognition:
                files[align_file(planned.split)].append(record)
            if not recognition or planned.family == "speech":
                files[instruct_file(planned.split, planned.family)].append(record)
    for name, records in files.items():
        random.Random(f"{seed}/{name}").shuffle(records)
    return files


def audits_of(output: Path, settings: MiniSettings, workers: int) -> dict[str, Audit]:
    """Training against the corpus's own dev and test (equal texts), and each held-out file (runs of words, sounds)."""
    train = _paths(output, "train")
    own = [path for split in SPLITS if split != "train" for path in _paths(output, split)]
    audits = {"dev and test": audit(train, own, run=0, audio=False)}
    for path in settings.held_out:
        audits[path.name] = audit(train, [path], workers=workers)
    return audits


def _paths(output: Path, split: Split) -> list[Path]:
    return [output / name for name in FILES[split]]


COLUMNS = (
    "path split family engine voice accent gender rate pitch voice_seed speed narrow_band snr_db noise_color gain_db "
    "pause_seconds seed seconds wer understood sha256 text"
)


def write_manifest(made: Sequence[Made], path: Path) -> None:
    """One line per clip: how it was made and what became of it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = COLUMNS.split()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for planned, rendered, understood in made:
            spec = planned.spec
            voice = spec.utterances[0].voice
            row: dict[str, Any] = dataclasses.asdict(voice) | {
                "voice": voice.name,
                "voice_seed": voice.seed,
            }
            row |= dataclasses.asdict(spec.augmentation) | dataclasses.asdict(rendered)
            row |= {"split": planned.split, "family": planned.family, "understood": int(understood)}
            row |= {"pause_seconds": spec.pause_seconds, "seed": spec.seed, "text": spec.text}
            row["narrow_band"] = int(spec.augmentation.narrow_band)
            writer.writerow([row[column] for column in columns])
