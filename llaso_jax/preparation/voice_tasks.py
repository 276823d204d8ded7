"""Closed questions about a voice: voices for each answer, and changes of the sound that would make an answer wrong."""

import dataclasses
import random
from collections.abc import Callable, Sequence

from llaso_jax.speech.augment import Augmentation
from llaso_jax.speech.voice import Voice

Pick = Callable[[random.Random, str, Sequence[Voice]], Voice]
"""(generator, label, known voices) -> a voice for which the label is right."""

NEUTRAL = Augmentation()
ACCENTS = ("american", "scottish", "midlands", "caribbean")
RATES = {"slow": (0.6, 0.75), "normal": (0.95, 1.05), "fast": (1.5, 1.8)}
PITCHES = {"low": (-6.0, -4.5), "medium": (-0.5, 0.5), "high": (4.5, 6.0)}  # semitones
WHISPER = "+whisper"
# Semitones: a woman's voice lowered sounds like a man's.
CLEAR = {"male": (-3.0, 0.0), "female": (0.0, 3.0)}


@dataclasses.dataclass(frozen=True)
class VoiceTask:
    """A closed question about how something is said.

    Attributes:
        name: LLaSO's where it has the task (SGC gender, AC accent).
        labels: the answers.
        templates: wordings of the instruction.
        falsified_by: fields of `Augmentation` that change the right answer, or hide it; neutral in clips of this task.
        pick: a voice for a label. Only espeak-ng's are asked about: one engine, so that the engine is no hint.
    """

    name: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    falsified_by: frozenset[str]
    pick: Pick


def _espeak(voices: Sequence[Voice], **labels: str) -> list[Voice]:
    chosen = [
        v
        for v in voices
        if v.engine == "espeak" and all(getattr(v, k) == x for k, x in labels.items())
    ]
    if not chosen:
        raise ValueError(f"no espeak-ng voice with {labels}")
    return chosen


def _gender(choose: random.Random, label: str, voices: Sequence[Voice]) -> Voice:
    voice = choose.choice(_espeak(voices, gender=label))
    return dataclasses.replace(
        voice, pitch=choose.uniform(*CLEAR[label]), rate=choose.uniform(0.85, 1.2)
    )


def _accent(choose: random.Random, label: str, voices: Sequence[Voice]) -> Voice:
    voice = choose.choice(_espeak(voices, accent=label))
    return dataclasses.replace(voice, pitch=choose.uniform(-2, 2), rate=choose.uniform(0.85, 1.15))


def _speed(choose: random.Random, label: str, voices: Sequence[Voice]) -> Voice:
    voice = choose.choice(_espeak(voices))
    return dataclasses.replace(
        voice, rate=choose.uniform(*RATES[label]), pitch=choose.uniform(-2, 2)
    )


def _pitch(choose: random.Random, label: str, voices: Sequence[Voice]) -> Voice:
    # One gender: whether a voice is high for a woman or for a man cannot be heard without knowing who speaks.
    voice = choose.choice(_espeak(voices, gender="male"))
    return dataclasses.replace(
        voice, pitch=choose.uniform(*PITCHES[label]), rate=choose.uniform(0.9, 1.1)
    )


def _style(choose: random.Random, label: str, voices: Sequence[Voice]) -> Voice:
    voice = choose.choice(_espeak(voices))
    if label == "whisper":
        voice = dataclasses.replace(voice, name=voice.name.partition("+")[0] + WHISPER)
    return dataclasses.replace(voice, rate=choose.uniform(0.85, 1.15))


VOICE_TASKS = {
    task.name: task
    for task in (
        VoiceTask(
            "SGC",
            ("male", "female"),
            (
                "Is the voice male or female?",
                "Classify the gender of the speaker.",
                "Name the gender of the voice: male or female.",
                "Does a man or a woman speak? Answer male or female.",
                "Listen to the speaker. Male or female?",
            ),
            # Speed is changed by playing faster, which raises the pitch.
            frozenset({"speed"}),
            _gender,
        ),
        VoiceTask(
            "AC",
            ACCENTS,
            (
                "Which accent is this?",
                "Classify the accent of the speaker.",
                "Name the accent: american, scottish, midlands or caribbean.",
                "What accent does the speaker have?",
                "Where does this accent belong?",
            ),
            frozenset(),
            _accent,
        ),
        VoiceTask(
            "SPEED",
            tuple(RATES),
            (
                "How fast is the speech?",
                "Classify the speaking rate: slow, normal or fast.",
                "Is this spoken slow, normal or fast?",
                "Name the speed of the speech.",
                "Rate the tempo of the speaker.",
            ),
            frozenset({"speed"}),
            _speed,
        ),
        VoiceTask(
            "PITCH",
            tuple(PITCHES),
            (
                "How high is the voice?",
                "Classify the pitch: low, medium or high.",
                "Is the pitch of the voice low, medium or high?",
                "Name the pitch of the speaker.",
                "Judge how high or low the voice is.",
            ),
            frozenset({"speed"}),
            _pitch,
        ),
        VoiceTask(
            "STYLE",
            ("normal", "whisper"),
            (
                "Is this a normal voice or a whisper?",
                "Classify the style of the voice: normal or whisper.",
                "Does the speaker whisper? Answer normal or whisper.",
                "Name the way of speaking.",
                "Which kind of voice is this?",
            ),
            # A whisper is noise.
            frozenset({"snr_db"}),
            _style,
        ),
    )
}


def allowed(augmentation: Augmentation, task: VoiceTask) -> Augmentation:
    """The same, with the fields that would falsify the task's answers neutral."""
    return dataclasses.replace(
        augmentation, **{name: getattr(NEUTRAL, name) for name in task.falsified_by}
    )
