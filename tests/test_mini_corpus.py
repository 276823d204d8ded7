"""The corpus that ships in the package: complete, honest (nothing of eval in training) and small."""

import csv
import gzip
import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "llaso_jax" / "data" / "mini"
SPLITS = ("align_train", "instruct_train", "eval")
FORMS = re.compile(r" ?[a-z']+")  # a word at the start and inside a sentence: two tokens


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict]]:
    return {name: json.loads((CORPUS / f"{name}.json").read_text("utf-8")) for name in SPLITS}


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, str]]:
    with (CORPUS / "manifest.csv").open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def builder():
    path = ROOT / "scripts" / "build_mini_corpus.py"
    spec = importlib.util.spec_from_file_location("build_mini_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def voices(items: list[dict]) -> set[str]:
    return {path for item in items for path in item["voice"]}


def question(item: dict) -> str:
    return item["conversations"][0]["value"]


def answer(item: dict) -> str:
    return item["conversations"][1]["value"]


def test_the_whole_corpus_fits_in_eight_megabytes():
    size = sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file())
    assert size <= 8_000_000


def test_every_recording_is_listed_and_unchanged(manifest):
    files = {path.relative_to(CORPUS).as_posix(): path for path in CORPUS.rglob("*.opus")}
    assert set(files) == set(manifest)
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest[name]["sha256"], name


def test_every_recording_decodes_to_the_stated_length(manifest):
    for name, row in manifest.items():
        info = sf.info(CORPUS / name)
        assert (info.samplerate, info.channels) == (16_000, 1), name
        assert info.frames / info.samplerate == pytest.approx(float(row["seconds"]), abs=0.03), name


def test_records_are_well_formed(records, manifest):
    for name, items in records.items():
        assert len({item["id"] for item in items}) == len(items)
        for item in items:
            assert [turn["from"] for turn in item["conversations"]] == ["human", "gpt"]
            assert question(item).count("<audio>") == len(item["voice"])
            assert answer(item).strip() == answer(item) != ""
            wanted = "eval" if name == "eval" else "train"
            assert {manifest[path]["split"] for path in item["voice"]} == {wanted}


def test_no_eval_recording_is_in_training(records, manifest):
    train = voices(records["align_train"]) | voices(records["instruct_train"])
    held_out = voices(records["eval"])
    assert not train & held_out
    assert not {manifest[p]["sha256"] for p in train} & {manifest[p]["sha256"] for p in held_out}

    def content(paths: set[str]) -> set[str]:
        """What is heard, whatever the level and the silence around it."""
        hashes = set()
        for path in paths:
            sound, _ = sf.read(CORPUS / path, dtype="float32")
            loud = np.flatnonzero(np.abs(sound) > 0.05 * np.abs(sound).max())
            sound = sound[loud[0] : loud[-1] + 1]
            coarse = np.round(sound / np.abs(sound).max() * 100).astype(np.int8)
            hashes.add(hashlib.sha256(coarse.tobytes()).hexdigest())
        return hashes

    assert not content(train) & content(held_out)


def test_eval_voices_and_speeds_are_not_in_training(manifest):
    seen = defaultdict(lambda: defaultdict(set))
    for row in manifest.values():
        if row["source"] == "synthetic":
            for column in ("voice", "rate", "pitch"):
                seen[column][row["split"]].add(row[column])
    for column, sides in seen.items():
        assert not sides["train"] & sides["eval"], column


def test_human_prompts_are_shorter_than_four_words(manifest, builder, tmp_path):
    human = [row for row in manifest.values() if row["source"] == "human"]
    assert len(human) > 150
    assert all(1 <= len(row["text"].split()) <= 3 for row in human)
    assert all(row["origin"] for row in human)
    # and the builder counts with care: a hyphen separates words, odd prompts are not used
    sounds = tmp_path / "en_US_f_Allison"
    sounds.mkdir()
    lines = "a: One two three.\nb: One two three four.\nc: To re-record it.\nd: [beep]\ne: Hello!\n"
    (tmp_path / "core-sounds-en.txt.gz").write_bytes(gzip.compress(lines.encode()))
    for name in "abcde":
        (sounds / f"{name}.wav").touch()
    assert [text for _, text, _ in builder.human_prompts(tmp_path)] == ["one two three", "hello"]


