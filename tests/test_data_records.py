"""Records are found in files of any size and shape without loading them; errors say where."""

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from llaso_jax.data import json_index
from llaso_jax.data.json_index import load_index, scan_records
from llaso_jax.data.records import RecordSource
from llaso_jax.errors import DataError


def record(i, **extra):
    text = f'tricky "quotes" \\ {{braces}} ] , [ é😀 \\" {i} ' + "\\" * (i % 5)
    turns = [{"from": "human", "value": "Hi<audio>"}, {"from": "gpt", "value": text}]
    return {"voice": [f"wavs\\{i}.wav"], "conversations": turns, "metadata": {"n": [i]}, **extra}


RECORDS = [record(i) for i in range(23)]
LAYOUTS = {
    "compact": lambda: json.dumps(RECORDS, separators=(",", ":")),
    "pretty": lambda: json.dumps(RECORDS, indent=4, ensure_ascii=False),
    "one per line": lambda: "[\n" + ",\n".join(json.dumps(r) for r in RECORDS) + "\n]\n",
    "lines": lambda: "\n".join(json.dumps(r) for r in RECORDS),
    "lines with blanks": lambda: "\n" + "\r\n\n".join(json.dumps(r) for r in RECORDS) + "\n\n",
    "byte order mark": lambda: "\ufeff" + json.dumps(RECORDS),
}


def write(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("block", [1, 7, 64, 1000, 8 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_record_is_found_in_every_layout_and_block_size(tmp_path, monkeypatch, layout, block):
    monkeypatch.setattr(json_index, "BLOCK_BYTES", block)
    source = RecordSource([write(tmp_path, LAYOUTS[layout]())])
    assert [source[i].fields for i in range(len(source))] == RECORDS


def test_empty_arrays_and_files_have_no_records(tmp_path):
    for text in ("[]", " [ \n ] ", "", "\n"):
        assert len(RecordSource([write(tmp_path, text)])) == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"voice": 1}, 2', "malformed JSON at byte"),
        ('[{"a": 1}, {"b": 2}', r"'\]' is needed.*byte 19"),
        ('[{"a": 1}, {"b": "2', "ends inside a record.*starts at byte 11"),
        ('[{"a": 1} {"b": 2}]', "'' where ',' is needed.*byte 9"),
        ('[{"a": 1}, 3, {"b": 2}]', "',3,' where ',' is needed.*byte 9"),
        ('[{"a": 1}],', r"'\],' where '\]'"),
        ("[1, 2]", "objects only"),
        ("hello", "starts with b'h'"),
    ],
)
def test_malformed_files_are_refused_with_the_byte(tmp_path, text, problem):
    with pytest.raises(DataError, match=problem):
        RecordSource([write(tmp_path, text)])[0]


def test_a_malformed_record_names_its_place_and_leaves_others_readable(tmp_path):
    good = json.dumps(RECORDS[0])
    text = f'[{good}, {{"voice": é oops}}, {good}]'
    source = RecordSource([write(tmp_path, text)])
    byte = len(good) + 3
    with pytest.raises(DataError, match=rf"at byte {byte + 10}: .*record 1 \(byte {byte}\)"):
        source[1]
    assert source[2].fields == RECORDS[0]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"conversations": []}, "no 'voice' among"),
        ({"id": 7}, r"no 'voice' nor 'conversations'.*sample '7'"),
        ({"voice": 3, "conversations": []}, "'voice' is 3"),
        ({"voice": [""], "conversations": []}, "'voice' is"),
        ({"voice": "a", "conversations": "hi"}, "'conversations' is a str"),
        ({"voice": "a", "conversations": [{"from": "human"}]}, "turn 0"),
        ([1], "a list where an object"),
    ],
)
def test_missing_or_mistyped_keys_are_refused_with_the_position(tmp_path, fields, problem):
    lines = json.dumps(RECORDS[0]) + "\n" + json.dumps(fields)
    source = RecordSource([write(tmp_path, lines)])
    with pytest.raises(DataError, match=problem) as error:
        source[1]
    assert "record 1 (byte " in str(error.value)


def test_paths_take_either_separator_and_start_at_the_data_root(tmp_path):
    path = write(tmp_path, json.dumps([record(0), record(1, voice="b/c.wav", id="x")]))
    default = RecordSource([path])
    assert default[0].voices == (tmp_path / "wavs" / "0.wav",)
    rooted = RecordSource([path], data_root="/data")
    assert str(rooted[1].voices[0]) == "/data/b/c.wav"
    assert (rooted[0].sample_id, rooted[1].sample_id) == ("data.json:0", "x")


def test_several_files_follow_each_other(tmp_path):
    paths = []
    for name, part in (("a.json", RECORDS[:5]), ("b.json", []), ("c.jsonl", RECORDS[5:])):
        (tmp_path / name).write_text(
            json.dumps(part) if name != "c.jsonl" else "\n".join(map(json.dumps, part))
        )
        paths.append(tmp_path / name)
    source = RecordSource(paths)
    assert [source[i].fields for i in range(len(source))] == RECORDS
    assert source[5].sample_id == "c.jsonl:0"
    with pytest.raises(IndexError):
        source[23]


def test_index_is_kept_and_renewed_when_the_file_changes(tmp_path, monkeypatch):
    path, cache = write(tmp_path, json.dumps(RECORDS)), tmp_path / "cache" / "deep"
    assert len(load_index(path, cache)) == 23
    assert len(list(cache.iterdir())) == 1

    def scan(file):
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(json_index, "scan_records", scan)
        assert len(load_index(path, cache)) == 23
    write(tmp_path, json.dumps(RECORDS[:9]))
    assert len(load_index(path, cache)) == 9


def test_a_failed_scan_leaves_no_index(tmp_path):
    path = write(tmp_path, "[1]")
    with pytest.raises(DataError):
        load_index(path)
    assert list(tmp_path.iterdir()) == [path]


def test_source_is_small_to_pickle_and_safe_to_read_from_threads(tmp_path):
    source = RecordSource([write(tmp_path, json.dumps(RECORDS))])
    assert len(pickle.dumps(source)) < 1000
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        numbers = [i % 23 for i in range(400)]
        fields = [r.fields for r in pool.map(copy.__getitem__, numbers)]
    assert fields == [RECORDS[i] for i in numbers]


def test_missing_file_and_no_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        RecordSource([tmp_path / "none.json"])
    with pytest.raises(DataError, match="no data file"):
        RecordSource([])


def test_scan_yields_blocks_not_the_whole_file(monkeypatch):
    monkeypatch.setattr(json_index, "BLOCK_BYTES", 256)
    file = io.BytesIO(json.dumps(RECORDS).encode())
    file.name = "memory"
    assert sum(len(block) > 0 for block in scan_records(file)) > 5


def test_index_of_a_folder_that_cannot_be_written_goes_to_the_user_cache(tmp_path, monkeypatch):
    path = write(tmp_path, json.dumps(RECORDS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(json_index.os, "access", lambda *args: False)
    assert len(load_index(path)) == 23
    assert len(list((tmp_path / "cache" / "llaso_jax").iterdir())) == 1


def test_an_index_that_cannot_be_kept_names_the_setting(tmp_path):
    path = write(tmp_path, json.dumps(RECORDS))
    with pytest.raises(DataError, match="set `index_dir`"):
        load_index(path, path / "not a folder")
