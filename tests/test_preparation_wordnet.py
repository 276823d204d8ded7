"""Sentences of WordNet: its examples that can be read aloud, from a package or a folder, into a corpus."""

from pathlib import Path

import pytest
from debian_packages import debian_package

from llaso_jax.errors import DataError
from llaso_jax.preparation.texts import read_texts, source_of
from llaso_jax.preparation.wordnet import example_sentences
from llaso_jax.prepare import main

NOUNS = """\
  1 This software and database is being provided to you
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is "perceived" to exist; "he saw an entity, far away"
00002000 03 n 01 hour 0 000 | a time; "it took 2 hours to get home"; "it took two hours to get home"; "a short one"
00003000 03 n 01 dolt 0 000 | an insulting word; "he is a dolt and nothing else"
"""
VERBS = """\
00001000 29 v 01 run 0 000 | move fast; "She ran, didn't she, all the way?"; "It took two hours to get home!"
00002000 29 v 01 wait 0 000 | stay; "he waited...and waited for her"; "they waited for the café to open"
"""
SENTENCES = [
    "he saw an entity, far away",
    "it took two hours to get home",
    "She ran, didn't she, all the way?",
]


@pytest.fixture
def unpacked(tmp_path) -> Path:
    folder = tmp_path / "package" / "usr" / "share" / "wordnet"
    folder.mkdir(parents=True)
    for kind, content in {"adj": "", "adv": "", "noun": NOUNS, "verb": VERBS}.items():
        (folder / f"data.{kind}").write_text(content, encoding="utf-8")
    return tmp_path / "package"


def test_examples_that_can_be_read_aloud_are_taken_once(unpacked):
    assert example_sentences(unpacked) == SENTENCES


def test_the_command_writes_a_file_of_texts_that_names_its_source(unpacked, tmp_path, capsys):
    package = debian_package(unpacked, tmp_path / "wordnet.deb")
    output = tmp_path / "new" / "sentences.txt"
    assert main(["wordnet", str(package), "--output", str(output)]) == 0
    assert read_texts(output) == SENTENCES
    assert "Princeton University" in source_of(output)
    assert "3 sentences" in capsys.readouterr().err


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds 0 of the 4 files .*apt-get download wordnet-base"):
        example_sentences(tmp_path)
