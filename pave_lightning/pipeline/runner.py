"""What makes stages: in order, each once, and in processes of their own where their trainer starts several."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

from pave_lightning.experts.trainer_options import is_distributed
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.launching import Launcher
from pave_lightning.pipeline.run_folder import Manifest
from pave_lightning.pipeline.stage import Stage
from pave_lightning.system.processes import is_launched, is_rank_zero

log = logging.getLogger("pave_lightning")


class Runner:
    """Makes the stages that are not there.

    Args:
        context: what the stages share.
        launcher: starts stages in processes of their own where their trainer is distributed; None inside such a
            process.
    """

    def __init__(self, context: Context, launcher: Launcher | None = None) -> None:
        self.context, self.launcher, self.results = context, launcher, context.results

    def run(self, stages: Iterable[Stage]) -> None:
        """Make stages in order; those that are made on demand only where another one needs them."""
        asked = (stage for stage in stages if not stage.on_demand)
        for _, group in groupby(asked, key=lambda stage: (stage.command, stage.task and stage.task.name)):
            together = list(group)
            if self.context.group.size > 1:
                together = [stage for stage in together if stage.processes > 1]  # the driver makes the others
            # One process makes all of them, so what they need is made here, before several would each do it.
            for stage in filter(self._is_elsewhere, together):
                if self.results.current(stage) is None:
                    self._make_needed(stage)
            for stage in together:
                self.make(stage)

    def make(self, stage: Stage) -> None:
        """Make a stage with what it needs, unless it is there and was made from the same inputs.

        Raises:
            PaveError: something that it needs is missing or stale and has a command of its own; the message names it.
        """
        if self.context.group.size > 1:
            self._make_together(stage)
            return
        stage = stage.begun()
        if self.results.current(stage) is not None:
            _tell_up_to_date(stage)
        else:
            with self._held(stage) as needed:
                if needed:
                    self._make_needed(stage)
                    self._work(stage)
        if is_rank_zero():
            # Whatever the work says of itself: only a manifest shows that it was done.
            stage.record(self.context, self.results.finished(stage))

    def _make_together(self, stage: Stage) -> None:
        """As `make`, in one of several processes; the first one decides, and makes alone what cannot be divided."""
        group, stage = self.context.group, stage.begun()
        if group.from_first(self.results.current(stage) is None):
            self._make_needed(stage)
            if stage.processes > 1 or group.is_first:
                stage.run(self.context)
            group.wait()
        elif group.is_first:
            _tell_up_to_date(stage)
        if group.is_first:
            stage.record(self.context, self.results.finished(stage))

    def made(self, stage: Stage) -> Manifest:
        """The manifest of a stage, which is made now where it is not there."""
        self.make(stage)
        return self.results.finished(stage)

    def _make_needed(self, stage: Stage) -> None:
        """Make what a stage needs and has no command of its own, but for what its processes make together."""
        elsewhere = self._is_elsewhere(stage)
        for needed in stage.needs():
            if needed.on_demand and not (elsewhere and needed.processes > 1):
                self.make(needed)

    def _work(self, stage: Stage) -> None:
        if self.launcher is None or not self._is_elsewhere(stage):
            stage.run(self.context)
            return
        self.results.folder.note_hashes()  # which spares the processes of the stage reading all inputs again
        task = None if stage.task is None else stage.task.name
        context = self.context
        self.launcher.run(
            stage.command, context.recipe, context.folder, task, context.tracker, processes=stage.processes
        )

    def _is_elsewhere(self, stage: Stage) -> bool:
        """Whether a stage is made in processes of its own."""
        if self.launcher is None or (stage.on_demand and stage.processes > 1):
            return False
        return stage.processes > 1 or (stage.trainer is not None and is_distributed(stage.trainer))

    @contextmanager
    def _held(self, stage: Stage) -> Iterator[bool]:
        """Hold a stage that other recipes share; whether it is still needed then.

        A process that a driver started finds it held by the driver, for all processes of the stage.
        """
        if is_launched():
            yield True
            return
        with self.results.folder.claimed(stage.name):
            needed = self.results.current(stage) is None
            if not needed:
                _tell_up_to_date(stage)
            yield needed


def _tell_up_to_date(stage: Stage) -> None:
    if stage.announced and not stage.on_demand:
        log.info("%s is up to date", stage.name)
