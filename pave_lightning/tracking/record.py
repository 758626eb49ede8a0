"""What MLflow keeps of a finished stage, taken from its manifest alone, so that any later run can complete it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pave_lightning.tracking.tracker import Tracker

Kind = Literal["fit", "capture", "merge"]


def record_stage(tracker: Tracker, run: str, kind: Kind, result: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Make sure that a stage's run is there, finished, and has what the manifest says; what it has is not logged again.

    Args:
        tracker: The run tree.
        run: Name of the child run; a capture is recorded in the run of its expert.
        kind: The kind of stage.
        result: The manifest's results.
        params: Parameters of the run.
    """
    stage = "merge" if kind == "merge" else "fit"
    tracker.complete(run, stage=stage, part=kind, metrics=METRICS[kind](result), params=params)


def _fit(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in result.get("metrics", {}).items()}


def _capture(result: Mapping[str, Any]) -> dict[str, float]:
    return {f"capture/{name}": float(result[name]) for name in ("examples", "layers") if name in result}


def _merge(result: Mapping[str, Any]) -> dict[str, float]:
    chosen = {name: result[name] for name in ("scale", "rho") if isinstance(result.get(name), float)}
    return {name: float(value) for name, value in {**chosen, **result.get("cost", {})}.items() if math.isfinite(value)}


METRICS: dict[Kind, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    "fit": _fit,
    "capture": _capture,
    "merge": _merge,
}
