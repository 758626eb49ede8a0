"""Stages in processes of their own, where Lightning starts several of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pave_lightning.errors import PaveError
from pave_lightning.evaluation.options import CODE_OPTION
from pave_lightning.pipeline.group_launching import run_group
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.recipe.loading import recipe_to_yaml
from pave_lightning.recipe.schema import Recipe
from pave_lightning.system.interrupts import raise_if_stopped
from pave_lightning.system.processes import DRIVER, PARENT, is_rank_zero
from pave_lightning.tracking import Tracker

DRIVER_URI = "PAVE_DRIVER_TRACKING_URI"
DRIVER_RUN = "PAVE_DRIVER_RUN_ID"
# The commands that may run code and start processes.
CODE_STAGES = ("evaluate",)
# How long a stage that is to end may take for it.
PATIENCE_SECONDS = 10


class Launcher:
    """Runs one stage as ``pave STAGE RECIPE`` in a process of its own.

    Lightning's ddp runs the command again for every further process, so nothing of the driver may stand in it. The
    driver holds the lock of the run folder and the MLflow run; the stage only attaches to them. An exit code of 0 is
    no proof of success: the caller looks for the stage's manifest.

    Args:
        allow_code: whether benchmarks may run code, see `run_recipe`.
    """

    def __init__(self, *, allow_code: bool = False) -> None:
        self.allow_code = allow_code

    def run(
        self,
        stage: str,
        recipe: Recipe,
        folder: RunFolder,
        task: str | None,
        tracker: Tracker | None,
        *,
        processes: int = 1,
    ) -> None:
        """Run a stage to its end.

        Args:
            stage: the command that makes it.
            recipe: the recipe.
            folder: its run folder.
            task: for which task; for all where None.
            tracker: the MLflow record.
            processes: how many processes share the work, where not Lightning but this starts them.

        Raises:
            Interrupted: the stage was stopped from outside.
            PaveError: it failed; its own message has been shown.
        """
        path = folder.write_text("recipe.yaml", recipe_to_yaml(recipe))
        command = [sys.executable, "-P", "-m", "pave_lightning", stage, str(path)]
        if task is not None:
            command += ["--task", task]
        if self.allow_code and stage in CODE_STAGES:
            command.append(CODE_OPTION)
        environment = {**os.environ, **python_environment(), DRIVER: "1", PARENT: str(os.getpid())}
        if tracker is not None:
            environment |= {DRIVER_URI: tracker.uri, DRIVER_RUN: tracker.parent_run_id}
        if processes > 1:
            try:
                run_group(f"the stage '{stage}'", command, environment, processes, folder.root)
            except BaseException:
                folder.clear()
                raise
            return
        code = run_to_its_end(command, environment)
        raise_if_stopped(code)
        if code:
            what = f"the stage '{stage}'{f' of task {task}' if task else ''}"
            if code == -signal.SIGKILL:
                raise PaveError(
                    f"{what} was killed from outside (SIGKILL), which is how a system ends programs when memory runs "
                    "out; free memory, or use fewer devices or smaller batches, and run the same command again"
                )
            raise PaveError(f"{what} failed (exit code {code}); see above")


def run_to_its_end(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program and return its exit code; where this process is stopped, the program is, too.

    It is asked to end before it is killed, so that it can end the processes that it has started itself.
    """
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait()
        except BaseException as stop:
            if not isinstance(stop, KeyboardInterrupt):  # which reaches it, too, where it comes from a terminal
                process.terminate()
            for next_step in (process.terminate, process.kill):
                try:
                    process.wait(PATIENCE_SECONDS)
                except subprocess.TimeoutExpired:
                    next_step()
            raise


def python_environment() -> dict[str, str]:
    """Variables that keep code of the current folder from being imported instead of what is installed.

    They hold for the further processes as well that Lightning starts with ``python -m``. The user's own PYTHONPATH
    stays; an empty entry, which stands for the current folder and is mostly a slip, does not.
    """
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    package = Path(__file__).resolve().parents[2]
    if not sys.flags.safe_path and sys.path and sys.path[0] == str(Path.cwd()) == str(package):
        entries.append(str(package))  # a checkout that is not installed, run from its own folder
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(entries)}


def attached_tracker() -> Tracker | None:
    """The driver's MLflow run, for rank zero of a launched stage."""
    if not is_rank_zero() or DRIVER_RUN not in os.environ:
        return None
    return Tracker.attach(os.environ[DRIVER_URI], os.environ[DRIVER_RUN])
