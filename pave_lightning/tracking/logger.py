"""The logger through which Lightning's trainer writes into a run of the `Tracker`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from pave_lightning.tracking import Tracker
from pave_lightning.tracking.naming import clean_name

FLUSH_EVERY = 50


class TrackingLogger(Logger):
    """Hands a trainer's metrics to one run, in batches and from rank zero only.

    The run belongs to the driver: nothing is opened, ended or configured here, and hyperparameters are left to the
    driver because MLflow refuses to log a parameter twice.

    Args:
        tracker: The run tree.
        run_id: The child run that gets the metrics.
        name: Name of the logger.
        logged: Last step of each metric that the run has already from the same training, see `Tracker.continue_series`;
            a training that goes on from a checkpoint comes by some steps again.

    Example::

        run_id = tracker.child("fit:sst2", stage="fit")
        trainer = L.Trainer(logger=TrackingLogger(tracker, run_id))
    """

    def __init__(
        self, tracker: Tracker, run_id: str, name: str = "mlflow", logged: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self._tracker = tracker
        self._run_id = run_id
        self._name = name
        self._logged = dict(logged or {})
        self._rows: list[tuple[Mapping[str, float], int | None]] = []

    @property
    def name(self) -> str:
        """Name of the logger."""
        return self._name

    @property
    def version(self) -> str:
        """Id of the run."""
        return self._run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep metrics until enough have gathered for a call.

        Args:
            metrics: Values by name.
            step: Training step.
        """
        new = {name: float(value) for name, value in metrics.items() if self._is_new(name, step)}
        if new:
            self._rows.append((new, step))
        if len(self._rows) >= FLUSH_EVERY:
            self._flush()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the driver records the recipe once."""

    @rank_zero_only
    def save(self) -> None:
        """Write what has gathered."""
        self._flush()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Write what has gathered: a training that goes on from this checkpoint does not come by it again.

        Args:
            checkpoint_callback: Is not looked at.
        """
        self._flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what has gathered; the run stays open.

        Args:
            status: How the trainer ended; the driver decides about the run's status.
        """
        self._flush()

    def _is_new(self, name: str, step: int | None) -> bool:
        return step is None or step > self._logged.get(clean_name(name), -1)

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self._tracker.log_metric_rows(self._run_id, rows)
