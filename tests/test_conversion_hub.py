"""A hub id is fetched through the hub's cache; without a network the message says what to do."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from test_conversion_support import TorchSpeechLM, assert_bit_equal, read_state

from llaso_jax.conversion import export_llaso, gather_weights
from llaso_jax.conversion.errors import UnknownSourceError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository; lists what is asked of it."""
    TorchSpeechLM().save(tmp_path)
    asked = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        if repo_id != "owner/llaso":
            response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
            raise RepositoryNotFoundError(f"404: {repo_id}", response=response)
        folder = tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in (tmp_path / "model").glob(pattern):
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("hub_id", ["owner/llaso", "owner/llaso@v1.0"])
def test_a_hub_id_is_a_source(hub, tmp_path, hub_id):
    weights = gather_weights(hub_id)
    export_llaso(tmp_path / "out", weights.cfg, weights.pieces, hf_config=weights.hf_config)
    assert_bit_equal(read_state(tmp_path / "out"), TorchSpeechLM().state())
    ((repo, revision, patterns),) = hub
    assert (repo, revision) == ("owner/llaso", "v1.0" if "@" in hub_id else None)
    assert "*.safetensors" in patterns
    assert "*.bin" not in patterns


def test_pickles_are_fetched_only_where_there_is_nothing_else(hub, tmp_path):
    shutil.rmtree(tmp_path / "model")
    TorchSpeechLM().save(tmp_path, weights="bin")
    gather_weights("owner/llaso")
    assert ["*.bin" in patterns for _, _, patterns in hub] == [False, True]


def test_a_folder_comes_before_the_hub(hub, tmp_path):
    for name, copy in (("model", "llaso"), ("whisper", "whisper")):
        shutil.copytree(tmp_path / name, tmp_path / "owner" / copy)
    assert gather_weights("owner/llaso").source == Path("owner/llaso")
    assert hub == []


def test_an_unknown_repository_is_told_from_both_sides(hub):
    with pytest.raises(UnknownSourceError, match=r"no folder or file here.*RepositoryNotFound"):
        gather_weights("owner/other")


def test_no_network_is_told_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownSourceError, match=r"HF_HUB_OFFLINE.*give its folder"):
        gather_weights("nobody/has-this-model")


@pytest.mark.parametrize("path", ["no/such/model.safetensors", "missing-folder"])
def test_what_cannot_be_a_hub_id_is_a_path(hub, path):
    with pytest.raises(UnknownSourceError, match="does not exist"):
        gather_weights(path)
    assert hub == []
