"""Who may read what we write, and what is said of files that cannot be read."""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pave_lightning.errors import PaveError
from pave_lightning.merging.modulators import Modulator
from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.statistics.gradients import TaskGradients
from pave_lightning.system import files
from pave_lightning.system.files import file_sha256, making_folder, replacing, save_hashes, write_tensors
from pave_lightning.weights import Checkpoint, ShardWriter
from pave_lightning.weights.adapter_models import adapter_problems


@pytest.fixture
def written(packed):
    """One file of every kind that is written, made under a umask that lets the group read."""
    folder = Path(tempfile.mkdtemp())  # not in pytest's own folder, which other users may not enter
    folder.chmod(0o755)
    before = os.umask(0o027)
    shards = ShardWriter(folder, 4)
    for name in ("a", "b"):
        shards.add(name, torch.ones(2))
    shards.close()
    TaskStatistics({"layer": LayerMoment("input", torch.eye(2), 1)}, examples=1).save(folder / "statistics")
    TaskGradients("fisher", {"a": torch.ones(2)}, examples=1).save(folder / "gradients")
    packed(folder / "modulator", {"a": torch.ones(8, dtype=torch.bool)}, 1.0)
    after = os.umask(before)
    yield folder
    shutil.rmtree(folder)
    assert after == 0o027, "writing leaves the umask as it is"


@contextmanager
def an_ordinary_user():
    """The superuser may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_whoever_may_read_new_files_may_read_ours(written):
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in written.iterdir()}
    assert set(modes.values()) == {0o640}
    assert len(modes) == 6


def test_what_is_kept_from_this_user_is_not_called_damaged(written):
    shutil.copy(written / "modulator", written / "adapter_model.safetensors")
    (written / "adapter_config.json").write_text("{}")
    for file in written.iterdir():
        file.chmod(0o644 if file.suffix == ".json" else 0o000)
    told = r" cannot be read: Permission denied; ask its owner"
    with an_ordinary_user():
        for read, name in (
            (TaskStatistics.load, "statistics"),
            (TaskGradients.load, "gradients"),
            (Modulator, "modulator"),
            (file_sha256, "modulator"),
        ):
            with pytest.raises(PaveError, match=f"{name}{told}"):
                read(written / name)
        with pytest.raises(PaveError, match=rf"model-00001-of-00002\.safetensors{told}"):
            Checkpoint(written, "bert")
        (problem,) = adapter_problems(written)
    assert problem.startswith(f"{written / 'adapter_model.safetensors'} cannot be read: Permission denied")


@pytest.mark.parametrize("change", ["content", "replaced"])
def test_a_file_with_the_old_size_and_time_is_hashed_again(tmp_path, monkeypatch, change):
    monkeypatch.setattr(files, "TICK_NS", 0)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    before = path.stat()
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    other = path if change == "content" else tmp_path / "other"
    other.write_bytes(b"two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_what_was_written_a_moment_ago_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "TICK_NS", 60 * 10**9)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    frozen = files.file_facts(path)
    monkeypatch.setattr(files, "file_facts", lambda path: frozen)  # a second change within one tick of the clock
    path.write_bytes(b"two")
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_when_it_is_whole(tmp_path, monkeypatch, durable):
    path = tmp_path / "deep" / "file.txt"
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for text in ("one", "two"):
        with replacing(path, durable=durable) as unfinished:
            assert unfinished.parent == path.parent  # of the same file system, so that renaming is atomic
            unfinished.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
    assert len(synced) == (2 if durable else 0)


@pytest.mark.parametrize("ends", [OSError("disk full"), KeyboardInterrupt()])
def test_what_is_not_written_to_its_end_leaves_what_was_there(tmp_path, ends):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "old").touch()

    def write_half():
        with replacing(file) as unfinished:
            unfinished.write_text("half")
            raise ends

    def fill_half():
        with making_folder(folder, replace=True) as unfinished:
            (unfinished / "half").touch()
            raise ends

    for write in (write_half, fill_half):
        with pytest.raises(type(ends)):
            write()
    assert file.read_text() == "old"
    assert [found.name for found in folder.iterdir()] == ["old"]
    assert sorted(tmp_path.iterdir()) == [file, folder]


def test_a_folder_is_replaced_only_where_that_is_asked_for(tmp_path):
    path = tmp_path / "deep" / "folder"
    for name, replace in (("one", False), ("two", True)):
        with making_folder(path, replace=replace) as unfinished:
            (unfinished / name).touch()
        assert [found.name for found in path.iterdir()] == [name]
    with pytest.raises(OSError, match="not empty"), making_folder(path) as unfinished:
        (unfinished / "three").touch()
    assert [found.name for found in path.iterdir()] == ["two"]
    assert list(path.parent.iterdir()) == [path]


def test_a_note_of_hashes_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(self, text):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    save_hashes(tmp_path / ".hashes.json", lambda path: True)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_find_no_room_say_where(tmp_path, monkeypatch):
    def full(*given, **more):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_tensors(path, {"a": torch.ones(3)})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
