"""What each stage leaves behind, and how a later run knows that it need not be done again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pave_lightning.errors import PaveError
from pave_lightning.system.files import (
    REPLACED,
    UNFINISHED,
    file_sha256,
    forget_hashes,
    load_hashes,
    making_folder,
    naming_file,
    remove,
    replacing,
    save_hashes,
    set_aside,
)

log = logging.getLogger("pave_lightning")

MANIFEST = "manifest.json"
# The key under which a manifest holds the sha256 of all that it says besides.
SEAL = "sha256"
# What is known of the hashes of files, so that a file that nobody touched is not read again.
HASHES = ".hashes.json"
# Stages that recipes with a shared folder have in common.
SHARED_STAGES = ("experts", "statistics", "gradients")


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself.

    Attributes:
        stage: its name, which is its folder below the run folder.
        inputs: everything its result depends on, as plain JSON values.
        files: size and sha256 of every file it left.
        result: small results (scores, chosen scale, ...), as plain JSON values.
    """

    stage: str
    inputs: dict[str, Any]
    files: dict[str, dict[str, Any]]
    result: dict[str, Any]

    def digest(self) -> str:
        """What identifies the stage's result: one sha256 over the names and contents of its files."""
        parts = "".join(f"{name}:{self.files[name]['sha256']};" for name in sorted(self.files))
        return hashlib.sha256(parts.encode()).hexdigest()


@dataclass
class StageWriter:
    """An open stage: put files below ``path`` and small results into ``result``."""

    path: Path
    result: dict[str, Any] = field(default_factory=dict)


