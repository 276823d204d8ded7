"""The prompts of the Debian packages asterisk-core-sounds-en and -en-wav: human speech that anyone can fetch.

One female speaker, 8 kHz, CC BY-SA 3.0. Prompts of `HELD_OUT_WORDS` words or more are a test set of this project, and
nothing here is trained on them; shorter ones may be.
"""

import gzip
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llaso_jax.errors import DataError
from llaso_jax.preparation.grams import Grams
from llaso_jax.preparation.records import ASR_TEMPLATES, asr_record, write_records

HELD_OUT_WORDS = 4
PACKAGES = "apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav"
TRANSCRIPTS = "core-sounds-en.txt.gz"
SOUNDS = "en_US_f_Allison"
ATTRIBUTION = """\
The recordings in audio/ are unchanged files of the Debian package asterisk-core-sounds-en-wav: Asterisk core sounds,
English, spoken by Allison Smith, Copyright Digium, Inc., licensed CC BY-SA 3.0
(https://creativecommons.org/licenses/by-sa/3.0/). The transcripts are of asterisk-core-sounds-en, without remarks on
what is not speech. They are a test set: do not train on them.
"""

_NOT_SPEECH = re.compile(r"\[[^]]*\]|\([^)]*\)|<[^>]*>")
_SPOKEN = {"*": "star", "#": "pound"}  # keys of a telephone


class Prompt(NamedTuple):
    """name: "dictate/pause"; text: as transcribed, remarks such as [beep] left out; file: 8 kHz PCM."""

    name: str
    text: str
    file: Path

    @property
    def words(self) -> int:
        """How many; a hyphen separates, which holds out rather more than fewer."""
        return len(self.text.replace("-", " ").split())


def read_prompts(root: Path) -> list[Prompt]:
    """Every prompt that has a transcript and a recording, by name.

    Raises:
        DataError: `root` holds not both packages.
    """
    transcripts = sorted(root.rglob(TRANSCRIPTS))
    sounds = sorted(root.rglob(SOUNDS))
    if not transcripts or not sounds:
        raise DataError(
            f"{root} holds no {TRANSCRIPTS} or no folder {SOUNDS}; both asterisk-core-sounds-en and "
            f"asterisk-core-sounds-en-wav (1.6.1) are needed: {PACKAGES}"
        )
    prompts = []
    for line in gzip.decompress(transcripts[0].read_bytes()).decode("utf-8").splitlines():
        name, colon, said = line.partition(": ")
        if line.startswith(";") or not colon:
            continue
        text = " ".join(_NOT_SPEECH.sub(" ", said).split())
        file = sounds[0] / f"{name}.wav"
        if text and file.is_file():
            prompts.append(Prompt(name, text, file))
    return sorted(prompts)


def held_out(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those of `HELD_OUT_WORDS` words or more, with the keys * and # as words."""
    return [
        prompt._replace(text=" ".join(_SPOKEN.get(word, word) for word in prompt.text.split()))
        for prompt in prompts
        if prompt.words >= HELD_OUT_WORDS
    ]


def write_held_out(prompts: Sequence[Prompt], output: Path) -> Path:
    """Write the held-out prompts as an evaluation set: eval.json, audio/ (copies), ATTRIBUTION.txt, and grams.json,
    the hashed runs of words that training texts may not share (`HELD_OUT_GRAMS` is a copy of it).

    Returns:
        The JSON file.
    """
    records = []
    for prompt in prompts:
        path = f"audio/{prompt.name}.wav"
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(prompt.file, output / path)
        records.append(asr_record(prompt.name, path, ASR_TEMPLATES[0], prompt.text, source="human"))
    Grams.of(prompt.text for prompt in prompts).save(output / "grams.json")
    (output / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
    return write_records(records, output / "eval.json")
