"""espeak-ng through ctypes: formant synthesis of many accents, hundreds of times as fast as real time.

espeak-ng is GPL-3. It comes with the package espeakng-loader (extra `tts`) and is never part of this one.
"""

import ctypes
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import soxr

from llaso_jax.speech.errors import MissingEngineError, SynthesisError
from llaso_jax.speech.packages import optional_module
from llaso_jax.speech.samples import SAMPLE_RATE, spoken
from llaso_jax.speech.voice import Gender, Voice

NORMAL_RATE = 175  # words a minute
NORMAL_PITCH, NORMAL_RANGE = 50, 50
PITCH_STEPS_PER_OCTAVE = 50  # pitch_adjust_tab of wavegen.c: 0 is an octave below 50
# espeak-ng's pitch moves the lowest pitch of a voice only. With a range that grows with it, and this
# much more of both, the median pitch of four voices was what was asked for but for 0.5 semitones (rms;
# 1.2 at most).
PITCH_EXCESS = 1.22
SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: to a callback, before espeak_Synth returns
KEEP_PROCESS = 0x8000  # espeakINITIALIZE_DONT_EXIT
UTF8 = 1  # espeakCHARS_UTF8
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER

ACCENTS = {
    "american": "en-us",
    "new york": "en-us-nyc",
    "british": "en-gb-x-rp",
    "scottish": "en-gb-scotland",
    "lancashire": "en-gb-x-gbclan",
    "midlands": "en-gb-x-gbcwmd",
    "caribbean": "en-029",
}
VARIANTS: dict[Gender, tuple[str, ...]] = {
    "male": ("", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+m8"),
    "female": ("+f1", "+f2", "+f3", "+f4", "+f5"),
}

PACKAGES = ("espeakng-loader",)

_LOADED = threading.Lock()


def known_voices() -> tuple[Voice, ...]:
    """Every English accent in every plain variant of a male or female voice."""
    return tuple(
        Voice("espeak", language + variant, accent, gender)
        for accent, language in ACCENTS.items()
        for gender, variants in VARIANTS.items()
        for variant in variants
    )


class EspeakLibrary:
    """libespeak-ng, loaded and started; a context that unloads it.

    What it speaks depends on what it spoke before: the flutter of its pitch goes on from utterance to
    utterance (a static variable of wavegen.c), and its noise from a generator. One can be open at a
    time in a process: a second waits.

    Attributes:
      sample_rate: of the library, Hz.

    Args:
      seed: of the noise in breathy voices such as +f2. espeak-ng itself would take the time of day.

    Raises:
      MissingEngineError: espeakng-loader is not installed, or its library does not start.
    """

    def __init__(self, *, seed: int = 0) -> None:
        loader = _loader()
        data = Path(loader.get_data_path())
        self._variants = data / "voices" / "!v"
        _LOADED.acquire()
        try:
            self._library = ctypes.CDLL(str(loader.get_library_path()))
        except OSError as error:
            _LOADED.release()
            raise MissingEngineError(
                f"espeak-ng cannot be loaded ({error}): espeakng-loader may not suit this machine"
            ) from error
        self.sample_rate = self._library.espeak_Initialize(
            SYNCHRONOUS, 0, str(data.parent).encode(), KEEP_PROCESS
        )
        if self.sample_rate <= 0:
            self.close()
            raise MissingEngineError(
                f"espeak-ng did not start with the data in {data}: install espeakng-loader again, in a "
                "folder whose path is shorter than 140 characters"
            )
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._chunks: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = kind(self._collect)  # kept alive by self
        self._library.espeak_SetSynthCallback(self._callback)

    def __enter__(self) -> "EspeakLibrary":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unload the library, so that the next one starts anew."""
        self._library.espeak_Terminate()
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(self._library._handle))
        _LOADED.release()

    def say(
        self, text: str, voice: str, *, rate: int, pitch: int, spread: int = NORMAL_RANGE
    ) -> np.ndarray:
        """float32[n] mono at 16 kHz, of any length.

        Args:
          voice: language and variant, "en-us+f3".
          rate: words a minute, 80 to 450; 175 is normal.
          pitch: of the lowest tone, 0 to 99; 50 is normal, 0 an octave below.
          spread: of the intonation above it, 0 to 99; 50 is normal.

        Raises:
          SynthesisError: no such voice, or no sound at all.
        """
        # espeak-ng takes a variant that it does not know for none.
        variant = voice.partition("+")[2]
        known = not variant or (self._variants / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SynthesisError(
                f"espeak-ng has no voice {voice!r}; known_voices('espeak') lists some"
            )
        self._library.espeak_SetParameter(RATE, rate, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        self._library.espeak_SetParameter(RANGE, spread, 0)
        self._chunks.clear()
        spelled = text.encode() + b"\0"
        self._library.espeak_Synth(spelled, len(spelled), 0, 0, 0, UTF8, None, None)
        self._library.espeak_Synchronize()
        if not self._chunks:
            raise SynthesisError(f"espeak-ng gives no sound for {text!r} in the voice {voice!r}")
        sound = np.concatenate(self._chunks).astype(np.float32) / 32768
        return soxr.resample(sound, self.sample_rate, SAMPLE_RATE)

    def _collect(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def load() -> "EspeakSynthesizer":
    """The engine.

    Raises:
      MissingEngineError: espeakng-loader is not installed.
    """
    _loader()
    return EspeakSynthesizer()


def _loader() -> ModuleType:
    return optional_module("espeakng_loader", use="espeak-ng", extra="tts")


class EspeakSynthesizer:
    """espeak-ng without a memory: the samples of a text depend on text and voice alone.

    Loads the library anew for each text, 5 ms: what it keeps between two texts cannot be reset.
    """

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """float32[n] mono at 16 kHz; see `Synthesizer`."""
        octaves = PITCH_EXCESS * voice.pitch / 12
        with EspeakLibrary(seed=voice.seed) as library:
            samples = library.say(
                text,
                voice.name,
                rate=round(NORMAL_RATE * voice.rate),
                pitch=round(NORMAL_PITCH + PITCH_STEPS_PER_OCTAVE * octaves),
                spread=round(NORMAL_RANGE * 2**octaves),
            )
        return spoken(samples, text, voice)
