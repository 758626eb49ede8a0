"""What is kept of models for the next process, in a cache that may hold anything."""

import os
import time
from dataclasses import dataclass

import pytest

from pave_lightning.weights.remembered import remembered


@dataclass(frozen=True)
class Found:
    sizes: dict[str, tuple[int, ...]]


FOUND = Found({"weight": (3, 2)})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of Hugging Face's assets."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


def times_found(*keys, **how):
    """How often something had to be found for some keys, all of which give the same."""
    found = []

    def find():
        found.append(None)
        return FOUND

    for key in keys:
        assert remembered(Found, key, find, **how) == FOUND
    return len(found)


def kept(cache):
    return [path for path in cache.rglob("*") if path.is_file()]


def test_what_was_found_is_not_found_again(cache):
    assert times_found(["a", 1], ["a", 1], ["a", 2]) == 2
    assert times_found(["a", 1], ["a", 2]) == 0
    assert len(kept(cache)) == 2


def test_what_lasts_for_a_while_is_found_anew_after_that(cache):
    assert times_found("key", "key", lasts=60) == 1
    (file,) = kept(cache)
    os.utime(file, (time.time() - 61,) * 2)
    assert times_found("key", "key", lasts=60) == 1
    assert times_found("key", lasts=60) == 0
    assert kept(cache) == [file]


def test_topics_and_the_code_that_finds_are_told_apart(cache, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "one.py").write_text("1")
    assert times_found("key", code=[tmp_path / "code"]) == 1
    assert times_found("key", topic="others", code=[tmp_path / "code"]) == 1
    assert times_found("key") == 1
    assert sorted(file.parent.name for file in kept(cache)) == ["architectures", "architectures", "others"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[1]", b'{"sizes": {"weight": "long"}}', b"\xff\x00", b"[" * 9999]
)
def test_what_cannot_be_read_is_found_and_kept_anew(cache, content):
    times_found("key")
    (file,) = kept(cache)
    file.write_bytes(content)
    assert times_found("key", "key") == 1
    assert kept(cache) == [file]


def test_a_folder_in_the_place_of_the_file(cache):
    times_found("key")
    (file,) = kept(cache)
    file.unlink()
    file.mkdir()
    assert times_found("key", "key") == 2
    assert kept(cache) == []


@pytest.mark.parametrize(
    "place", ["", "pave-lightning", "pave-lightning/models", "pave-lightning/models/architectures"]
)
def test_a_file_in_the_place_of_a_folder(cache, place):
    (cache / place).parent.mkdir(parents=True, exist_ok=True)
    (cache / place).write_text("")
    assert times_found("key", "key") == 2


def test_nothing_is_kept_where_nothing_can_be_written(cache, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    assert times_found("key", "key") == 2
    assert kept(cache) == []
