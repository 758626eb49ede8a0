"""The run tree of one recipe run in MLflow."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pave_lightning.credentials import without_secrets
from pave_lightning.errors import Interrupted, reason
from pave_lightning.system.interrupts import deferred
from pave_lightning.tracking import runs
from pave_lightning.tracking.naming import clean_path, tag_text
from pave_lightning.tracking.runs import PARENT_TAG, Entry
from pave_lightning.tracking.stores import connect, is_locked, patiently
from pave_lightning.tracking.uris import resolve_uri, sibling

Status = Literal["FINISHED", "FAILED", "KILLED"]
T = TypeVar("T")

FALLBACK_URI = "sqlite:///mlruns/mlflow.db"
KEY_TAG = "pave.key"
STAGE_TAG = "pave.stage"
ORIGIN_TAG = "pave.continues"

# How long a stopped program waits for a locked database before it leaves the record as it is.
STOPPING_SECONDS = 5.0

_log = logging.getLogger("pave_lightning")


class Tracker:
    """One MLflow run tree a recipe run.

    The driver makes one and begins it with `recorded` or `start`, before any process is launched; a stage in another
    process joins with `attach`. Whatever goes wrong with the store, the program goes on: the record continues in a
    local database, and one warning says where. Should that fail too, nothing more is recorded and every method does
    nothing.

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

    Attributes:
        uri: The store in use: the one asked for, made absolute, or the local one after a failure; empty when nothing is
            recorded any more.
        parent_run_id: The parent run in that store.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        *,
        key: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        fallback_uri: str = FALLBACK_URI,
    ) -> None:
        self.uri = resolve_uri(uri)
        self.parent_run_id = ""
        self._experiment = experiment
        self._experiment_id = ""
        self._parent = Entry(run_name, dict(params), dict(tags))
        self._key = key.replace("'", "_")
        self._fallback_uri = resolve_uri(fallback_uri)
        self._fallen_back = False
        self._attached = False
        self._client: Any = None
        self._entries: dict[str, Entry] = {}
        # Every run id that was ever handed out -> the run that stands for it in the present store
        self._present: dict[str, str] = {}
        # Children as they were found last, by name, until this process changes them
        self._seen: dict[str, Any] = {}

    def start(self) -> Tracker:
        """Open the store and find or make the parent run.

        Returns:
            The tracker itself.
        """
        try:
            self._open(self.uri)
        except Exception as error:
            self._change_store(error)
        self.sweep()
        return self

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
        key = key or parent_run_id
        tracker = cls(
            uri or fallback_uri, experiment, parent_run_id, key=key, params={}, tags={}, fallback_uri=fallback_uri
        )
        tracker._attached = True
        if not uri:  # the process that started the run records nothing any more
            tracker.uri = ""
            return tracker
        try:
            tracker._client = connect(tracker.uri)
            run = tracker._client.get_run(parent_run_id)
            tracker._experiment_id = run.info.experiment_id
            tracker._experiment = tracker._client.get_experiment(run.info.experiment_id).name
            tracker._key = run.data.tags.get(KEY_TAG, tracker._key)
            own_tags = {name: text for name, text in run.data.tags.items() if not name.startswith("mlflow.")}
            tracker._parent = Entry(run.info.run_name, dict(run.data.params), own_tags)
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
        entry = Entry(name, dict(params or {}), {STAGE_TAG: stage, **(tags or {})})

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
        flat = runs.flat_metrics(rows)
        if flat:
            self._record(lambda client: runs.log_metrics(client, self._here(client, run_id), flat), None)

    def complete(
        self,
        name: str,
        *,
        stage: str,
        part: str,
        metrics: Mapping[str, float],
        params: Mapping[str, Any] | None = None,
    ) -> None:
        """Make sure that a child run is there, FINISHED, and has these metrics and parameters.

        What the run has already is not logged again, and one that lacks nothing costs no call.

        Args:
            name: Name of the child run.
            stage: What the run is about, as in `child`.
            part: What the metrics are about; a run may have several parts, each with metrics of its own.
            metrics: Values by name.
            params: Parameters; those whose names the run has stay as they are.
        """
        entry = Entry(name, dict(params or {}), {STAGE_TAG: stage})

        def complete(client: Any) -> None:
            seen = self._seen.get(name)
            if seen is not None and runs.is_complete(seen, part, metrics, entry.params):
                return
            run = self._find(client, name)
            if run is None:
                run = client.get_run(self._make(client, entry))
            runs.complete(client, run, part, metrics, entry.params)
            if run.info.status != "FINISHED":
                client.set_terminated(run.info.run_id, "FINISHED")
            self._seen.pop(name, None)

        self._record(complete, None)

    def complete_parent(self, part: str, metrics: Mapping[str, float]) -> None:
        """Make sure that the parent run has these metrics; what it has already is not logged again.

        Args:
            part: What the metrics are about.
            metrics: Values by name.
        """

        def complete(client: Any) -> None:
            runs.complete(client, client.get_run(self.parent_run_id), part, metrics, {})

        self._record(complete, None)

    def continue_series(self, run_id: str, inputs: str) -> dict[str, int]:
        """The last step of each metric that a training has logged into a run, so that none is logged twice.

        Args:
            run_id: The run.
            inputs: Identifies what is trained; a training with other inputs begins anew.

        Returns:
            Steps by the names that MLflow keeps; empty for a training that begins.
        """
        return self._record(lambda client: runs.continue_series(client, self._here(client, run_id), inputs), {})

    def log_file(self, run_id: str, path: Path | str, folder: str = "") -> None:
        """Store a file as an artifact of a run.

        Args:
            run_id: The run.
            path: The file; when it is missing, a warning says so.
            folder: Folder of the artifact.
        """
        self._store("log_artifact", run_id, Path(path), folder)

    def log_folder(self, run_id: str, path: Path | str, folder: str = "") -> None:
        """Store the content of a folder as artifacts of a run.

        Args:
            run_id: The run.
            path: The folder; when it is missing, a warning says so.
            folder: Folder of the artifacts.
        """
        self._store("log_artifacts", run_id, Path(path), folder)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Store a text as an artifact of a run.

        Args:
            run_id: The run.
            text: The content.
            name: File name of the artifact, with folders if wanted.
        """
        self._record(
            lambda client: client.log_text(self._here(client, run_id), text, clean_path(name) or "text.txt"), None
        )

    def end(self, run_id: str, status: Status) -> None:
        """End a run.

        Args:
            run_id: The run.
            status: How it ended.
        """

        def end_run(client: Any) -> None:
            self._seen.clear()
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

        if not self.parent_run_id:
            return
        if status != "KILLED":
            self._record(end_all, None)
        elif self._client is not None:  # in no other store: a stopped program ends soon
            try:
                if is_locked(self.uri, STOPPING_SECONDS):
                    raise TimeoutError("another process has locked it")
                with deferred():
                    end_all(self._client)
            except Exception as error:
                _log.warning(
                    "MLflow at %s cannot be told that the run was stopped (%s); the next run of the recipe mends that",
                    self._shown(self.uri),
                    reason(error, self.uri),
                )

    @contextmanager
    def recording(self) -> Iterator[Tracker]:
        """Close the run tree when the block is left: FINISHED, FAILED after an error, KILLED after an interruption."""
        try:
            yield self
        except (KeyboardInterrupt, Interrupted, GeneratorExit):
            self.close("KILLED")
            raise
        except BaseException:
            self.close("FAILED")
            raise
        self.close("FINISHED")

    @contextmanager
    def recorded(self) -> Iterator[Tracker]:
        """`start` and `recording` in one, so that a run is ended whenever it was begun."""
        with self.recording():
            yield self.start()

    def __getstate__(self) -> dict[str, Any]:
        # Spawned training processes receive a copy; connections stay behind
        return {**self.__dict__, "_client": None, "_seen": {}}

    def _record(self, action: Callable[[Any], T], otherwise: T) -> T:
        """Run `action` on the client; after a failure once more on the local store."""
        while self.uri:
            try:
                if self._client is None:
                    self._client = connect(self.uri)
                return patiently(action, self._client, self.uri)
            except Exception as error:
                self._change_store(error)
        return otherwise

    def _change_store(self, error: Exception) -> None:
        """Go on in the local store, or without a record when that fails too."""
        failed, failed_parent = self.uri, self.parent_run_id
        failure = f"{self._shown(failed)} cannot be used ({reason(error, self.uri)})"
        self._client, self._present, self._seen = None, {}, {}
        if self._fallen_back:
            self._stop(failure)
            return
        self._fallen_back = True
        fallback = self._fallback_uri
        local = sibling(fallback, resolve_uri(FALLBACK_URI)) if failed == fallback else fallback
        try:
            self._open(local)
            if failed_parent:
                self._present[failed_parent] = self.parent_run_id
                self._client.set_tag(self.parent_run_id, ORIGIN_TAG, tag_text(f"{failed} {failed_parent}"))
        except Exception as second_error:
            self._stop(f"{failure}, and neither can {local} ({reason(second_error, self.uri)})")
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
        client = connect(uri)
        patiently(lambda client: self._begin(client, uri), client, uri)

    def _begin(self, client: Any, uri: str) -> None:
        experiment_id = runs.find_experiment(client, uri, self._experiment, self._fallback_uri)
        found = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{KEY_TAG}` = '{self._key}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
            runs.log_params(client, run_id, runs.missing_params(found[0], self._parent.params))
        else:
            run_id = runs.make_run(client, experiment_id, self._parent, {KEY_TAG: self._key})
        self.uri, self._client, self._experiment_id, self.parent_run_id = uri, client, experiment_id, run_id
        self._present[run_id] = run_id

    def _children(self, client: Any) -> list[Any]:
        found = list(runs.children(client, self._experiment_id, self.parent_run_id))
        self._seen = {run.info.run_name: run for run in reversed(found)}
        return found

    def _find(self, client: Any, name: str) -> Any | None:
        return next((run for run in self._children(client) if run.info.run_name == name), None)

    def _make(self, client: Any, entry: Entry) -> str:
        run_id = runs.make_run(client, self._experiment_id, entry, {PARENT_TAG: self.parent_run_id})
        self._present[run_id] = run_id
        return run_id

    def _child(self, client: Any, entry: Entry) -> str:
        run = self._find(client, entry.name)
        self._seen.pop(entry.name, None)
        if run is None:
            return self._make(client, entry)
        run_id: str = run.info.run_id
        if run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        runs.log_params(client, run_id, runs.missing_params(run, entry.params))
        self._present[run_id] = run_id
        return run_id

    def _here(self, client: Any, run_id: str) -> str:
        """The run of the present store that stands for `run_id`; made when the store was changed since."""
        if run_id not in self._present:
            entry = self._entries.get(run_id, Entry(run_id))
            self._present[run_id] = self._child(client, entry) if self._fallen_back else run_id
        return self._present[run_id]

    def _end_children(self, client: Any, status: Status) -> None:
        for run in self._children(client):
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, status)
                self._seen.pop(run.info.run_name, None)

    def _store(self, call: Literal["log_artifact", "log_artifacts"], run_id: str, path: Path, folder: str) -> None:
        """Store a file, or the content of a folder, with that method of the client."""
        if not path.exists():
            _log.warning("%s is not stored in MLflow because it does not exist", path)
            return
        target = clean_path(folder) or None
        self._record(lambda client: getattr(client, call)(self._here(client, run_id), str(path), target), None)

    def _shown(self, uri: str) -> str:
        return without_secrets(uri, uri)
