"""Items asked again with noise, at another speed or level, through a codec, in other words, or with other audio."""

import io
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import soundfile as sf

from llaso_jax.data.audio import LoadedAudio, load_audio
from llaso_jax.data.prompt import AUDIO_PLACEHOLDER, Turn
from llaso_jax.data.sound import amplified, at_speed, with_noise
from llaso_jax.errors import ConfigError, DataError
from llaso_jax.evaluation.answering.questions import QuestionFile
from llaso_jax.modeling.frames import SAMPLE_RATE

Kind = Literal["noise", "speed", "codec", "gain", "reword", "swap"]
FORMS = "noise:snr=-10,0,10 speed:0.8,1.2 codec:mp3-16k gain:-20 reword:3 swap:1"
COUNTED = ("reword", "swap")  # their levels are 1 to the number given
# Constant bit rates of 16 kHz MP3 in kbit/s; libsndfile's compression level runs over them linearly.
HIGHEST_BITRATE, LOWEST_BITRATE = 160, 8


@dataclass(frozen=True)
class Perturbation:
    """One way to ask an item again.

    Attributes:
      kind: noise (level: dB of signal over noise), speed (times as fast, pitch changes too), codec
        (level: kbit/s of MP3), gain (dB), reword (level: which of the other instructions, from 1) or swap
        (the audio of another item, level: which, from 1): what a model says that does not listen.
    """

    kind: Kind
    level: float

    @property
    def name(self) -> str:
        """As in folders and reports: noise=-10."""
        return f"{self.kind}={self.level:g}"


def parse_perturbations(words: Sequence[str]) -> list[Perturbation]:
    """`noise:snr=-10,0` and the like, one perturbation for each level.

    Raises:
      ConfigError: a word of another form, or a level that cannot be.
    """
    return [found for word in words for found in _parse(word)]


def _parse(word: str) -> list[Perturbation]:
    kind, _, levels = word.partition(":")
    if kind not in get_args(Kind) or not levels:
        raise ConfigError(f"--perturb {word!r} is not understood; forms are {FORMS}.")
    levels = levels.removeprefix("snr=") if kind == "noise" else levels
    numbers = []
    for level in levels.split(","):
        if kind == "codec":
            level = level.removeprefix("mp3-").removesuffix("k")
        try:
            numbers.append(float(level))
        except ValueError:
            raise ConfigError(
                f"--perturb {word!r}: {level!r} is no number; forms are {FORMS}."
            ) from None
    allowed = {"speed": (0.25, 4.0), "codec": (LOWEST_BITRATE, HIGHEST_BITRATE)}
    allowed |= dict.fromkeys(COUNTED, (1, 100))
    low, high = allowed.get(kind, (-120, 120))
    if not all(low <= number <= high for number in numbers):  # NaN is in no range
        raise ConfigError(f"--perturb {word!r}: levels of {kind} are {low:g} to {high:g}.")
    if kind in COUNTED:
        if len(numbers) > 1 or not numbers[0].is_integer():
            raise ConfigError(
                f"--perturb {word!r}: {kind} takes one whole number, of times that each item is asked so."
            )
        numbers = [float(number) for number in range(1, int(numbers[0]) + 1)]
    return [Perturbation(kind, number) for number in numbers]  # type: ignore[arg-type]


