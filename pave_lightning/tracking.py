"""The MLflow record of a recipe run: one parent run owned by the driver, one child run a stage, never a reason to stop.

MLflow is imported inside functions because the import takes seconds, and only its client is used: the fluent functions
keep global state that would clash with a user's own runs.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import platform
import re
import shlex
import socket
import sqlite3
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pave_lightning.errors import Interrupted, PaveError

Status = Literal["FINISHED", "FAILED", "KILLED"]
T = TypeVar("T")

FALLBACK_URI = "sqlite:///mlruns/mlflow.db"
KEY_TAG = "pave.key"
STAGE_TAG = "pave.stage"
ORIGIN_TAG = "pave.continues"
PARENT_TAG = "mlflow.parentRunId"

# Limits of MLflow's servers, which local stores do not enforce
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
NAME_LENGTH = 250
METRICS_A_CALL = 1000
PARAMS_A_CALL = 100

PROBE_SECONDS = 5.0
LOCK_RETRIES = 4
RECORDED_PACKAGES = ("pave-lightning", "torch", "lightning", "transformers", "peft", "datasets", "mlflow")

_log = logging.getLogger("pave_lightning")


@dataclass(frozen=True)
class _Entry:
    """What it takes to make a run anew in another store."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


class Tracker:
    """One MLflow run tree a recipe run.

    The driver makes it with `start`, before any process is launched; a stage in another process joins with `attach`.
    Whatever goes wrong with the store, the program goes on: the record continues in a local database, and one warning
    says where. Should that fail too, nothing more is recorded and every method does nothing.

    Attributes:
        uri: The store in use: the one asked for, made absolute, or the local one after a failure; empty when nothing is
            recorded any more.
        parent_run_id: The parent run in that store.
    """

    def __init__(self, uri: str, experiment: str, parent: _Entry, key: str, fallback_uri: str) -> None:
        self.uri = uri
        self.parent_run_id = ""
        self._experiment = experiment
        self._experiment_id = ""
        self._parent = parent
        self._key = key.replace("'", "_")
        self._fallback_uri = fallback_uri
        self._fallen_back = False
        self._attached = False
        self._client: Any = None
        self._entries: dict[str, _Entry] = {}
        # Every run id that was ever handed out -> the run that stands for it in the present store
        self._present: dict[str, str] = {}

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        *,
        key: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        fallback_uri: str = FALLBACK_URI,
    ) -> Tracker:
        """Open the store and find or make the parent run.

        Args:
            uri: MLflow tracking URI: a database or a server.
            experiment: Experiment of the parent run; made where it does not exist.
            run_name: Name of the parent run.
            key: Says which run this is. A run with the same key is taken up again: its status goes back to RUNNING, and
                children that a killed process left RUNNING become KILLED.
            params: Parameters of a new parent run; nested mappings are flattened with dots.
            tags: Tags of a new parent run.
            fallback_uri: Local store (sqlite) that is used when the first cannot be.

        Raises:
            PaveError: If `uri` is a folder, or an sqlite URI without a file.
        """
        tracker = cls(
            resolve_uri(uri), experiment, _Entry(run_name, dict(params), dict(tags)), key, resolve_uri(fallback_uri)
        )
        try:
            tracker._open(tracker.uri)
        except Exception as error:
            tracker._change_store(error)
        tracker.sweep()
        return tracker

    @classmethod
    def attach(
        cls,
        uri: str,
        parent_run_id: str,
        *,
        key: str = "",
        experiment: str = "pave-lightning",
        fallback_uri: str = FALLBACK_URI,
    ) -> Tracker:
        """Join the run tree that another process started.

        Args:
            uri: `tracker.uri` of the process that started it.
            parent_run_id: Its `tracker.parent_run_id`.
            key: The run's key; used only when the store is out of reach and the record has to go on locally.
            experiment: Likewise.
            fallback_uri: Local store (sqlite) that is used when the first cannot be.
        """
        tracker = cls("", experiment, _Entry(parent_run_id), key or parent_run_id, resolve_uri(fallback_uri))
        tracker._attached = True
        if not uri:  # the process that started the run records nothing any more
            return tracker
        tracker.uri = resolve_uri(uri)
        try:
            tracker._client = _connect(tracker.uri)
            run = tracker._client.get_run(parent_run_id)
            tracker._experiment_id = run.info.experiment_id
            tracker._experiment = tracker._client.get_experiment(run.info.experiment_id).name
            tracker._key = run.data.tags.get(KEY_TAG, tracker._key)
            own_tags = {name: text for name, text in run.data.tags.items() if not name.startswith("mlflow.")}
            tracker._parent = _Entry(run.info.run_name, dict(run.data.params), own_tags)
            tracker.parent_run_id = parent_run_id
        except Exception as error:
            tracker._change_store(error)
        return tracker

    def child(
        self, name: str, *, stage: str, params: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """The child run of that name, RUNNING: found under the parent, or made.

        Args:
            name: Name of the run, unique under the parent.
            stage: What the run is about, such as fit; stored as a tag.
            params: Parameters, logged only when the run is new because MLflow refuses to change them.
            tags: Tags of a new run.

        Returns:
            The run id; empty when nothing is recorded any more.
        """
        entry = _Entry(name, dict(params or {}), {STAGE_TAG: stage, **(tags or {})})

        def find_or_make(client: Any) -> str:
            run_id = self._child(client, entry)
            self._entries[run_id] = entry
            return run_id

        return self._record(find_or_make, "")

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics of a run in one call; NaN is kept, infinite values are left out.

        Args:
            run_id: The run.
            metrics: Values by name; characters that MLflow refuses in a name become underscores.
            step: Training step or similar; 0 where nothing is said.
        """
        self.log_metric_rows(run_id, [(metrics, step)])

    def log_metric_rows(self, run_id: str, rows: Sequence[tuple[Mapping[str, float], int | None]]) -> None:
        """Record metrics of several steps in one call, because a call costs the same however much it carries.

        Args:
            run_id: The run.
            rows: Pairs of metrics and step, as in `log_metrics`.
        """
        now = int(time.time() * 1000)
        flat = [
            (_name(name), float(value), now, step or 0)
            for metrics, step in rows
            for name, value in metrics.items()
            if not math.isinf(value)  # a database would store the largest float
        ]

        def log(client: Any) -> None:
            from mlflow.entities import Metric

            here = self._here(client, run_id)
            for first in range(0, len(flat), METRICS_A_CALL):
                client.log_batch(here, metrics=[Metric(*row) for row in flat[first : first + METRICS_A_CALL]])

        if flat:
            self._record(log, None)

    def log_file(self, run_id: str, path: Path | str, folder: str = "") -> None:
        """Store a file as an artifact of a run.

        Args:
            run_id: The run.
            path: The file; when it is missing, a warning says so.
            folder: Folder of the artifact.
        """
        if self._is_there(Path(path)):
            target = _clean(folder) or None
            self._record(lambda client: client.log_artifact(self._here(client, run_id), str(path), target), None)

    def log_folder(self, run_id: str, path: Path | str, folder: str = "") -> None:
        """Store the content of a folder as artifacts of a run.

        Args:
            run_id: The run.
            path: The folder; when it is missing, a warning says so.
            folder: Folder of the artifacts.
        """
        if self._is_there(Path(path)):
            target = _clean(folder) or None
            self._record(lambda client: client.log_artifacts(self._here(client, run_id), str(path), target), None)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Store a text as an artifact of a run.

        Args:
            run_id: The run.
            text: The content.
            name: File name of the artifact, with folders if wanted.
        """
        self._record(lambda client: client.log_text(self._here(client, run_id), text, _clean(name) or "text.txt"), None)

    def end(self, run_id: str, status: Status) -> None:
        """End a run.

        Args:
            run_id: The run.
            status: How it ended.
        """

        def end_run(client: Any) -> None:
            client.set_terminated(self._here(client, run_id), status)
            # No driver may ever look at a local parent that a stage has made
            orphan = self._attached and self._fallen_back
            if orphan and not any(run.info.status == "RUNNING" for run in self._children(client)):
                client.set_terminated(self.parent_run_id, status)

        self._record(end_run, None)

    def sweep(self) -> None:
        """Set children that a killed process left RUNNING to KILLED."""
        self._record(lambda client: self._end_children(client, "KILLED"), None)

    def close(self, status: Status) -> None:
        """End the open children and the parent run. For the driver; a stage ends its own child.

        Args:
            status: How the run ended.
        """

        def end_all(client: Any) -> None:
            self._end_children(client, status)
            client.set_terminated(self.parent_run_id, status)

        self._record(end_all, None)

    @contextmanager
    def recording(self) -> Iterator[Tracker]:
        """Close the run tree when the block is left: FINISHED, FAILED after an error, KILLED after an interruption."""
        try:
            yield self
        except (KeyboardInterrupt, Interrupted):
            self.close("KILLED")
            raise
        except BaseException:
            self.close("FAILED")
            raise
        self.close("FINISHED")

    def __getstate__(self) -> dict[str, Any]:
        # Spawned training processes receive a copy; connections stay behind
        return {**self.__dict__, "_client": None}

    def _record(self, action: Callable[[Any], T], otherwise: T) -> T:
        """Run `action` on the client; after a failure once more on the local store."""
        while self.uri:
            try:
                if self._client is None:
                    self._client = _connect(self.uri)
                return _patiently(action, self._client)
            except Exception as error:
                self._change_store(error)
        return otherwise

    def _change_store(self, error: Exception) -> None:
        """Go on in the local store, or without a record when that fails too."""
        failed, failed_parent = self.uri, self.parent_run_id
        failure = f"{_without_password(failed)} cannot be used ({_reason(error)})"
        self._client, self._present = None, {}
        if self._fallen_back:
            self._stop(failure)
            return
        self._fallen_back = True
        local = _sibling(self._fallback_uri) if failed == self._fallback_uri else self._fallback_uri
        try:
            self._open(local)
            if failed_parent:
                self._present[failed_parent] = self.parent_run_id
                origin = f"{_without_password(failed)} {failed_parent}"
                self._client.set_tag(self.parent_run_id, ORIGIN_TAG, origin[:TAG_LENGTH])
        except Exception as second_error:
            self._stop(f"{failure}, and neither can {local} ({_reason(second_error)})")
            return
        _log.warning(
            "MLflow at %s. The run goes on and is recorded in %s; to look at it: mlflow ui --backend-store-uri %s",
            failure,
            local,
            shlex.quote(local),
        )

    def _stop(self, failure: str) -> None:
        self.uri = self.parent_run_id = ""
        self._client = None
        _log.warning("MLflow at %s. The run goes on, but nothing more of it is recorded in MLflow.", failure)

    def _open(self, uri: str) -> None:
        """Connect, find or make experiment and parent run; state changes only when all of it worked."""
        client = _connect(uri)
        experiment_id = _experiment_id(client, uri, self._experiment, self._fallback_uri)
        found = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{KEY_TAG}` = '{self._key}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            run_id = _make_run(client, experiment_id, self._parent, {KEY_TAG: self._key})
        self.uri, self._client, self._experiment_id, self.parent_run_id = uri, client, experiment_id, run_id
        self._present[run_id] = run_id

    def _children(self, client: Any) -> list[Any]:
        runs: list[Any] = []
        token = None
        while True:
            page = client.search_runs(
                [self._experiment_id],
                filter_string=f"tags.`{PARENT_TAG}` = '{self.parent_run_id}'",
                max_results=1000,
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _child(self, client: Any, entry: _Entry) -> str:
        for run in self._children(client):
            if run.info.run_name == entry.name:
                run_id: str = run.info.run_id
                if run.info.status != "RUNNING":
                    client.update_run(run_id, status="RUNNING")
                break
        else:
            run_id = _make_run(client, self._experiment_id, entry, {PARENT_TAG: self.parent_run_id})
        self._present[run_id] = run_id
        return run_id

    def _here(self, client: Any, run_id: str) -> str:
        """The run of the present store that stands for `run_id`; made when the store was changed since."""
        if run_id not in self._present:
            entry = self._entries.get(run_id, _Entry(run_id))
            self._present[run_id] = self._child(client, entry) if self._fallen_back else run_id
        return self._present[run_id]

    def _end_children(self, client: Any, status: Status) -> None:
        for run in self._children(client):
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, status)

    def _is_there(self, path: Path) -> bool:
        if not path.exists():
            _log.warning("%s is not stored in MLflow because it does not exist", path)
            return False
        return True


def resolve_uri(uri: str) -> str:
    """Make an sqlite URI absolute and refuse what MLflow cannot open.

    Args:
        uri: MLflow tracking URI.

    Returns:
        The URI; its parent folder is not made yet.

    Raises:
        PaveError: If it is a folder, or an sqlite URI without a file.
    """
    uri = uri.strip()
    scheme = urllib.parse.urlsplit(uri).scheme
    if len(scheme) < 2 or scheme == "file":  # one letter is a Windows drive
        folder = urllib.parse.unquote(urllib.parse.urlsplit(uri).path) if scheme == "file" else uri
        folder = folder.rstrip("/") or "mlruns"
        raise PaveError(
            f"tracking.uri is the folder '{uri}', but MLflow no longer opens folders as tracking stores. "
            f"Write sqlite:///{folder}/mlflow.db instead (`mlflow migrate-filestore` moves old records)."
        )
    if scheme.split("+")[0] != "sqlite":
        return uri
    prefix, _, rest = uri.partition(":///")
    path, question_mark, query = rest.partition("?")
    if not path or path == ":memory:":
        raise PaveError(
            f"tracking.uri '{uri}' names no database file. Write sqlite:///FOLDER/mlflow.db (relative), "
            "or sqlite:////FOLDER/mlflow.db (absolute)."
        )
    return f"{prefix}:///{Path(path).expanduser().absolute()}{question_mark}{query}"


def environment_tags() -> dict[str, str]:
    """Versions of the packages that decide a result, and the git commit of the current folder if it is a checkout."""
    tags = {"version.python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit:
        changes = _git("status", "--porcelain", "--untracked-files=no")
        tags["git.commit"] = f"{commit}-dirty" if changes else commit
    return tags


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _connect(uri: str) -> Any:
    """A client of the store at `uri`; raises within seconds when nothing answers there."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)
    _probe(uri)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _probe(uri: str) -> None:
    """Raise when nothing answers: MLflow itself would retry for up to minutes."""
    path = _sqlite_path(uri)
    parts = urllib.parse.urlsplit(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version")
    elif parts.scheme in ("http", "https"):
        host = parts.hostname or ""
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
            return
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    elif _is_database(uri):
        import sqlalchemy

        engine = sqlalchemy.create_engine(uri)
        try:
            engine.connect().close()
        finally:
            engine.dispose()


def _patiently(action: Callable[[Any], T], client: Any) -> T:
    """Run `action`, waiting a little while another process writes to the same sqlite file."""
    for attempt in range(LOCK_RETRIES):
        try:
            return action(client)
        except Exception as error:
            if "database is locked" not in str(error):
                raise
            time.sleep(0.25 * 2**attempt)
    return action(client)


def _experiment_id(client: Any, uri: str, name: str, fallback_uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # MLflow would freeze a location relative to the current folder; a server knows its own
        path = _sqlite_path(uri) or _sqlite_path(fallback_uri)
        folder = re.sub(r"[^\w.-]+|^\.+", "_", name)
        location = (path.parent / "artifacts" / folder).as_uri() if path and _is_database(uri) else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _make_run(client: Any, experiment_id: str, entry: _Entry, own_tags: Mapping[str, str]) -> str:
    from mlflow.entities import Param

    tags = {_name(name): str(text)[:TAG_LENGTH] for name, text in {**entry.tags, **own_tags}.items()}
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=entry.name).info.run_id)
    params = [Param(_name(name), str(value)[:PARAM_LENGTH]) for name, value in _flattened(entry.params)]
    for first in range(0, len(params), PARAMS_A_CALL):
        client.log_batch(run_id, params=params[first : first + PARAMS_A_CALL])
    return run_id


def _flattened(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _name(text: str) -> str:
    """A name that MLflow accepts for a metric, parameter or tag."""
    return _clean(text)[:NAME_LENGTH].rstrip("/") or "_"


def _clean(text: str) -> str:
    """A relative path that MLflow accepts for an artifact: no odd characters, no empty or dotted parts."""
    parts = re.sub(r"[^\w.\- /]", "_", text, flags=re.ASCII).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _is_database(uri: str) -> bool:
    return re.split(r"[:+]", uri, maxsplit=1)[0] in ("sqlite", "postgresql", "mysql", "mssql")


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.partition(":///")[2].partition("?")[0]) if uri.startswith("sqlite") else None


def _sibling(uri: str) -> str:
    path = _sqlite_path(uri)
    return f"sqlite:///{path.with_name(f'{path.stem}-fallback.db')}" if path else resolve_uri(FALLBACK_URI)


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return _without_password(f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__)
