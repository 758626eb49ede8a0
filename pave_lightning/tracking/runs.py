"""Runs in an open store: found, made, completed; nothing that a run has already is logged again."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pave_lightning.tracking.naming import METRICS_A_CALL, PARAMS_A_CALL, clean_name, flat_params, tag_text
from pave_lightning.tracking.uris import is_database, sqlite_path

PARENT_TAG = "mlflow.parentRunId"
SERIES_TAG = "pave.series"
RECORDED_TAG = "pave.recorded"
RUNS_A_PAGE = 1000


@dataclass(frozen=True)
class Entry:
    """What it takes to make a run anew in another store."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def find_experiment(client: Any, uri: str, name: str, fallback_uri: str) -> str:
    """The id of the experiment of that name; made where there is none, restored where it was deleted."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # MLflow would freeze a location relative to the current folder; a server knows its own
        path = sqlite_path(uri) or sqlite_path(fallback_uri)
        folder = re.sub(r"[^\w.-]+|^\.+", "_", name)
        location = (path.parent / "artifacts" / folder).as_uri() if path and is_database(uri) else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def make_run(client: Any, experiment_id: str, entry: Entry, own_tags: Mapping[str, str]) -> str:
    """Make a run with its parameters and tags; its id."""
    tags = {clean_name(name): tag_text(text) for name, text in {**entry.tags, **own_tags}.items()}
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=entry.name).info.run_id)
    log_params(client, run_id, dict(flat_params(entry.params)))
    return run_id


def log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Log parameters in few calls."""
    from mlflow.entities import Param

    rows = [Param(name, value) for name, value in params.items()]
    for first in range(0, len(rows), PARAMS_A_CALL):
        client.log_batch(run_id, params=rows[first : first + PARAMS_A_CALL])


def missing_params(run: Any, params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters whose names a run lacks, as after a kill; MLflow refuses to change those that are there."""
    return {name: value for name, value in flat_params(params) if name not in run.data.params}


def children(client: Any, experiment_id: str, parent_run_id: str) -> Iterator[Any]:
    """All child runs of a parent, with their metrics, parameters and tags."""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{PARENT_TAG}` = '{parent_run_id}'",
            max_results=RUNS_A_PAGE,
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def flat_metrics(rows: Sequence[tuple[Mapping[str, float], int | None]]) -> list[tuple[str, float, int, int]]:
    """Name, value, time and step of every metric; infinite values are left out: a database stores the largest float."""
    now = int(time.time() * 1000)
    return [
        (clean_name(name), float(value), now, step or 0)
        for metrics, step in rows
        for name, value in metrics.items()
        if not math.isinf(value)
    ]


def log_metrics(client: Any, run_id: str, rows: Sequence[tuple[str, float, int, int]]) -> None:
    """Log metrics in few calls."""
    from mlflow.entities import Metric

    for first in range(0, len(rows), METRICS_A_CALL):
        client.log_batch(run_id, metrics=[Metric(*row) for row in rows[first : first + METRICS_A_CALL]])


def mark_of(part: str, metrics: Mapping[str, float]) -> tuple[str, str]:
    """Name and value of the tag which says that these metrics have been logged completely."""
    content = json.dumps(sorted((name, repr(value)) for name, value, _, _ in flat_metrics([(metrics, None)])))
    return f"{RECORDED_TAG}.{clean_name(part)}", hashlib.sha256(content.encode()).hexdigest()


def is_complete(run: Any, part: str, metrics: Mapping[str, float], params: Mapping[str, Any]) -> bool:
    """Whether a run, as it was found, is finished and has these metrics and the names of these parameters."""
    name, value = mark_of(part, metrics)
    finished = run.info.status == "FINISHED"
    return finished and run.data.tags.get(name) == value and not missing_params(run, params)


def complete(client: Any, run: Any, part: str, metrics: Mapping[str, float], params: Mapping[str, Any]) -> None:
    """Log what a run lacks of these metrics and parameters, and note that it lacks nothing of this part any more."""
    run_id = run.info.run_id
    log_params(client, run_id, missing_params(run, params))
    name, value = mark_of(part, metrics)
    if run.data.tags.get(name) != value:
        rows = flat_metrics([(metrics, None)])
        log_metrics(client, run_id, [row for row in rows if not _has_value(client, run, row[0], row[1])])
        client.set_tag(run_id, name, value)


def _has_value(client: Any, run: Any, name: str, value: float) -> bool:
    """Whether the last value that was logged without a step is this one; a series of the same name may stand beside."""
    if name not in run.data.metrics:
        return False
    if _same(run.data.metrics[name], value):
        return True
    points = [point for point in client.get_metric_history(run.info.run_id, name) if point.step == 0]
    return bool(points) and _same(max(points, key=lambda point: point.timestamp).value, value)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def continue_series(client: Any, run_id: str, inputs: str) -> dict[str, int]:
    """The last step of each metric that a training with these inputs has logged; empty for one that begins."""
    run = client.get_run(run_id)
    known, _, since = run.data.tags.get(SERIES_TAG, "").partition(" ")
    if known != inputs:
        client.set_tag(run_id, SERIES_TAG, f"{inputs} {int(time.time() * 1000)}")
        return {}
    last = {}
    for name in run.data.metrics:
        steps = [p.step for p in client.get_metric_history(run_id, name) if p.timestamp >= int(since)]
        if steps:
            last[name] = max(steps)
    return last
