"""Every clip of a corpus and every question about it, before a sound is made.

A clip's plan depends on the seed, its split, family and number alone: a larger corpus begins with the clips of a
smaller one, and an interrupted build goes on.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_args

from llaso_jax.data.sound import NoiseColor
from llaso_jax.errors import ConfigError
from llaso_jax.preparation import questions
from llaso_jax.preparation.chance import generator
from llaso_jax.preparation.grammar import rule_text
from llaso_jax.preparation.grams import Grams
from llaso_jax.preparation.records import ASR_TEMPLATES, Layout, asr_record, record
from llaso_jax.preparation.texts import SPLITS, Split, of_split, split_of, transcript
from llaso_jax.preparation.voice_tasks import VOICE_TASKS, allowed
from llaso_jax.speech.augment import Augmentation
from llaso_jax.speech.clip import ClipSpec, Utterance
from llaso_jax.speech.synthesis import known_voices
from llaso_jax.speech.voice import Voice

FEWEST_CLIPS = 20
HELD_SHARE = 0.06  # of all clips, in each of dev and test
FAMILIES = {"speech": 0.55, "voice": 0.2, "question": 0.15, "command": 0.1}
PIPER_SHARE = 0.85  # of clips that are about words: Whisper tiny.en drops 17 % of Piper's, 74 % of espeak-ng's
ESPEAK_ACCENTS = ("american", "british")  # of such clips; questions about voices have all
RULE_SHARE = 0.7  # of utterances, by default: the project's own sentences are few
JOINED_SHARE = 0.6  # of clips of the family "speech": several texts, one after the other
LONGEST = 30  # words of a clip
TRIES = 200  # drawn texts until one is of the split that is wanted
# From a number with no such text to one of the same kind of question, or the same intent: a multiple of their counts.
KINDS = math.lcm(len(questions.SPOKEN_ANSWERS), len(questions.ATTRIBUTES), len(questions.INTENTS))

INTENT_TEMPLATES = (
    "What is the intent?",
    "Name the intent of the speaker.",
    "Classify the command: activate, deactivate, increase or decrease.",
    "What should be done? Answer activate, deactivate, increase or decrease.",
)
ENTITY_TEMPLATES = {
    "device": ("Which device is named?", "Extract the device.", "Name the device of the command."),
    "room": ("Which room is named?", "Extract the room.", "Name the room of the command."),
}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class PlannedClip:
    """One recording and what is asked about it.

    Attributes:
        spec: how it is made.
        split, family: where it belongs.
        records: in LLaSO's format.
        spoken: of each record, whether its answer hangs on the words (and not on the voice alone): such records
            need a clip in which the words can be understood.
    """

    spec: ClipSpec
    split: Split
    family: str
    records: tuple[dict[str, Any], ...]
    spoken: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All clips, and how many texts were left out for what they share with held-out ones.

    Attributes:
        dropped: by reason.
    """

    clips: tuple[PlannedClip, ...]
    dropped: dict[str, int]


def make_plan(
    sentences: Sequence[str],
    *,
    clips: int,
    seed: int,
    engines: Sequence[str],
    rule_share: float = RULE_SHARE,
    held_out: Sequence[Grams] = (),
) -> Plan:
    """Plan `clips` recordings.

    Args:
        sentences: texts to speak, besides those made by rule.
        engines: "espeak", "piper" or both; without espeak there are no questions about voices.
        rule_share: of what the family "speech" says, texts by rule; the others are sentences.
        held_out: runs of words that nothing may share.

    Raises:
        ConfigError: too few clips or texts, or no engine.
    """
    if clips < FEWEST_CLIPS:
        raise ConfigError(
            f"{clips} clips; at least {FEWEST_CLIPS} are needed, for every task in every split"
        )
    if not engines:
        raise ConfigError("no engine was given; espeak, piper or both are needed")
    return _Planner(sentences, seed, tuple(sorted(set(engines))), rule_share, tuple(held_out)).plan(
        clips
    )


def shares(total: int, parts: dict[str, float]) -> dict[str, int]:
    """`total` split by `parts`, each at least 1. No count falls when `total` rises.

    Example: 10, {a: 0.55, b: 0.45} -> {a: 6, b: 4}.
    """
    counts = dict.fromkeys(parts, 1)
    for placed in range(len(parts), total):
        # To whoever lacks most of its share of what is placed by then.
        counts[max(parts, key=lambda name: parts[name] * (placed + 1) - counts[name])] += 1
    return counts