def test_human_eval_words_are_taught_by_synthetic_voices(records, manifest):
    learned = [
        item
        for item in [*records["align_train"], *records["instruct_train"]]
        if item["metadata"]["task"] == "ASR"
    ]
    held_out = [item for item in records["eval"] if item["metadata"]["source"] == "human"]
    spoken = [item for item in held_out if item["metadata"]["task"] == "ASR"]
    assert len(spoken) >= 10
    # Taught by many synthetic voices, not by a single human recording.
    by_voices = {
        form
        for item in learned
        if item["voice"][0].split("/")[1] != "human"
        for form in FORMS.findall(answer(item))
    }
    assert {form for item in spoken for form in FORMS.findall(answer(item))} <= by_voices


def test_splits_hold_the_tasks_and_layouts(records):
    assert {item["metadata"]["task"] for item in records["align_train"]} == {"ASR"}
    assert all(len(answer(item).split()) <= 2 for item in records["align_train"])
    tasks = {item["metadata"]["task"] for item in records["instruct_train"]}
    assert tasks == {"ASR", "SCR", "IP", "EE", "SGC", "AC", "SSD", "SV", "AQA"}
    assert {item["metadata"]["task"] for item in records["eval"]} == tasks
    for name in ("instruct_train", "eval"):
        layouts = Counter()
        for item in records[name]:
            if question(item).startswith("Please listen to the audio"):
                layouts["a"] += 1
            elif question(item).startswith("<audio>"):
                layouts["a,t"] += 1
            else:
                layouts["t,a"] += 1
        assert set(layouts) == {"a", "a,t", "t,a"}
        assert {len(item["voice"]) for item in records[name]} == {1, 2}
    templates = {question(item) for item in records["align_train"]}
    assert len(templates) == 18


def test_eval_answers_can_be_scored(records):
    by_task = defaultdict(list)
    for item in records["eval"]:
        metadata = item["metadata"]
        assert metadata["metric"] in ("wer", "accuracy")
        assert ("labels" in metadata) == (metadata["metric"] == "accuracy")
        if "labels" in metadata:
            assert answer(item) in metadata["labels"]
            by_task[metadata["task"]].append(answer(item))
    for task, answers in by_task.items():
        common = Counter(answers).most_common(1)[0][1]
        assert common / len(answers) <= 0.55, f"{task}: one answer is most of the split"


def test_tokenizer_is_small_lossless_and_knows_the_words(records):
    tokenizer = Tokenizer.from_file(str(CORPUS / "tokenizer" / "tokenizer.json"))
    config = json.loads((CORPUS / "tokenizer" / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer.get_vocab_size() <= 1024
    special = config["additional_special_tokens"]
    assert special[0] == config["bos_token"]
    assert [tokenizer.encode(token).ids for token in special] == [[i] for i in range(len(special))]
    for text in ("turn on the light", "Ünïcode 日本 🎧\n\n  two  spaces", "\tTab\r\nline"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for item in records["eval"]:
        words = answer(item).split()
        pieces = tokenizer.encode("\n\n" + answer(item)).tokens
        assert len(pieces) == len(words) + 1, pieces  # the line breaks are one token


def test_missing_espeak_is_explained(builder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(SystemExit, match=r"pip install 'llaso-jax\[tts\]'"):
        builder.main(["--asterisk", str(tmp_path)])


def test_missing_asterisk_packages_are_explained(builder, tmp_path):
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed (extra tts)")
    with pytest.raises(SystemExit, match="asterisk-core-sounds-en-wav"):
        builder.main(["--asterisk", str(tmp_path), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="neither a folder nor"):
        builder.main(["--asterisk", str(tmp_path / "absent.deb"), "--output", str(tmp_path)])


def test_help_says_what_is_needed(builder, capsys):
    with pytest.raises(SystemExit) as stop:
        builder.main(["--help"])
    assert stop.value.code == 0
    assert "--asterisk" in capsys.readouterr().out
