"""Sqlite databases of MLflow: made whole under a lock, waited for while they are in use, mended when left half made."""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pave_lightning.system.files import UNFINISHED, replacing
from pave_lightning.tracking.uris import sqlite_uri

# How long a store that is in use is waited for, at the start and later alike, and when that is told.
PATIENCE_SECONDS = 100.0
LOCK_MILLISECONDS = 500
# Databases on which MLflow is not to wait for long.
_impatient: set[str] = set()
TELL_AFTER_SECONDS = 5.0
# A database whose tables have not changed for so long is not being made by anybody.
SETTLED_SECONDS = 15.0
HALF_MADE = ".half-made"

log = logging.getLogger("pave_lightning")


class StoreUnusableError(Exception):
    """A store that no waiting makes usable; the message says why, and what to do where anything can be done."""


def ready(path: Path, uri: str) -> None:
    """Make the database where there is none; wait until it is complete and can be written to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    _check_access(path)
    if _is_absent(path):
        with _making(path):
            if _is_absent(path):
                _make_database(path)
    _await_lock(path)
    seen, since = _version(path), time.monotonic()
    while (version := _version(path)) != _expected_version():
        if version != seen:
            seen, since = version, time.monotonic()
        age = time.time() - path.stat().st_mtime
        if max(age, time.monotonic() - since) > SETTLED_SECONDS:
            return _heal(path, uri, version)
        time.sleep(0.25)
    return None


def _check_access(path: Path) -> None:
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise StoreUnusableError(f"{path} is read-only for this user")
    if not os.access(path.parent, os.W_OK | os.X_OK):  # where sqlite keeps its journal
        raise StoreUnusableError(f"the folder {path.parent} is read-only for this user")


def _is_absent(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


@contextmanager
def _making(path: Path) -> Iterator[None]:
    """Be the one process that makes the tables of this database."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=TELL_AFTER_SECONDS)
    except Timeout:
        log.info("waiting for another process that makes the tables of %s (%d s at most)", path, PATIENCE_SECONDS)
        lock.acquire(timeout=PATIENCE_SECONDS - TELL_AFTER_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _make_database(path: Path) -> None:
    """Make a database under another name and rename it, so that a killed process leaves no half of one."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for file in path.parent.iterdir():
        if file.name.startswith(f"{path.name}{UNFINISHED}"):  # of a killed process; no other one makes it now
            file.unlink(missing_ok=True)
    with replacing(path, durable=True) as making:
        with _unsynced(making):
            store = SqlAlchemyStore(sqlite_uri(making), (path.parent / "artifacts").as_uri())
        store.engine.dispose()


@contextmanager
def _unsynced(path: Path) -> Iterator[None]:
    """Let connections to a file that is lost if anything breaks off not wait for the disk at each of 200 statements."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def configure(connection: Any, record: Any) -> None:
        if not isinstance(connection, sqlite3.Connection):
            return
        if str(path) in [row[2] for row in connection.execute("PRAGMA database_list")]:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA journal_mode = MEMORY")

    event.listen(Engine, "connect", configure)
    try:
        yield
    finally:
        event.remove(Engine, "connect", configure)


def _heal(path: Path, uri: str, version: str | None) -> None:
    """Make a database anew that was left half made and holds nothing.

    Raises:
        StoreUnusableError: It holds something.
    """
    if _holds_something(path):
        raise StoreUnusableError(
            f"its tables are those of another MLflow version, or half made (found version {version or 'none'}, this "
            f"MLflow expects {_expected_version()}); copy the file, then run: mlflow db upgrade {shlex.quote(uri)}"
        )
    with _making(path):
        if _version(path) == _expected_version():
            return
        aside = next(name for name in _names_aside(path) if not name.exists())
        path.rename(aside)
        _make_database(path)
    log.warning("%s was left half made and held no runs; it is made anew, the old one is %s", path, aside.name)


def _names_aside(path: Path) -> Iterator[Path]:
    yield path.with_name(f"{path.name}{HALF_MADE}")
    for number in range(2, 1000):
        yield path.with_name(f"{path.name}{HALF_MADE}-{number}")


def _holds_something(path: Path) -> bool:
    """Whether any table has rows besides those that MLflow writes into a new database."""
    of_a_new_one = {"experiments": "name = 'Default'", "workspaces": "name = 'default'"}
    with _opened(path, PATIENCE_SECONDS) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for name in tables - {"alembic_version"}:
            quoted = name.replace('"', '""')
            if connection.execute(f'SELECT 1 FROM "{quoted}" WHERE NOT ({of_a_new_one.get(name, "0")})').fetchone():
                return True
    return False


def _version(path: Path) -> str | None:
    """The version of a database's tables; None where they say none."""
    with _opened(path, PATIENCE_SECONDS) as connection:
        try:
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            return None
    return str(found[0]) if found else None


def _expected_version() -> str:
    """The version of the tables that the installed MLflow makes."""
    import mlflow.store
    from alembic.script import ScriptDirectory

    return str(ScriptDirectory(str(Path(mlflow.store.__path__[0]) / "db_migrations")).get_current_head())


@contextmanager
def _opened(path: Path, seconds: float) -> Iterator[sqlite3.Connection]:
    """A connection to a database that exists; never makes one."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=seconds, isolation_level=None)) as connection:
        yield connection


def take_lock(path: Path, seconds: float) -> None:
    """Read the database and take the lock of a writer for a moment."""
    with _opened(path, seconds) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


def _await_lock(path: Path) -> None:
    """Wait until the database can be written to; raises at once what waiting cannot change."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with telling(path):
        while True:
            try:
                return take_lock(path, 0.5)  # short, because a signal is seen only between two of them
            except sqlite3.Error as error:
                if not is_lock_error(error) or time.monotonic() > deadline:
                    raise


def shorten_waits(path: Path) -> None:
    """Let MLflow's statements on a database wait half a second for a lock, not 20: no signal is seen in the meantime.

    Whoever calls it tries again for as long as it has patience.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def shortened(connection: Any, cursor: Any, statement: str, values: Any, *details: Any) -> Any:
        if statement.startswith("PRAGMA busy_timeout") and connection.engine.url.database in _impatient:
            statement = f"PRAGMA busy_timeout = {LOCK_MILLISECONDS};"
        return statement, values

    if not _impatient:
        event.listen(Engine, "before_cursor_execute", shortened, retval=True)
    _impatient.add(str(path))


def is_lock_error(error: Exception) -> bool:
    """Whether it is another process that keeps a database locked."""
    return "database is locked" in str(error) or "database table is locked" in str(error)


@contextmanager
def telling(path: Path | None) -> Iterator[None]:
    """Say after some seconds that a database is waited for, if it is another process that has locked it."""
    if path is None:
        yield
        return
    over = threading.Event()

    def tell() -> None:
        with suppress(sqlite3.Error, OSError):
            take_lock(path, 0.0)
            return
        if not over.is_set():
            log.info("waiting for %s, which another process has locked (%d s at most)", path, PATIENCE_SECONDS)

    timer = threading.Timer(TELL_AFTER_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        over.set()
        timer.cancel()
