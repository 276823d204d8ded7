"""Features come back from disk as they were, of the very same audio and encoder, or not at all."""

import errno
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llaso_jax.data.config import AudioLayout
from llaso_jax.data.encoder_cache import IDENTITY_FILE, EncoderCache
from llaso_jax.errors import ConfigError

WIDTH = 6
TRIMMED = AudioLayout(mode="trimmed", stack=4, mel_bins=8)
rng = np.random.default_rng(0)
MEL = rng.normal(size=(8, 30)).astype(np.float32)
FEATURES = rng.normal(size=(16, WIDTH)).astype(np.float32)


def cache(folder, *, identity=None, layout=TRIMMED, dtype="float32", limit=10**9, **options):
    return EncoderCache(
        folder,
        identity=identity or {"weights": "w"},
        layout=layout,
        width=WIDTH,
        dtype=dtype,
        limit_bytes=limit,
        **options,
    )


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
def test_features_come_back_bit_for_bit(tmp_path, dtype):
    written = FEATURES.astype(dtype)
    ours = cache(tmp_path, dtype=dtype)
    name = ours.name(MEL, 30, 3000)
    assert name not in ours
    assert ours.read(name, 16) is None
    ours.write(name, written)
    again = cache(tmp_path, dtype=dtype)
    assert name in again
    found = again.read(name, 16)
    assert found is not None
    assert found.dtype == written.dtype
    assert found.tobytes() == written.tobytes()


def test_the_name_is_of_all_that_the_encoder_reads(tmp_path):
    ours = cache(tmp_path)
    quieter = MEL.copy()
    quieter[0, 0] -= 1e-6
    names = {
        ours.name(MEL, 30, 3000),
        ours.name(quieter, 30, 3000),
        ours.name(MEL, 29, 3000),
        ours.name(MEL, 30, 1000),
        ours.name(MEL.reshape(10, 24), 30, 3000),
    }
    assert len(names) == 5
    assert ours.name(MEL.copy(), 30, 3000) in names


@pytest.mark.parametrize(
    "other",
    [
        {"identity": {"weights": "v"}},
        {"layout": AudioLayout(mode="padded", stack=4, mel_bins=8)},
        {"layout": AudioLayout(mode="trimmed", stack=2, mel_bins=8)},
        {"dtype": ml_dtypes.bfloat16},
    ],
    ids=["weights", "mode", "stack", "dtype"],
)
def test_another_encoder_finds_nothing(tmp_path, other):
    ours = cache(tmp_path)
    ours.write("00ff", FEATURES)
    assert "00ff" not in cache(tmp_path, **other)
    assert (ours.folder / IDENTITY_FILE).read_text().count('"weights": "w"') == 1


@pytest.mark.parametrize("stack", [1, 4])
def test_only_frames_that_reach_the_language_model_are_kept(tmp_path, stack):
    kept = {
        mode: cache(tmp_path, layout=AudioLayout(mode=mode, stack=stack)).kept_frames
        for mode in ("padded", "trimmed", "true_length")
    }
    assert kept["padded"](30, 3000) == 1500
    assert kept["trimmed"](30, 3000) == (15 if stack == 1 else 16)
    # No more than there are.
    assert kept["true_length"](30, 30) == 15


@pytest.mark.parametrize(
    "harm",
    [lambda b: b[:-5], lambda b: b"", lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:]],
    ids=["cut off", "empty", "a bit has changed"],
)
def test_a_damaged_file_counts_as_none_and_is_written_again(tmp_path, harm):
    ours = cache(tmp_path)
    ours.write("00ff", FEATURES)
    (path,) = ours.folder.glob("*/00ff")
    path.write_bytes(harm(path.read_bytes()))
    assert ours.read("00ff", 16) is None
    ours.write("00ff", FEATURES)
    assert ours.read("00ff", 16) is not None


def test_nothing_is_added_past_the_limit_and_that_is_told_once(tmp_path, caplog):
    size = FEATURES.nbytes + 4
    cache(tmp_path, identity={"weights": "older"}).write("aa", FEATURES)
    older = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    ours = cache(tmp_path, limit=older + 2 * size)
    assert ours.has_room(2 * size)
    assert not ours.has_room(3 * size)
    with caplog.at_level(logging.WARNING):
        for name in ("0a", "0b", "0c", "0d"):
            ours.write(name, FEATURES)
    assert [name in ours for name in ("0a", "0b", "0c", "0d")] == [True, True, False, False]
    (record,) = caplog.records
    assert "the size set by `encoder_cache_gb` is reached" in record.getMessage()
    assert str(tmp_path) in record.getMessage()


def test_writers_share_what_is_left(tmp_path):
    size = FEATURES.nbytes + 4
    ours = cache(tmp_path, limit=4 * size, writers=2)
    for name in ("0a", "0b", "0c"):
        ours.write(name, FEATURES)
    assert [name in ours for name in ("0a", "0b", "0c")] == [True, True, False]


def test_a_full_disk_ends_the_writing_not_the_run(tmp_path, caplog, monkeypatch):
    ours = cache(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "replace", full)
        ours.write("00ff", FEATURES)
    assert "is full, so no more is kept" in caplog.text
    ours.write("00ff", FEATURES)
    assert "00ff" not in ours
    assert not [path for path in ours.folder.rglob("*") if path.name.startswith(".00ff")]


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"`encoder_cache`: .* cannot be made"):
        cache(tmp_path / "file" / "folder")


def _write_many(folder: Path, start: int) -> None:
    ours = cache(folder)
    for i in range(start, start + 60):
        ours.write(f"{i % 40:02x}", np.full((16, WIDTH), i % 40, np.float32))


def test_several_may_write_the_same_at_once(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(_write_many, [tmp_path] * 3, (0, 20, 40)))
    ours = cache(tmp_path)
    for i in range(40):
        found = ours.read(f"{i:02x}", 16)
        assert found is not None
        assert (found == i).all()
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
