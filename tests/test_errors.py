"""What is said of errors of libraries and of the system."""

import errno
import os
import sqlite3
import tempfile

import pytest
from sqlalchemy.exc import OperationalError

from pave_lightning.errors import PaveError, foreign, near, nearest, reason, system_problem, visible


class StrictDataclassFieldValidationError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("\n\nplain words.\nmore"), "plain words"),
        (ValueError(""), "ValueError"),
        (RuntimeError("   "), "RuntimeError"),
        (KeyError("model_type"), "KeyError: 'model_type'"),
        (
            RuntimeError("Error(s) in loading state_dict for Bert:\n\tsize mismatch for a.weight"),
            "Error(s) in loading state_dict for Bert: size mismatch for a.weight",
        ),
        (
            StrictDataclassFieldValidationError("Validation error for field 'x':\n    TypeError: expected int"),
            "StrictDataclassFieldValidationError: Validation error for field 'x': TypeError: expected int",
        ),
        (
            ValueError("It holds code. Set `trust_remote_code=True` to run it. See https://x.org/y for more."),
            "It holds code",
        ),
        (OSError(errno.ENOENT, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (OSError("Can't load tokenizer for 'x'"), "Can't load tokenizer for 'x'"),
    ],
)
def test_reason(error, told):
    assert reason(error) == told


def test_what_a_database_did_when_it_failed_does_not_hide_why():
    failed = OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
    failed.add_detail("(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block)")
    assert reason(failed) == "OperationalError: (sqlite3.OperationalError) database or disk is full"


def test_a_long_reason_is_cut():
    assert len(reason(ValueError("word " * 100_000))) <= 400


class PanicError(BaseException):
    """As Rust code raises one that is no ``Exception``."""


@pytest.mark.parametrize(
    "error", [KeyError("a"), RecursionError("deep"), PanicError("index out of range"), MemoryError()]
)
def test_whatever_a_library_raises_is_a_message(error):
    told = rf"^x\.json cannot be read: {type(error).__name__}.*; save it again$"
    with pytest.raises(PaveError, match=told), foreign("x.json cannot be read", "save it again"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PaveError("told"), OSError(errno.ENOSPC, "full", "f")])
def test_what_is_no_fault_of_the_file_passes(error):
    with pytest.raises(type(error)) as caught, foreign("x.json cannot be read"):
        raise error
    assert caught.value is error


def test_text_that_would_move_the_cursor_is_spelt_out():
    assert visible("a\tb\nc \x1b[31mred\x07 \x9b2J \u202eleft \ud800 \u00fc") == (
        "a\tb\nc \\x1b[31mred\\x07 \\x9b2J \\u202eleft \\ud800 \u00fc"
    )


def test_nearest_among_very_many_and_very_long_names():
    assert nearest("x" * 100_000, ["y" * 100_000]).startswith("known are: yyy")
    assert near("name-7", [f"name-{index}" for index in range(100_000)]) == "name-7"
    assert len(nearest("zzz", [f"name-{index}" for index in range(100_000)])) < 2000


def full(file):
    return OSError(errno.ENOSPC, "No space left on device", None if file is None else str(file))


def test_a_full_disk_names_the_setting_of_the_place_that_is_full(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for file, told in [
        (tmp_path / "tmp" / "pave-plan-x" / "rows.arrow", "TMPDIR=FOLDER"),
        (tmp_path / "tmp" / "tmp1234" / "file", "TMPDIR=FOLDER"),
        (tmp_path / "tmp" / "runs" / "demo" / "file", "--set output=FOLDER"),
        (tmp_path / "hub" / "datasets" / "file", "HF_HOME=FOLDER"),
        (tmp_path / "checkpoints" / "file", "--set output=FOLDER"),
    ]:
        assert told in system_problem(full(file))


def test_a_full_disk_whose_file_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for place, told in [("tmp", "TMPDIR"), ("hub", "HF_HOME"), ("", "output=FOLDER")]:
        monkeypatch.setattr("pave_lightning.errors._is_full", lambda folder, place=place: folder.name == place)
        assert told in system_problem(full(None))


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:12345",
        "NCCL error in: ProcessGroupNCCL.cpp:1234, remote process exited or there was a network error",
    ],
)
def test_lost_processes_are_told_in_words(monkeypatch, text):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = system_problem(RuntimeError(text))
    assert told.startswith("process 1 of 2 cannot reach the others that it works with (")
    assert "one of them ended first" in told
    assert system_problem(RuntimeError("shapes cannot be multiplied")) is None


def test_errors_of_torch_distributed_are_known_by_their_kind():
    import torch.distributed as dist

    assert "cannot reach the others" in system_problem(dist.DistNetworkError("The client socket has timed out"))
    assert os.environ.get("RANK") is None


@pytest.mark.parametrize(
    ("name", "known"),
    [("cafe\N{COMBINING ACUTE ACCENT}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"), ("text", "\ufefftext")],
)
def test_names_that_only_look_the_same_are_shown_by_their_letters(name, known):
    assert nearest(name, [known]) == f"did you mean {known!a}, which only looks the same?"
