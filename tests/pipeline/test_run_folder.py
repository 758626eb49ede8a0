import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from pave_lightning.errors import PaveError, system_problem
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.system import files
from pave_lightning.system.files import file_sha256, forget_hashes

OURS = {".lock", ".hashes.json"}
INPUTS = {"seed": 1, "rows": (3, None), "nested": {"b": 2, "a": [True]}}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def write(folder, stage="experts/a", inputs=INPUTS, **files):
    with folder.writing(stage, inputs) as writer:
        for name, text in (files or {"weights": "12345"}).items():
            (writer.path / name).write_text(text)
        writer.result["score"] = 0.5
    return folder.path(stage)


def fail(folder, inputs, error):
    with folder.writing("experts/a", inputs) as writer:
        (writer.path / "weights").write_text("half")
        raise error


def everything(folder):
    return {str(path.relative_to(folder.root)) for path in folder.root.rglob("*")}


def test_a_finished_stage(folder):
    path = write(folder)
    found = folder.current("experts/a", INPUTS)
    assert path == folder.root / "experts" / "a"
    assert (path / "weights").read_text() == "12345"
    assert found.stage == "experts/a"
    assert found.result == {"score": 0.5}
    assert found.files == {"weights": {"size": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}}
    assert everything(folder) == {"experts", "experts/a", "experts/a/weights", "experts/a/manifest.json"}


def test_the_order_and_kind_of_containers_do_not_matter(folder):
    write(folder)
    assert folder.current("experts/a", {"nested": {"a": (True,), "b": 2}, "rows": [3, None], "seed": 1}) is not None


@pytest.mark.parametrize(
    "changed", [{"seed": 2}, {"rows": [3]}, {"nested": {"b": 2, "a": [False]}}, {"more": None}], ids=str
)
def test_other_inputs_make_a_stage_stale(folder, changed):
    write(folder)
    assert folder.current("experts/a", {**INPUTS, **changed}) is None
    assert folder.manifest("experts/a") is not None


def test_fewer_inputs_make_a_stage_stale(folder):
    write(folder)
    assert folder.current("experts/a", {"seed": 1}) is None


def test_a_stage_that_never_ran(folder):
    assert folder.current("experts/a", INPUTS) is None
    assert folder.manifest("experts/a") is None


@pytest.mark.parametrize("loss", ["missing", "truncated", "grown", "folder"])
def test_a_file_that_changed_makes_a_stage_undone(folder, loss):
    path = write(folder, weights="12345", more="x") / "weights"
    if loss == "truncated":
        os.truncate(path, 4)
    elif loss == "grown":
        path.write_text("123456")
    else:
        path.unlink()
        if loss == "folder":
            path.mkdir()
    assert folder.current("experts/a", INPUTS) is None


def test_files_in_subfolders_are_watched_too(folder):
    with folder.writing("merged/x", INPUTS) as writer:
        (writer.path / "heads" / "a").mkdir(parents=True)
        (writer.path / "heads" / "a" / "head.safetensors").write_text("head")
    assert list(folder.current("merged/x", INPUTS).files) == ["heads/a/head.safetensors"]
    (folder.path("merged/x") / "heads" / "a" / "head.safetensors").unlink()
    assert folder.current("merged/x", INPUTS) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b'{"stage": "a"}',
        b'{"stage": "a", "inputs": {}, "files": [], "result": {}}',
        b'{"stage": "a", "inputs": {}, "files": {"weights": {}}, "result": {}}',
        b'{"stage": "a", "inputs": {}, "files": {"weights": 3}, "result": {}}',
    ],
    ids=range(9),
)
def test_a_broken_manifest_is_no_manifest(folder, content):
    path = write(folder)
    (path / "manifest.json").write_bytes(content)
    assert folder.manifest("experts/a") is None


