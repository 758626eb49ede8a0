"""One program in several processes that share its work, all of which end when one is lost."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from pave_lightning.errors import PaveError
from pave_lightning.system.files import UNFINISHED
from pave_lightning.system.interrupts import raise_if_stopped
from pave_lightning.system.process_groups import Place

# How long processes that are to end may take for it.
PATIENCE_SECONDS = 10
# How often they are looked at.
POLL_SECONDS = 0.05
# The exit code of a mistake of the user, and within which time all processes come to it.
USER_ERROR, SAME_MISTAKE_SECONDS = 2, 2


def run_group(what: str, command: Sequence[str], environment: Mapping[str, str], processes: int, folder: Path) -> None:
    """Run a program in several processes that share its work, see `process_group`.

    Only the first one writes to the terminal. Once one of them fails, the others are ended; where this process is
    stopped, all are.

    Args:
        what: the work, in messages.
        command: the program.
        environment: its variables.
        processes: how many processes there are.
        folder: where they may keep what they tell each other.

    Raises:
        Interrupted: a process was stopped from outside.
        PaveError: one has failed; the message names it.
    """
    meeting = Path(tempfile.mkdtemp(prefix=f"processes{UNFINISHED}", dir=folder)).absolute()
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            own = {**environment, **Place(rank, processes, meeting).environment()}
            with _log_of(meeting, rank).open("wb") as log:
                place = None if rank == 0 else log
                started.append(subprocess.Popen(command, env=own, stdout=place, stderr=place))
        failed = _first_to_fail(started)
        if failed is not None:
            log_of_failed = _log_of(meeting, failed)
            _refuse(what, failed, started[failed].returncode, processes, log_of_failed.read_text(errors="replace"))
    except BaseException as stop:
        # A Ctrl-C from a terminal reaches them, too.
        _end(started, asked=isinstance(stop, KeyboardInterrupt))
        raise
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _log_of(meeting: Path, rank: int) -> Path:
    return meeting / f"process-{rank}.log"


def _first_to_fail(started: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all processes, or for the first that fails, which is returned."""
    while True:
        codes = [process.poll() for process in started]
        failed = [rank for rank, code in enumerate(codes) if code]
        if not failed:
            if all(code == 0 for code in codes):
                return None
            time.sleep(POLL_SECONDS)
            continue
        if codes[0] is None and codes[failed[0]] == USER_ERROR:
            # All find the same mistake, and the first one tells it best.
            with suppress(subprocess.TimeoutExpired):
                started[0].wait(SAME_MISTAKE_SECONDS)
            if started[0].poll():
                return 0
        return failed[0]


def _end(started: Sequence[subprocess.Popen[bytes]], *, asked: bool) -> None:
    """End the processes that still run, which are given time to tidy up."""
    for process in started if not asked else ():
        process.terminate()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _refuse(what: str, rank: int, code: int, processes: int, log: str) -> NoReturn:
    """Tell that a process has failed.

    Raises:
        Interrupted: it was stopped from outside.
        PaveError: it has failed.
    """
    raise_if_stopped(code)
    which = f"process {rank + 1} of {processes} of {what}"
    if code == -signal.SIGKILL:
        raise PaveError(
            f"{which} was killed from outside (SIGKILL), which is how a system ends programs when memory runs out; "
            "free memory, or set fewer compute.processes, and run the same command again"
        )
    if code < 0:
        raise PaveError(f"{which} crashed ({signal.Signals(-code).name}); run the same command again")
    if rank == 0:
        raise PaveError(f"{which} failed (exit code {code}); see above")
    told = log.strip().removeprefix("error: ") or "it said nothing"
    raise PaveError(f"{which} failed (exit code {code}): {told}")
