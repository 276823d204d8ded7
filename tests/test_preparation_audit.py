"""What of evaluation data is in training data: found in texts and sounds, also after changes; nothing else is."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr

from llaso_jax.data.audio import load_audio
from llaso_jax.errors import ConfigError
from llaso_jax.preparation.audit import Source, audit, compare_texts
from llaso_jax.preparation.fingerprint import (
    FingerprintIndex,
    content_hash,
    fingerprint,
    most_wrong,
)
from llaso_jax.preparation.grams import Grams, runs
from llaso_jax.preparation.records import asr_record, record, write_records
from llaso_jax.prepare import main

RATE = 16_000
HUMAN = Path(__file__).parents[1] / "llaso_jax" / "data" / "mini" / "audio" / "human"

EVALUATION = [
    Source("e0", "Please enter the number of your account, then press one."),
    Source("e1", "The meeting is over."),
    Source("e2", "Yes."),
]


@pytest.mark.parametrize(
    ("text", "equal", "overlapping", "short"),
    [
        ("please ENTER the number of your account then press 1", 1, 0, 0),
        ("You must enter the number of your car here.", 0, 1, 0),  # five words in a row
        ("Enter the number of your", 0, 1, 0),  # nothing but the run
        ("You must enter the number on your car here.", 0, 0, 0),  # three
        ("I said the meeting is over now.", 0, 1, 0),  # all of a text of four words
        ("The meeting was over.", 0, 0, 0),
        ("yes", 0, 0, 1),
        ("Yes, I said yes to it all.", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_texts_are_found_by_equal_words_and_by_runs(text, equal, overlapping, short):
    found = compare_texts([Source("t", text)], EVALUATION)
    assert (found.equal, found.overlapping, found.short) == (equal, overlapping, short)
    assert found.touched == equal + overlapping
    assert len(found.examples) == equal + overlapping


def test_run_0_finds_equal_texts_only():
    train = [
        Source("t", "You must enter the number of your car."),
        Source("u", "The meeting is over!"),
    ]
    found = compare_texts(train, EVALUATION, run=0)
    assert (found.equal, found.overlapping) == (1, 0)


def test_hashed_runs_find_what_the_comparison_finds():
    grams = Grams.of(source.value for source in EVALUATION)
    texts = [
        "You must enter the number of your car here.",
        "I said the meeting is over now.",
        "yes",
    ]
    for text in texts:
        found = compare_texts([Source("t", text)], EVALUATION)
        assert (grams.shared(text) is not None) == bool(found.equal + found.overlapping)


def test_runs_of_a_short_text_are_all_of_it():
    assert list(runs(("a", "b", "c", "d"))) == [("a", "b", "c", "d")]
    assert list(runs(("a", "b", "c"))) == []
    assert list(runs(tuple("abcdef"))) == [tuple("abcde"), tuple("bcdef")]


# --- sounds ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    """Real speech of about 2 s each, three short recordings joined."""
    files = sorted(HUMAN.glob("*.opus"))[:60]
    sounds = [load_audio(file).samples for file in files]
    return {f"clip{i}": np.concatenate(sounds[3 * i : 3 * i + 3]) for i in range(len(sounds) // 3)}


@pytest.fixture(scope="module")
def index(clips) -> FingerprintIndex:
    return FingerprintIndex({name: fingerprint(sound) for name, sound in clips.items()})


def coded(sound: np.ndarray, folder: Path, **form: str) -> np.ndarray:
    path = folder / "coded"
    with sf.SoundFile(path, "w", RATE, 1, **form) as file:
        file.write(sound)
    return load_audio(path).samples


def telephone(sound: np.ndarray) -> np.ndarray:
    return soxr.resample(soxr.resample(sound, RATE, 8000), 8000, RATE)


def noisy(sound: np.ndarray, snr_db: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(sound)).astype(np.float32)
    scale = np.sqrt(np.mean(sound**2) / 10 ** (snr_db / 10))
    return sound + scale * noise


CHANGES = {
    "as it is": lambda sound, folder: sound,
    "opus": lambda sound, folder: coded(sound, folder, format="OGG", subtype="OPUS"),
    "mp3": lambda sound, folder: coded(sound, folder, format="MP3", subtype="MPEG_LAYER_III"),
    "mu-law": lambda sound, folder: coded(sound, folder, format="WAV", subtype="ULAW"),
    "telephone band": lambda sound, folder: telephone(sound),
    "softer": lambda sound, folder: sound * 0.05,
    "noise at 20 dB": lambda sound, folder: noisy(sound, 20),
    "shifted and padded": lambda sound, folder: np.pad(sound, (12_345, 5_000)),
    "beginning cut off": lambda sound, folder: sound[1_600:],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recording_is_found_as_itself_alone(clips, index, tmp_path, change):
    for name, sound in list(clips.items())[:3]:
        found = index.find(fingerprint(CHANGES[change](sound, tmp_path)))
        assert [match.name for match in found] == [name]


def test_a_recording_is_found_within_a_longer_one(clips, index):
    names = list(clips)[:2]
    pause = np.zeros(8_000, np.float32)
    joined = np.concatenate([clips[names[0]], pause, clips[names[1]]])
    found = {match.name: match.offset for match in index.find(fingerprint(joined))}
    assert set(found) == set(names)
    assert found[names[0]] == 0
    assert found[names[1]] * 80 / 5_000 == pytest.approx(
        (len(clips[names[0]]) + len(pause)) / RATE, abs=0.05
    )


def test_other_recordings_of_the_same_speaker_are_not_found(clips):
    names = list(clips)
    known, others = names[: len(names) // 2], names[len(names) // 2 :]
    index = FingerprintIndex({name: fingerprint(clips[name]) for name in known})
    assert [index.find(fingerprint(clips[name])) for name in others] == [[] for _ in others]


def test_scraps_that_agree_by_chance_are_not_found(clips):
    """Short pieces against much longer recordings: at one of many places 70 % of a few bits agree."""
    names = list(clips)
    joined = np.concatenate([clips[name] for name in names[:10]])
    index = FingerprintIndex({"long": fingerprint(joined)})
    pieces = [
        clips[name][start : start + length]
        for name in names[10:]
        for length in (7_000, 9_000, 12_000)
        for start in range(0, len(clips[name]) - length, 1_000)
    ]
    assert len(pieces) > 300
    assert [match for piece in pieces for match in index.find(fingerprint(piece))] == []
    assert most_wrong(50) < most_wrong(100) < most_wrong(200) == most_wrong(2000)


def test_a_second_of_a_recording_is_found(clips, index):
    assert [match.name for match in index.find(fingerprint(clips["clip3"][:RATE]))] == ["clip3"]


def test_silence_is_like_nothing(index):
    assert index.find(fingerprint(np.zeros(RATE, np.float32))) == []
    assert index.find(fingerprint(np.zeros(10, np.float32))) == []
    assert FingerprintIndex({}).find(fingerprint(np.ones(RATE, np.float32))) == []


def test_a_lossless_copy_has_the_same_content(clips, tmp_path):
    sound = np.round(clips["clip0"] * 32767).astype(np.int16)
    for name in ("a.wav", "a.flac"):
        sf.write(tmp_path / name, sound, RATE, subtype="PCM_16")
    first, second = (load_audio(tmp_path / name).samples for name in ("a.wav", "a.flac"))
    assert content_hash(first) == content_hash(second) != content_hash(first[:-1])


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, clips) -> dict[str, Path]:
    """Training data that holds a text of evaluation, a copy of a recording and a coded one; and clean data."""
    for name, sound in clips.items():
        sf.write(tmp_path / f"{name}.wav", sound, RATE)
    sf.write(tmp_path / "copy.flac", load_audio(tmp_path / "clip0.wav").samples, RATE)
    with sf.SoundFile(tmp_path / "coded.mp3", "w", RATE, 1) as file:
        file.write(clips["clip1"])
    ask = "Transcribe the audio."
    files = {
        "eval": [
            asr_record("e0", "clip0.wav", ask, "this is the first of them"),
            asr_record("e1", "clip1.wav", ask, "and now the second one"),
            record("e2", "SGC", "clip2.wav", "(t,a)", "Who?", "male", labels=["male"], text="a third is here too"),
        ],
        "dirty": [
            asr_record("t0", "copy.flac", ask, "something else"),
            asr_record("t1", "coded.mp3", ask, "quite another text here"),
            record("t2", "SGC", "clip5.wav", "(t,a)", "Who?", "male", labels=["male"], text="A third is here too!"),
        ],
        "clean": [
            asr_record("t0", "clip6.wav", ask, "nothing of the sort was said"),
            record("t1", "SGC", "clip7.wav", "(t,a)", "Who?", "male", labels=["male"], text="this is another one"),
        ],
    }  # fmt: skip
    return {name: write_records(items, tmp_path / f"{name}.json") for name, items in files.items()}


def test_leaks_are_counted_shown_and_end_with_code_1(folders, tmp_path, capsys):
    files = ["--train", str(folders["dirty"]), "--eval", str(folders["eval"])]
    code = main(["audit", *files, "--output", str(tmp_path / "audit")])
    assert code == 1
    out = capsys.readouterr().out
    assert out.startswith("LEAKS: 3\n")
    assert "t2: 'A third is here too!' has 'a 3rd is here too' of e2" in out
    assert (tmp_path / "audit" / "audit.txt").read_text(encoding="utf-8") == out
    tree = json.loads((tmp_path / "audit" / "audit.json").read_text(encoding="utf-8"))
    assert tree["leaks"] == 3
    assert (tree["texts"]["equal"], tree["texts"]["overlapping"]) == (1, 0)
    assert (tree["audio"]["equal"], tree["audio"]["similar"]) == (1, 1)
    paired = {Path(e["train"]).name: Path(e["evaluation"]).name for e in tree["audio"]["examples"]}
    assert paired == {"copy.flac": "clip0.wav", "coded.mp3": "clip1.wav"}


def test_clean_data_ends_with_code_0(folders, capsys):
    assert main(["audit", "--train", str(folders["clean"]), "--eval", str(folders["eval"])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no leak: 0\n")
    assert "recordings: 2 of training, 3 of evaluation" in out


def test_instructions_and_labels_are_no_texts(folders):
    found = audit([folders["clean"]], [folders["eval"]], audio=False)
    assert found.audio is None
    assert (found.texts.train, found.texts.evaluation) == (2, 3)
    assert found.leaks == 0


def test_runs_that_are_common_property_are_refused(folders):
    with pytest.raises(ConfigError, match="run of 2 words"):
        audit([folders["clean"]], [folders["eval"]], run=2)


def test_a_missing_file_is_told(tmp_path, capsys):
    missing = str(tmp_path / "absent.json")
    assert main(["audit", "--train", missing, "--eval", missing]) == 1
    assert "absent.json cannot be read" in capsys.readouterr().err