def test_a_stage_that_fails_leaves_nothing(folder):
    with pytest.raises(ZeroDivisionError):
        fail(folder, INPUTS, ZeroDivisionError)
    assert everything(folder) == {"experts"}
    assert folder.current("experts/a", INPUTS) is None


def test_a_stage_that_fails_leaves_its_last_result_as_it_was(folder):
    write(folder)
    before = everything(folder)
    with pytest.raises(KeyboardInterrupt):
        fail(folder, {"seed": 2}, KeyboardInterrupt)
    assert everything(folder) == before
    assert folder.current("experts/a", INPUTS) is not None
    assert (folder.path("experts/a") / "weights").read_text() == "12345"


def test_results_that_are_no_json_fail_before_anything_is_replaced(folder):
    write(folder)
    with pytest.raises(TypeError), folder.writing("experts/a", {"seed": 2}) as writer:
        writer.result["value"] = object()
    assert folder.current("experts/a", INPUTS) is not None


def test_nothing_is_seen_under_the_final_name_before_the_end(folder):
    with folder.writing("experts/a", INPUTS) as writer:
        (writer.path / "weights").write_text("half")
        assert not folder.path("experts/a").exists()
        assert folder.manifest("experts/a") is None
    assert folder.manifest("experts/a") is not None


def test_a_stage_replaces_its_last_result_whole(folder):
    write(folder, old="1")
    write(folder, inputs={"seed": 2}, new="2")
    assert everything(folder) == {"experts", "experts/a", "experts/a/new", "experts/a/manifest.json"}
    assert folder.current("experts/a", INPUTS) is None
    assert folder.current("experts/a", {"seed": 2}) is not None


def test_what_killed_processes_left_is_swept(folder):
    write(folder)
    before = everything(folder)
    for stage in ("experts/b", "experts/a", "top"):
        left = folder.root / f"{stage}.unfinished-4711"
        left.mkdir()
        (left / "weights").write_text("half")
    (folder.root / "recipe.yaml.unfinished-4711").write_text("half")
    with folder.locked():
        assert everything(folder) - OURS == before
    assert folder.current("experts/a", INPUTS) is not None


def test_what_a_dying_process_removes_itself_is_swept_as_well(folder, monkeypatch):
    left = folder.root / "experts" / "a.unfinished-4711"
    (left / "adapter.unfinished-4711").mkdir(parents=True)
    (left / "weights").write_text("half")
    real = os.unlink

    def too_late(path, **options):
        real(path, **options)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", too_late)  # as if the other process had come first
    with folder.locked():
        assert everything(folder) - OURS == {"experts"}


