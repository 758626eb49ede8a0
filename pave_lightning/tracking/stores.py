"""Opens tracking stores: makes a new database whole, waits for one that is in use, tells at once what cannot work."""

from __future__ import annotations

import os
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from sqlite3 import Error
from typing import Any, TypeVar

from pave_lightning.system.interrupts import deferred
from pave_lightning.tracking import sqlite
from pave_lightning.tracking.sqlite import SETTLED_SECONDS
from pave_lightning.tracking.uris import is_database, sqlite_path

T = TypeVar("T")

PROBE_SECONDS = 5.0
RETRY_SECONDS = 1.0


def connect(uri: str) -> Any:
    """A client of the store at `uri`.

    A new sqlite database appears under its name with all of its tables, made by one process alone; in another
    database the process that comes first makes them, and the others wait.

    Raises:
        Exception: Nothing usable answers there. What waiting cannot change is raised within seconds.
    """
    _quiet_mlflow()
    path = sqlite_path(uri)
    if path is not None:
        sqlite.ready(path, uri)
        sqlite.shorten_waits(path)
    else:
        _probe(uri)
    return _client(uri) if path is not None or not is_database(uri) else _client_of_database(uri)


def patiently(action: Callable[[Any], T], client: Any, uri: str) -> T:
    """Run `action` on a client; again for a while when another process has locked the same sqlite file.

    A signal that comes in the meantime unwinds the program when the call is over, not inside of its transaction.
    """
    deadline = time.monotonic() + sqlite.PATIENCE_SECONDS
    with sqlite.telling(sqlite_path(uri)):
        while True:
            try:
                with deferred():
                    return action(client)
            except Exception as error:
                if not sqlite.is_lock_error(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.25)


def is_locked(uri: str, seconds: float = 0.0) -> bool:
    """Whether another process still writes to an sqlite database after so many seconds; False for other stores."""
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return False
    try:
        sqlite.take_lock(path, seconds)
    except Error as error:
        return sqlite.is_lock_error(error)
    return False


def _quiet_mlflow() -> None:
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is raised as well, and told once, by us
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _probe(uri: str) -> None:
    """Raise when nothing answers: MLflow itself would retry for up to minutes."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        host = parts.hostname or ""
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
            return
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    elif is_database(uri):
        with _engine(uri) as engine:
            engine.connect().close()


def _client_of_database(uri: str) -> Any:
    """A client of a database whose tables another process may be making at the same time."""
    seen, since = _tables(uri), time.monotonic()
    while True:
        try:
            return _client(uri)
        except Exception:
            tables = _tables(uri)
            if tables != seen:
                seen, since = tables, time.monotonic()
            if time.monotonic() - since > SETTLED_SECONDS:
                raise
        time.sleep(RETRY_SECONDS)


def _tables(uri: str) -> tuple[str, ...]:
    """Names of a database's tables, and the version that they say."""
    import sqlalchemy

    with _engine(uri) as engine:
        names = sorted(sqlalchemy.inspect(engine).get_table_names())
        if "alembic_version" in names:
            with engine.connect() as connection:
                found = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).fetchall()
            names += [str(row[0]) for row in found]
    return tuple(names)


@contextmanager
def _engine(uri: str) -> Iterator[Any]:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        yield engine
    finally:
        engine.dispose()