class RunFolder:
    """The folder of one run; each finished stage is a folder in it, with a manifest that was written last.

    Nothing is made before something is written.

    Args:
        root: the folder.
        shared: folder of experts and statistics that runs share, and of copies of their data; the run folder itself
            where nothing is said.
        data: folder of copies of the tasks' rows, where they are to be elsewhere.
        verify: hash every file that is looked at once, instead of relying on sizes, times and inodes.

    Raises:
        PaveError: one of them cannot be made or written to.
    """

    def __init__(
        self, root: Path, shared: Path | None = None, data: Path | None = None, *, verify: bool = False
    ) -> None:
        self.root, self.shared = Path(root), None if shared is None else Path(shared)
        self._data = data
        for folder, key in ((self.root, "output"), (self.shared, "shared")):
            if folder is not None:
                _check_writable(folder, key)
        if verify:
            forget_hashes()
        else:
            load_hashes(self.root / HASHES)

    @property
    def data(self) -> Path:
        """Folder of copies of the tasks' rows, raw and tokenised."""
        return self._data or (self.shared or self.root) / "data"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, hold it for this process alone and clear away what killed processes left unfinished.

        Raises:
            PaveError: another process works in it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise PaveError(
                f"another pave process works in {self.root}; wait for it, or give this run another name"
            ) from error
        try:
            self.clear()
            yield
        finally:
            self.note_hashes()
            lock.release()

    def note_hashes(self) -> None:
        """Note the hashes that are known, for later processes; nothing where the folder is not there."""
        own, parent = self.root.absolute(), self.root.absolute().parent

        def is_ours(file: Path) -> bool:
            if file.is_relative_to(own) or not file.is_relative_to(parent):
                return True
            beside = parent / file.relative_to(parent).parts[0]
            return not (beside / HASHES).exists()  # or else it belongs to another run, which notes its own

        if self.root.is_dir():
            save_hashes(self.root / HASHES, is_ours)

    def clear(self) -> None:
        """Clear away what killed processes left unfinished; only whoever holds the folder may do so."""
        for folder, names, files in os.walk(self.root):  # which passes over what vanishes meanwhile
            left = [Path(folder) / name for name in (*names, *files) if UNFINISHED in name or REPLACED in name]
            for path in left:
                remove(path) if UNFINISHED in path.name else _restore(path)
            names[:] = set(names).difference(path.name for path in left)

    def path(self, stage: str) -> Path:
        """The folder of a stage."""
        is_shared = self.shared is not None and stage.partition("/")[0] in SHARED_STAGES
        return (self.shared if is_shared and self.shared is not None else self.root) / stage

    @contextmanager
    def claimed(self, stage: str) -> Iterator[None]:
        """Hold a shared stage for this process alone, waiting for others; own stages need no such hold."""
        final = self.path(stage)
        if final.is_relative_to(self.root):
            yield
            return
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(final.with_name(f".{final.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another pave process makes %s; waiting for it", final)
            lock.acquire()
        try:
            for replaced in final.parent.glob(f"{final.name}{REPLACED}*"):
                _restore(replaced)
            for unfinished in final.parent.glob(f"{final.name}{UNFINISHED}*"):
                remove(unfinished)
            yield
        finally:
            lock.release()

    def manifest(self, stage: str) -> Manifest | None:
        """The manifest of a stage whose files are all there with their content; None otherwise.

        A file whose size, times and inode are those of the last time it was hashed is taken for the same; any other is
        hashed, see `file_sha256`. Files that the manifest does not name are not looked at.
        """
        return self._read(stage)[0]

    def damage(self, stage: str) -> str:
        """What is wrong with a stage that was finished once; empty where nothing is, or nothing is there."""
        return self._read(stage)[1]

    def _read(self, stage: str) -> tuple[Manifest | None, str]:
        """A stage's manifest, or what is wrong with it; neither where there is none."""
        return read_manifest(self.path(stage))

    def current(self, stage: str, inputs: Mapping[str, Any]) -> Manifest | None:
        """The manifest of a stage that is finished and was made from these very inputs; None otherwise."""
        found = self.manifest(stage)
        return found if found is not None and found.inputs == _plain(inputs) else None

    @contextmanager
    def writing(self, stage: str, inputs: Mapping[str, Any]) -> Iterator[StageWriter]:
        """Write a stage: all of it appears under its final name at once, or nothing does."""
        final = self.path(stage)
        self._keep_damaged(stage)
        with making_folder(final, replace=True) as unfinished:
            writer = StageWriter(unfinished)
            with naming_file(final):
                yield writer
            files = {
                str(file.relative_to(unfinished)): {"size": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(unfinished.rglob("*"))
                if file.is_file()
            }
            manifest = {"stage": stage, "inputs": _plain(inputs), "files": files, "result": _plain(writer.result)}
            (unfinished / MANIFEST).write_text(json.dumps({**manifest, SEAL: _sealed(manifest)}, indent=2))

    def _keep_damaged(self, stage: str) -> None:
        """Set a damaged result aside, which may tell its owner what happened, before it is made anew."""
        damage = self.damage(stage)
        if damage:
            kept = set_aside(self.path(stage))
            log.warning("%s is damaged: %s; it is kept as %s and made anew", stage, damage, kept)

    def write_text(self, name: str, text: str) -> Path:
        """Write a small file at once."""
        path = self.root / name
        with replacing(path) as unfinished:
            unfinished.write_text(text)
        return path


def read_manifest(folder: Path) -> tuple[Manifest | None, str]:
    """The manifest in a stage's folder, or what is wrong with it or its files; neither where there is no folder."""
    if not folder.is_dir():
        return None, ""
    try:
        noted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        seal = noted.pop(SEAL)
        found = Manifest(**noted)
        facts = {name: (file["size"], file["sha256"]) for name, file in found.files.items()}
        if not isinstance(found.inputs, dict) or not isinstance(found.result, dict):
            raise TypeError("inputs and result are mappings")
        if seal != _sealed(noted):
            return None, f"{folder / MANIFEST} is not what was written (its own sha256 differs)"
    except FileNotFoundError:
        return None, f"{folder} has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, f"{folder / MANIFEST} cannot be read"
    wrong = next(filter(None, (_difference(folder / name, *noted) for name, noted in facts.items())), "")
    return (None, wrong) if wrong else (found, "")


def _difference(file: Path, size: int, sha256: str) -> str:
    """What tells a file from the one that was written; empty where nothing does."""
    if not file.is_file():
        return f"{file} is missing"
    if file.stat().st_size != size or file_sha256(file) != sha256:
        return f"{file} is not what was written (its size or sha256 differs)"
    return ""


def _check_writable(folder: Path, key: str) -> None:
    """Find out, without making it, that a folder can be made where it is not there, and written to."""
    other = f"choose another with --set {key}=FOLDER"
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise PaveError(f"the folder {folder} cannot be made: {error.strerror}; {other}") from error
    if not there.is_dir():
        raise PaveError(f"the folder {folder} cannot be made: {there} is a file; {other}")
    if not os.access(there, os.W_OK | os.X_OK):
        which = "it" if there == folder else str(there)
        raise PaveError(f"the folder {folder} cannot be written to: {which} is not writable; {other}")


def _restore(replaced: Path) -> None:
    """Give an old result back its name, unless the new one is there."""
    final = replaced.with_name(replaced.name.partition(REPLACED)[0])
    if final.exists():
        remove(replaced)
    else:
        replaced.rename(final)


def _sealed(manifest: Mapping[str, Any]) -> str:
    """The sha256 over all that a manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back (tuples become lists), so that comparison is exact."""
    plain: dict[str, Any] = json.loads(json.dumps(values, sort_keys=True))
    return plain
