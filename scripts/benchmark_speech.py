"""Time speech from text: engines, recording conditions, files, recognizer, and all of it in processes.

python scripts/benchmark_speech.py [--clips 24] [--workers 2]

Each line: seconds of audio, of CPU time (this process and its children, everything loaded), of wall
time, audio over CPU. The last line is a whole `render`, the start of its processes included. The word
errors are those of the recognizer over all clips of an engine. What is not installed is left out.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llaso_jax.speech.audio_file import encode
from llaso_jax.speech.augment import Augmentation, augment
from llaso_jax.speech.errors import MissingEngineError
from llaso_jax.speech.recognize import TINY_EN, Recognizer, word_error
from llaso_jax.speech.render import ClipSpec, Utterance, render
from llaso_jax.speech.samples import SAMPLE_RATE
from llaso_jax.speech.synthesis import known_voices, synthesizer

TEXTS = (
    "The meeting was moved to the first week of March.",
    "Please leave your name and number after the tone.",
    "My brother bought a new car last week.",
    "She opened the window and looked at the garden.",
    "The train to the coast leaves from platform four.",
    "We need two more chairs for the children.",
)
CONDITION = Augmentation(narrow_band=True, snr_db=20)


def cpu_seconds() -> float:
    """Of this process, and of its children that have ended."""
    return sum(os.times()[:4])


def timed(what: str, work: Callable[[], list[float]]) -> None:
    """Print how fast `work` was, which returns the seconds of each of its clips."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    audio = sum(work())
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    print(f"{what:<26}{audio:8.1f}{cpu:8.2f}{wall:8.2f}{audio / cpu:10.1f}")


def main() -> None:
    """Print one row per step."""
    parser = argparse.ArgumentParser(description="Time speech from text.")
    parser.add_argument("--clips", type=int, default=24, help="of each engine")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(f"load average before: {os.getloadavg()[0]:.2f}")
    print(f"{'':<26}{'audio s':>8}{'CPU s':>8}{'wall s':>8}{'audio/CPU':>10}")
    said: dict[str, list[Utterance]] = {}
    sounds: dict[str, list[np.ndarray]] = {}

    def lengths(engine: str) -> list[float]:
        return [len(sound) / SAMPLE_RATE for sound in sounds[engine]]

    for engine in ("espeak", "piper"):
        try:
            speaker = synthesizer(engine)
        except MissingEngineError as error:
            print(error)
            continue
        voices = known_voices(engine)
        said[engine] = [
            Utterance(
                TEXTS[i % len(TEXTS)], dataclasses.replace(voices[7 * i % len(voices)], seed=i)
            )
            for i in range(args.clips)
        ]
        speaker.speak("One.", voices[0])

        def speak(engine: str = engine) -> list[float]:
            speaker = synthesizer(engine)
            sounds[engine] = [speaker.speak(one.text, one.voice) for one in said[engine]]
            return lengths(engine)

        timed(engine, speak)

    def change() -> list[float]:
        for sound in sounds["espeak"]:
            augment(sound, CONDITION, seed=0)
        return lengths("espeak")

    timed("telephone band and noise", change)
    for suffix in (".flac", ".opus"):

        def write(suffix: str = suffix) -> list[float]:
            for sound in sounds["espeak"]:
                encode(sound, suffix)
            return lengths("espeak")

        timed(suffix, write)
    try:
        recognizer = Recognizer(TINY_EN)
    except MissingEngineError as error:
        print(error)
        recognizer = None
    if recognizer is not None:
        for engine in sounds:
            heard: list[str] = []

            def hear(
                engine: str = engine,
                heard: list[str] = heard,
                transcribe: Callable[[np.ndarray], str] = recognizer.transcribe,
            ) -> list[float]:
                heard += [transcribe(sound) for sound in sounds[engine]]
                return lengths(engine)

            timed(f"{TINY_EN} ({engine})", hear)
            text = " ".join(one.text for one in said[engine])
            print(f"    word errors {100 * word_error(text, ' '.join(heard)):.1f} %")
    specs = [
        ClipSpec(f"{engine}/{i}.flac", (one,), augmentation=CONDITION, seed=i)
        for engine, all_said in said.items()
        for i, one in enumerate(all_said)
    ]
    with tempfile.TemporaryDirectory() as folder:
        clips = render(
            specs, Path(folder), workers=args.workers, recognizer=TINY_EN if recognizer else None
        )
        timed(f"render, {args.workers} processes", lambda: [clip.seconds for clip in clips])


if __name__ == "__main__":
    main()