class _Planner:
    def __init__(
        self,
        sentences: Sequence[str],
        seed: int,
        engines: tuple[str, ...],
        rule_share: float,
        held_out: tuple[Grams, ...],
    ) -> None:
        self._seed = seed
        self._voices = [voice for engine in engines for voice in known_voices(engine)]
        self._engines = engines
        self._rule_share = rule_share
        self._held_out = held_out
        self._leaking: set[str] = set()
        clean = [text for text in sentences if self._clean(text)]
        tested = [text for text in clean if split_of(text) != "train"]
        grams = Grams.of(tested)
        trained = [text for text in of_split(clean, "train") if not grams.shared(text)]
        self._near_test = len(clean) - len(tested) - len(trained)
        self._sentences = {"train": trained} | {
            split: of_split(tested, split) for split in ("dev", "test")
        }
        for split, texts in self._sentences.items():
            if not texts:
                raise ConfigError(
                    f"none of {len(sentences)} texts is of the split {split}; some hundred are needed"
                )

    def plan(self, clips: int) -> Plan:
        held = max(len(FAMILIES), round(clips * HELD_SHARE))
        sizes: dict[Split, int] = {"train": clips - 2 * held, "dev": held, "test": held}
        families = {
            name: share
            for name, share in FAMILIES.items()
            if name != "voice" or "espeak" in self._engines
        }
        planned = [
            clip
            for split in SPLITS
            for family, count in shares(sizes[split], families).items()
            for clip in itertools.islice(self._family(family, split), count)
        ]
        dropped = {
            "shared words with held-out texts": len(self._leaking),
            "training sentences that shared words with dev or test": self._near_test,
        }
        return Plan(tuple(planned), dropped)

    def _family(self, family: str, split: Split) -> Iterator[PlannedClip]:
        deck = self._deck(split)
        for index in itertools.count():
            clip = _Clip(generator(self._seed, family, split, index), split, family, index)
            if family == "speech":
                self._speech(clip, deck)
            elif family == "voice":
                self._voice(clip, deck)
            elif family == "question":
                self._question(clip)
            else:
                self._command(clip)
            yield clip.planned()

    def _speech(self, clip: "_Clip", deck: Iterator[str]) -> None:
        choose = clip.choose
        wanted = choose.randint(2, LONGEST) if choose.random() < JOINED_SHARE else 1
        texts: list[str] = []
        words = 0
        while words < wanted:
            text = (
                self._rule(choose, clip.split) if choose.random() < self._rule_share else next(deck)
            )
            length = len(transcript(text).split())
            if texts and words + length > LONGEST:
                break
            texts.append(text)
            words += length
        while len(texts) > 1 and not self._clean(" ".join(texts)):
            texts.pop()  # words on both sides of a join made a run
        clip.speak(texts, self._any_voice(choose), _augmentation(choose))
        clip.ask_words()

    def _voice(self, clip: "_Clip", deck: Iterator[str]) -> None:
        tasks = list(VOICE_TASKS.values())
        task, turn = tasks[clip.index % len(tasks)], clip.index // len(tasks)
        label = task.labels[turn % len(task.labels)]
        text = next(text for text in deck if len(text.split()) >= 5)
        voice = task.pick(clip.choose, label, self._voices)
        clip.speak([text], voice, allowed(_augmentation(clip.choose), task))
        clip.ask(
            task.name, "(t,a)", clip.choose.choice(task.templates), label, task.labels, spoken=False
        )
        if task.name != "STYLE":  # a whisper of formant synthesis is hard to understand
            clip.ask_words()

    def _question(self, clip: "_Clip") -> None:
        turn = clip.index // 2
        if clip.index % 2:
            said = self._of_split(
                clip, lambda c, i: questions.spoken_question(c, turn + i * KINDS), lambda q: q.text
            )
            task, layout = "AQA_a", "(a)"
            labels = tuple(
                dict.fromkeys(a for answers in questions.SPOKEN_ANSWERS.values() for a in answers)
            )
        else:
            said = self._of_split(
                clip, lambda c, i: questions.written_question(c, turn + i * KINDS), lambda q: q.text
            )
            task, layout = "AQA_at", "(a,t)"
            labels = tuple(value for values in questions.ATTRIBUTES.values() for value in values)
        clip.speak([said.text], self._any_voice(clip.choose), _augmentation(clip.choose))
        clip.ask(task, layout, said.written, said.answer, labels, spoken=True)
        clip.ask_words()

    def _command(self, clip: "_Clip") -> None:
        said = self._of_split(
            clip, lambda c, i: questions.command(c, clip.index + i * KINDS), lambda q: q.text
        )
        clip.speak([said.text], self._any_voice(clip.choose), _augmentation(clip.choose))
        choose = clip.choose
        clip.ask(
            "IP",
            "(t,a)",
            choose.choice(INTENT_TEMPLATES),
            said.intent,
            tuple(questions.INTENTS),
            spoken=True,
        )
        entity, answer, labels = (
            ("device", said.device, questions.DEVICES)
            if clip.index % 2
            else ("room", said.room, questions.ROOMS)
        )
        clip.ask(
            "EE", "(t,a)", choose.choice(ENTITY_TEMPLATES[entity]), answer, labels, spoken=True
        )
        clip.ask_words()

    def _of_split(
        self, clip: "_Clip", draw: Callable[[random.Random, int], T], text_of: Callable[[T], str]
    ) -> T:
        """Drawn until the text is of the clip's split; what has no such text gives way to the next one."""
        for step in itertools.count():
            for _ in range(TRIES):
                drawn = draw(clip.choose, step)
                if split_of(text_of(drawn)) == clip.split and self._clean(text_of(drawn)):
                    return drawn
        raise AssertionError("count() has no end")

    def _rule(self, choose: random.Random, split: Split) -> str:
        while True:
            text = rule_text(choose)
            if split_of(text) == split and self._clean(text):
                return text

    def _clean(self, text: str) -> bool:
        if any(grams.shared(text) for grams in self._held_out):
            self._leaking.add(text)
            return False
        return True

    def _deck(self, split: Split) -> Iterator[str]:
        """All sentences of a split in a random order, again and again."""
        for turn in itertools.count():
            texts = list(self._sentences[split])
            generator(self._seed, "deck", split, turn).shuffle(texts)
            yield from texts

    def _any_voice(self, choose: random.Random) -> Voice:
        engine = self._engines[0]
        if len(self._engines) > 1:
            engine = "piper" if choose.random() < PIPER_SHARE else "espeak"
        voice = choose.choice([voice for voice in self._voices if _plain(voice, engine)])
        # One Piper voice becomes many speakers by its pitch: 0.86 to 1.22 times as high.
        low, high = (-2.6, 3.4) if engine == "piper" else (-2.0, 2.0)
        return dataclasses.replace(
            voice,
            rate=round(choose.uniform(0.85, 1.2), 3),
            pitch=round(choose.uniform(low, high), 2),
            seed=choose.getrandbits(31),
        )