def test_a_link_that_is_called_unfinished_is_removed_and_what_it_leads_to_stays(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder.root.mkdir()
    (folder.root / "data.unfinished-4711").symlink_to(tmp_path / "elsewhere")
    with folder.locked():
        assert everything(folder) - OURS == set()
    assert (tmp_path / "elsewhere").is_dir()


def test_a_replacement_killed_before_the_new_result_was_in_place_gives_back_the_old_one(folder):
    path = write(folder)
    path.rename(folder.root / "experts" / "a.replaced-4711")
    (folder.root / "experts" / "a.unfinished-4711").mkdir()
    with folder.locked():
        assert folder.current("experts/a", INPUTS) is not None
    assert everything(folder) - OURS == {
        "experts",
        "experts/a",
        "experts/a/weights",
        "experts/a/manifest.json",
    }


def test_a_replacement_killed_before_the_old_result_was_removed_keeps_the_new_one(folder):
    path = write(folder, old="1")
    path.rename(folder.root / "experts" / "a.replaced-4711")
    write(folder, inputs={"seed": 2}, new="2")
    with folder.locked():
        assert folder.current("experts/a", {"seed": 2}) is not None
    assert everything(folder) - OURS == {
        "experts",
        "experts/a",
        "experts/a/new",
        "experts/a/manifest.json",
    }


def test_a_run_that_works_is_not_swept_by_readers(folder):
    with folder.writing("experts/a", INPUTS) as writer:
        RunFolder(folder.root)
        assert writer.path.is_dir()


def test_two_processes_cannot_work_in_one_folder(folder):
    holder = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(folder.root / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        (folder.root / "theirs.unfinished-1").mkdir()
        with pytest.raises(PaveError, match="another pave process works in"), folder.locked():
            pytest.fail("both hold the lock")
        assert (folder.root / "theirs.unfinished-1").is_dir()
        process.stdin.close()
    with folder.locked():
        assert not (folder.root / "theirs.unfinished-1").exists()


def test_the_lock_is_given_back_after_a_failure(folder):
    with pytest.raises(ZeroDivisionError), folder.locked():
        raise ZeroDivisionError
    with RunFolder(folder.root).locked():
        pass


def test_nothing_is_made_before_something_is_written(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run", tmp_path / "b" / "shared")
    assert folder.current("experts/a", INPUTS) is None
    assert not list(tmp_path.iterdir())
    assert folder.data == tmp_path / "b" / "shared" / "data"
    assert RunFolder(tmp_path / "run", data=tmp_path / "copies").data == tmp_path / "copies"
    with folder.locked():
        assert folder.root.is_dir()


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PaveError, match=r"run cannot be made: .*file is a file; choose another with --set shared"):
        RunFolder(tmp_path / "run", tmp_path / "file" / "run")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(PaveError, match=r"run cannot be made: .*run is a file; choose another with --set output"):
        RunFolder(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PaveError, match="it is not writable; choose another"):
            RunFolder(tmp_path)
        with pytest.raises(PaveError, match=r"run cannot be written to: .* is not writable"):
            RunFolder(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


def test_the_digest_follows_names_and_content(folder):
    def digest(**files):
        write(folder, **files)
        return folder.manifest("experts/a").digest

    first = digest(**{"b.safetensors": "2", "a.safetensors": "1"})
    ones, twos = (hashlib.sha256(text).hexdigest() for text in (b"1", b"2"))
    assert first() == hashlib.sha256(f"a.safetensors:{ones};b.safetensors:{twos};".encode()).hexdigest()
    assert digest(**{"a.safetensors": "1", "b.safetensors": "2"})() == first()
    assert digest(**{"a.safetensors": "2", "b.safetensors": "1"})() != first()
    assert digest(**{"a.safetensors": "1", "b.safetensors": "2", "config.json": "{}"})() != first()


def test_small_files_are_written_at_once(folder):
    path = folder.write_text("recipe.yaml", "name: a\n")
    folder.write_text("recipe.yaml", "name: b\n")
    assert path.read_text() == "name: b\n"
    assert everything(folder) == {"recipe.yaml"}


def test_the_manifest_is_plain_json(folder):
    raw = json.loads((write(folder) / "manifest.json").read_text())
    assert sorted(raw) == ["files", "inputs", "result", "sha256", "stage"]
    assert raw["inputs"] == {"seed": 1, "rows": [3, None], "nested": {"a": [True], "b": 2}}


def edit(path, content, *, hide=True):
    """Change a file without changing its size; hidden, with the times of its content as they were."""
    before = path.stat()
    with path.open("r+") as opened:
        opened.write(content)
    if hide:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def settled(monkeypatch):
    """Files count as long written, and this process knows no hashes."""
    forget_hashes()
    monkeypatch.setattr(files, "TICK_NS", 0)
    yield
    forget_hashes()


@pytest.mark.usefixtures("settled")
def test_a_file_edited_to_the_same_size_makes_a_stage_undone(folder):
    path = write(folder)
    assert folder.current("experts/a", INPUTS) is not None
    edit(path / "weights", "54321")
    assert folder.current("experts/a", INPUTS) is None
    assert "weights is not what was written" in folder.damage("experts/a")


@pytest.mark.usefixtures("settled")
def test_a_copied_run_folder_stays_valid_and_is_hashed_once(folder, tmp_path, monkeypatch):
    write(folder)
    with folder.locked():
        assert folder.current("experts/a", INPUTS) is not None
    shutil.copytree(folder.root, tmp_path / "copy")
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, name: read.append(stream.name) or digest(stream, name))
    for hashed in (1, 0):
        read.clear()
        forget_hashes()  # as a new process
        copy = RunFolder(tmp_path / "copy")
        with copy.locked():
            assert copy.current("experts/a", INPUTS) is not None
        assert len(read) == hashed
    forget_hashes()
    assert RunFolder(tmp_path / "copy", verify=True).current("experts/a", INPUTS) is not None
    assert len(read) == 1, "asked to verify, it reads what the note vouches for"


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", ["", "[1]", '{"a": 3}', '{"a": [[1], "b"]}', "[" * 100_000])
def test_a_damaged_note_of_hashes_says_nothing(folder, content):
    write(folder)
    (folder.root / ".hashes.json").write_text(content)
    assert RunFolder(folder.root).current("experts/a", INPUTS) is not None


@pytest.mark.usefixtures("settled")
def test_hashes_of_inputs_elsewhere_are_noted_and_those_of_other_runs_are_not(tmp_path):
    base = tmp_path / "out" / "base.txt"
    base.parent.mkdir()
    base.write_text("base")
    first, second = (RunFolder(tmp_path / "out" / name) for name in ("first", "second"))
    for run in (first, second):
        with run.locked():
            write(run)
            assert run.current("experts/a", INPUTS) is not None
            file_sha256(base)
    noted = set(json.loads((second.root / ".hashes.json").read_text()))
    assert noted == {str(base), str(second.path("experts/a") / "weights")}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", ["edited", "missing", "truncated", "manifest", "no manifest"])
def test_a_damaged_stage_is_set_aside_told_and_made_anew(folder, damage, caplog):
    path = write(folder)
    if damage == "edited":
        edit(path / "weights", "54321")
    elif damage == "missing":
        (path / "weights").unlink()
    elif damage == "truncated":
        os.truncate(path / "weights", 2)
    elif damage == "manifest":
        (path / "manifest.json").write_bytes(bytes(100))
    else:
        (path / "manifest.json").unlink()
    (path / "note.txt").write_text("kept")
    write(folder)
    assert folder.current("experts/a", INPUTS) is not None
    kept = folder.root / "experts" / "a.damaged-1"
    assert (kept / "note.txt").read_text() == "kept"
    assert str(kept) in caplog.text
    assert not (path / "note.txt").exists()
    with folder.locked():
        assert kept.is_dir()
    (path / "manifest.json").unlink()
    write(folder)
    assert (folder.root / "experts" / "a.damaged-2").is_dir()


@pytest.mark.usefixtures("settled")
def test_further_files_do_no_harm(folder, caplog):
    path = write(folder)
    (path / "README.md").write_text("a card")
    assert folder.current("experts/a", INPUTS) is not None
    write(folder, inputs={"seed": 2})
    assert not list(path.parent.glob("*.damaged-*"))
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("part", ["inputs", "files", "result", "sha256"])
def test_a_manifest_that_was_edited_by_hand_is_damage(folder, part):
    path = write(folder) / "manifest.json"
    noted = json.loads(path.read_text())
    if part == "sha256":
        del noted[part]
    else:
        noted[part] = {**noted[part], "score": 1.0} if part != "files" else {}
    path.write_text(json.dumps(noted))
    assert folder.manifest("experts/a") is None
    assert "manifest.json" in folder.damage("experts/a")


def test_what_the_system_refuses_in_a_stage_names_its_folder(folder):
    with pytest.raises(OSError) as caught, folder.writing("experts/a", {}):  # noqa: PT011
        raise OSError(errno.ENOSPC, "No space left on device")
    assert system_problem(caught.value).startswith(f"{folder.path('experts/a')}: No space left on device; make room")