class Perturber:
    """Applies one perturbation; the same item is changed the same way in every run.

    Args:
      seed: of noise, and of the choice of instructions and of other items.
      noise_files: recordings to take noise from; () for white noise.
      read: loads the audio of other items, as that of the item itself is loaded.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        *,
        seed: int = 0,
        noise_files: Sequence[Path] = (),
        read: Callable[[Path], LoadedAudio] = load_audio,
    ) -> None:
        self._perturbation = perturbation
        self._seed = seed
        self._noise_files = sorted(noise_files)
        self._read = read
        self._instructions: dict[str, list[str]] = {}
        self._others: dict[str, dict[int, int]] = {}

    def applies(self, file: QuestionFile) -> bool:
        """Whether a file can be asked this way.

        Rewording needs instructions that items share, and swapping items with as many recordings.
        """
        match self._perturbation.kind:
            case "reword":
                return len(self._shared(file)) > self._perturbation.level
            case "swap":
                return len(self._swapped(file)) == len(file)
            case _:
                return True

    def __call__(
        self, file: QuestionFile, number: int, turns: Sequence[Turn], audios: Sequence[LoadedAudio]
    ) -> tuple[tuple[Turn, ...], list[LoadedAudio]]:
        """Turns and audios of a question as they are asked."""
        identity = f"{file.spec.file} {number} {self._perturbation.kind}"
        key = [self._seed, zlib.crc32(identity.encode())]
        if self._perturbation.kind == "reword":
            return (self._reworded(file, turns[0], key), *turns[1:]), list(audios)
        if self._perturbation.kind == "swap":
            other = file[self._swapped(file)[number]]
            return tuple(turns), [self._read(Path(voice)) for voice in other.voices]
        rng = np.random.default_rng(key)
        return tuple(turns), [self._changed(audio, rng) for audio in audios]

    def _shared(self, file: QuestionFile) -> list[str]:
        """Distinct instructions of a file; [] if they are the questions themselves."""
        if file.spec.file not in self._instructions:
            asked = {file[number].turns[0].text for number in range(len(file))}
            shared = len(asked) <= len(file) / 2 and file.spec.task != "AQA"
            self._instructions[file.spec.file] = sorted(asked) if shared else []
        return self._instructions[file.spec.file]

    def _swapped(self, file: QuestionFile) -> dict[int, int]:
        """For each item of a file another one, with as many recordings; without items that have too few such others.

        Items stand in one random circle and look `level` places ahead: levels are different others.
        """
        name, ahead = file.spec.file, int(self._perturbation.level)
        if name not in self._others:
            alike: dict[int, list[int]] = defaultdict(list)
            for number in range(len(file)):
                alike[len(file[number].voices)].append(number)
            rng = np.random.default_rng([self._seed, zlib.crc32(f"{name} swap".encode())])
            self._others[name] = {}
            for numbers in alike.values():
                circle = rng.permutation(numbers).tolist()
                if len(circle) > ahead:
                    self._others[name] |= dict(
                        zip(circle, circle[ahead:] + circle[:ahead], strict=True)
                    )
        return self._others[name]

    def _reworded(self, file: QuestionFile, turn: Turn, key: list[int]) -> Turn:
        others = [text for text in self._shared(file) if text != turn.text]
        # Levels are different places of one order, so no instruction is asked twice.
        order = np.random.default_rng(key).permutation(len(others))
        text = others[order[int(self._perturbation.level) - 1]]
        if text.count(AUDIO_PLACEHOLDER) != turn.text.count(AUDIO_PLACEHOLDER):
            raise DataError(
                f"the instruction {text!r:.60} of another item has a different number of {AUDIO_PLACEHOLDER}: "
                f"the items of {file.spec.file} cannot be asked in each other's words; leave out --perturb reword"
            )
        return replace(turn, text=text)

    def _changed(self, audio: LoadedAudio, rng: np.random.Generator) -> LoadedAudio:
        level = self._perturbation.level
        match self._perturbation.kind:
            case "noise":
                samples = with_noise(audio.samples, self._noise(len(audio.samples), rng), level)
            case "speed":
                samples = at_speed(audio.samples, level)
            case "gain":
                samples = np.clip(amplified(audio.samples, level), -1, 1)
            case _:
                samples = through_mp3(audio.samples, level)
        return replace(audio, samples=samples, seconds_used=len(samples) / SAMPLE_RATE)

    def _noise(self, length: int, rng: np.random.Generator) -> np.ndarray:
        if not self._noise_files:
            return rng.standard_normal(length, np.float32)
        path = self._noise_files[rng.integers(len(self._noise_files))]
        recorded = load_audio(path).samples
        start = int(rng.integers(len(recorded)))
        return np.resize(np.roll(recorded, -start), length)


def through_mp3(samples: np.ndarray, kbits: float) -> np.ndarray:
    """f32[n + delay]: coded as MP3 at a constant rate of about `kbits` kbit/s and decoded again."""
    level = (HIGHEST_BITRATE - kbits) / (HIGHEST_BITRATE - LOWEST_BITRATE)
    coded = io.BytesIO()
    sf.write(
        coded,
        samples,
        SAMPLE_RATE,
        format="MP3",
        subtype="MPEG_LAYER_III",
        compression_level=min(level, 0.99),
        bitrate_mode="CONSTANT",
    )
    coded.seek(0)
    return sf.read(coded, dtype="float32")[0]
