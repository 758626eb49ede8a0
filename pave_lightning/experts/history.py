"""The course of a training: its loss and its validation scores by step, kept with the finished expert."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback

Series = dict[str, list[list[float]]]

# Points that are kept of each series; a curve on a page shows no more.
MOST_POINTS = 400
TRAINING, VALIDATION = "train/", "validation/"


class History(Callback):
    """Notes what is logged under ``train/`` and ``validation/``, from rank zero's point of view.

    It is part of the trainer's checkpoints, so a training that goes on from one has its whole course. Losses are taken
    every ``log_every_n_steps`` steps, as for loggers.
    """

    def __init__(self) -> None:
        self._series: Series = {}

    def curves(self) -> Series:
        """Pairs of optimiser step and value by name of the metric, in the order of steps, at most `MOST_POINTS`."""
        return {name: _thinned(points) for name, points in self._series.items()}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin anew; what a checkpoint knows is restored afterwards."""
        if stage == "fit":
            self._series = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note losses."""
        every = max(getattr(trainer, "log_every_n_steps", 1), 1)  # set by a part of the trainer
        if trainer.global_step % every == 0:
            self._note(trainer, TRAINING)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note scores."""
        if not trainer.sanity_checking:
            self._note(trainer, VALIDATION)

    def state_dict(self) -> dict[str, Any]:
        """All points so far."""
        return {"series": self._series}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the points of a checkpoint."""
        self._series = {name: [list(point) for point in points] for name, points in state_dict["series"].items()}

    def _note(self, trainer: L.Trainer, kind: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith(kind):
                points, step = self._series.setdefault(name, []), trainer.global_step
                if points and points[-1][0] == step:  # with accumulated gradients, several batches make a step
                    points.pop()
                points.append([step, float(value)])


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Points at even distances, the last one among them."""
    if len(points) <= MOST_POINTS:
        return points
    distance = -(-len(points) // MOST_POINTS)
    return points[::-1][::distance][::-1]