def _plain(voice: Voice, engine: str) -> bool:
    return voice.engine == engine and (engine != "espeak" or voice.accent in ESPEAK_ACCENTS)


def _augmentation(choose: random.Random) -> Augmentation:
    """Conditions of a recording: half of them of telephone band, half with noise, all of another level."""
    return Augmentation(
        speed=round(choose.uniform(0.9, 1.1), 3) if choose.random() < 0.2 else 1.0,
        narrow_band=choose.random() < 0.5,
        snr_db=round(choose.uniform(10, 35), 1) if choose.random() < 0.5 else None,
        noise_color=choose.choice(get_args(NoiseColor)),
        gain_db=round(choose.uniform(-10, 6), 1),
    )


class _Clip:
    """A clip in the making."""

    def __init__(self, choose: random.Random, split: Split, family: str, index: int) -> None:
        self.choose = choose
        self.split: Split = split
        self.family = family
        self.index = index
        self._name = f"{split}-{family}-{index:05d}"
        self._path = f"audio/{split}/{family}-{index:05d}.flac"
        self._records: list[dict[str, Any]] = []
        self._spoken: list[bool] = []
        self._spec: ClipSpec | None = None
        self._said = ""

    def speak(self, texts: Sequence[str], voice: Voice, augmentation: Augmentation) -> None:
        self._said = " ".join(map(transcript, texts))
        self._spec = ClipSpec(
            path=self._path,
            utterances=tuple(Utterance(text, voice) for text in texts),
            pause_seconds=round(self.choose.uniform(0.15, 0.6), 2),
            augmentation=augmentation,
            seed=self.choose.getrandbits(31),
        )

    def ask(
        self,
        task: str,
        layout: Layout,
        text: str,
        answer: str,
        labels: tuple[str, ...],
        *,
        spoken: bool,
    ) -> None:
        name = f"{self._name}-{task}"
        self._records.append(
            record(name, task, self._path, layout, text, answer, labels=labels, text=self._said)
        )
        self._spoken.append(spoken)

    def ask_words(self) -> None:
        template = self.choose.choice(ASR_TEMPLATES)
        self._records.append(asr_record(f"{self._name}-ASR", self._path, template, self._said))
        self._spoken.append(True)

    def planned(self) -> PlannedClip:
        assert self._spec is not None
        return PlannedClip(
            self._spec, self.split, self.family, tuple(self._records), tuple(self._spoken)
        )
