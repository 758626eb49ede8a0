"""Tags of the environment; and that a checkout's own settings run nothing."""

import os
import subprocess

import pytest

from pave_lightning.tracking import environment_tags

IDENTITY = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


def git(*arguments):
    subprocess.run(["git", *arguments], check=True, env={**os.environ, **IDENTITY}, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"]):
        git(*command)
    return folder


def test_versions_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tags = environment_tags()
    assert {"version.python", "version.torch", "version.mlflow", "version.lightning"} <= set(tags)
    assert "git.commit" not in tags


def test_the_commit_and_whether_files_differ(checkout):
    commit = environment_tags()["git.commit"]
    assert len(commit) == 40
    (checkout / "file").write_text("2")
    assert environment_tags()["git.commit"] == f"{commit}-dirty"


def test_nothing_that_a_checkout_names_is_run(checkout, tmp_path):
    trace = tmp_path / "trace"
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\necho ran $0 $* >> {trace}\ncat\n")
    script.chmod(0o755)
    (checkout / ".gitattributes").write_text("* filter=one\nfile filter=a=b\n")
    git("add", ".gitattributes")
    git("commit", "-q", "-m", "y")
    for name in ("core.fsmonitor", "core.pager", "core.sshCommand", "core.askPass", "diff.external", "gpg.program"):
        git("config", name, str(script))
    for driver in ("one", "a=b"):
        for kind in ("clean", "smudge", "process"):
            git("config", f"filter.{driver}.{kind}", str(script))
        git("config", f"filter.{driver}.required", "true")
    hooks = checkout / ".git" / "hooks"
    for hook in ("post-index-change", "fsmonitor-watchman", "reference-transaction"):
        (hooks / hook).write_text(script.read_text())
        (hooks / hook).chmod(0o755)
    (checkout / "file").write_text("2")
    for path in ("file", ".gitattributes"):
        os.utime(checkout / path, (1, 1))
    git("-c", "core.fsmonitor=", "-c", "filter.one.required=false", "ls-files")
    trace.unlink(missing_ok=True)
    # What is looked for does happen without precautions
    subprocess.run(["git", "status", "--porcelain"], capture_output=True, check=False)
    assert trace.exists()
    trace.unlink()

    assert environment_tags()["git.commit"].endswith("-dirty")
    assert not trace.exists(), trace.read_text()
