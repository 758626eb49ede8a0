"""The progress bar of a pass, which leaves nothing behind."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar


class PassingProgressBar(RichProgressBar):
    """Shows progress while a pass runs and clears the line when it ends, so that only our own messages stay.

    It writes to standard error, as all messages do; standard output is for results.
    """

    def __init__(self) -> None:
        super().__init__(console_kwargs={"stderr": True})

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The metrics that are shown: all but the number of the logger's run."""
        shown: dict[str, Any] = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return shown

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Clear the bar."""
        self._clear_when_stopped()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Clear the bar."""
        self._clear_when_stopped()
        super().on_exception(trainer, pl_module, exception)

    def _clear_when_stopped(self) -> None:
        if self.progress is not None:
            self.progress.live.transient = True
