"""The held-out human prompts: read from packages or a folder, all of four words or more, remarks left out."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from debian_packages import debian_package

from llaso_jax.data.records import RecordSource
from llaso_jax.errors import DataError
from llaso_jax.preparation.asterisk import PACKAGES, held_out, read_prompts, write_held_out
from llaso_jax.preparation.debian import unpack
from llaso_jax.preparation.grams import Grams
from llaso_jax.prepare import main

TRANSCRIPTS = """\
; a heading
a: One two three.
b: One two three four.
keys/c: Press * to go on, or # to leave.
d: [a beep] Only three words
e: Now leave your word. (simple tone)
f: [beep]
g: To re-record it.
lost: There is no recording of this.
"""


@pytest.fixture
def unpacked(tmp_path) -> Path:
    """Both packages in one folder, with a recording for each transcript but one."""
    sounds = tmp_path / "both" / "usr" / "share" / "asterisk" / "sounds" / "en_US_f_Allison"
    (sounds / "keys").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "keys/c", "d", "e", "f", "g")):
        tone = np.sin(np.arange(4000) * 0.01 * (number + 1)).astype(np.float32) / 2
        sf.write(sounds / f"{name}.wav", tone, 8000)
    texts = tmp_path / "both" / "usr" / "share" / "doc"
    texts.mkdir()
    (texts / "core-sounds-en.txt.gz").write_bytes(gzip.compress(TRANSCRIPTS.encode()))
    return tmp_path / "both"


def test_prompts_of_four_words_or_more_are_held_out(unpacked):
    prompts = held_out(read_prompts(unpacked))
    assert (
        {prompt.name: prompt.text for prompt in prompts}
        == {
            "b": "One two three four.",
            "e": "Now leave your word.",
            "g": "To re-record it.",  # a hyphen separates: nothing that may count as four words is trained on
            "keys/c": "Press star to go on, or pound to leave.",
        }
    )


def test_remarks_and_missing_recordings_are_no_prompts(unpacked):
    assert [prompt.name for prompt in read_prompts(unpacked)] == ["a", "b", "d", "e", "g", "keys/c"]


def test_the_command_writes_an_evaluation_set(unpacked, tmp_path, capsys):
    output = tmp_path / "held-out"
    assert main(["asterisk", str(unpacked), "--output", str(output)]) == 0
    assert "4 prompts of 21 words" in capsys.readouterr().err
    source = RecordSource([output / "eval.json"])
    assert len(source) == 4
    for record in (source[i] for i in range(len(source))):
        assert record.fields["metadata"] == {"task": "ASR", "metric": "wer", "source": "human"}
        original = next(unpacked.rglob(f"{record.sample_id}.wav"))
        assert record.voices[0].read_bytes() == original.read_bytes()
    assert "CC BY-SA 3.0" in (output / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert Grams.load(output / "grams.json").shared("so press star to go on")


def test_packages_are_read_as_their_content(unpacked, tmp_path):
    deb = debian_package(unpacked, tmp_path / "sounds.deb")
    (tmp_path / "scratch").mkdir()
    root = unpack([deb], tmp_path / "scratch", fetch=PACKAGES)
    assert held_out(read_prompts(root)) == [
        prompt._replace(file=root / prompt.file.relative_to(unpacked))
        for prompt in held_out(read_prompts(unpacked))
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PK..", "no Debian package"),
        (b"!<arch>\n", "holds no files"),
    ],
)
def test_what_is_no_package_is_refused(tmp_path, content, told):
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(DataError, match=told):
        unpack([tmp_path / "x.deb"], tmp_path, fetch=PACKAGES)


def test_a_package_writes_nothing_outside_of_its_folder(unpacked, tmp_path):
    deb = debian_package(unpacked, tmp_path / "x.deb", at="../escaped")
    with pytest.raises(DataError, match=r"holds '\.\./escaped/.*', a path outside of its folder"):
        unpack([deb], tmp_path / "scratch", fetch=PACKAGES)
    assert not (tmp_path / "escaped").exists()


def test_a_package_of_unknown_compression_is_refused(unpacked, tmp_path):
    deb = debian_package(unpacked, tmp_path / "x.deb")
    deb.write_bytes(deb.read_bytes().replace(b"\xfd7zXZ", b"(\xb5/\xfdX", 1))
    with pytest.raises(DataError, match=r"data\.tar\.xz cannot be unpacked"):
        unpack([deb], tmp_path, fetch=PACKAGES)


def test_one_package_alone_is_not_enough(tmp_path):
    (tmp_path / "core-sounds-en.txt.gz").write_bytes(gzip.compress(b"a: b\n"))
    with pytest.raises(DataError, match="asterisk-core-sounds-en-wav"):
        read_prompts(tmp_path)


def test_records_are_json_that_says_how_to_score(unpacked, tmp_path):
    path = write_held_out(held_out(read_prompts(unpacked)), tmp_path)
    first = json.loads(path.read_text(encoding="utf-8"))[0]
    assert first["voice"] == ["audio/b.wav"]
    assert first["conversations"][0]["value"] == "Transcribe the audio.<audio>"
    assert first["conversations"][1]["value"] == "One two three four."
