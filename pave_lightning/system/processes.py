"""Which process of several this one is, what it may use, and that it ends with the one that started it.

Nothing heavy is imported.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time

from pave_lightning.errors import PaveError
from pave_lightning.system.process_groups import place

log = logging.getLogger("pave_lightning")

DRIVER = "PAVE_DRIVER"
# The number of the process that started this one, as that one tells it.
PARENT = "PAVE_PARENT"

# What launchers of several processes tell each of them; libraries believe it wherever it comes from.
RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
)
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
# Launchers, and where each says how many processes it has started. SLURM says it of the step: an allocation of many
# tasks in which nothing was started by srun is one process.
SIZES = {
    "srun": "SLURM_STEP_NUM_TASKS",
    "mpirun": "OMPI_COMM_WORLD_SIZE",
    "mpiexec": "PMI_SIZE",
    "jsrun": "JSM_NAMESPACE_SIZE",
}

POLL_SECONDS = 0.5
GRACE_SECONDS = 4.0


def usable_cores() -> int:
    """How many processor cores this process may use; all of them where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_launched() -> bool:
    """Whether this process is a stage that a driver started."""
    return DRIVER in os.environ


def is_rank_zero() -> bool:
    """Whether this process is the first of those that work together; only it writes results.

    Only in a stage that a driver started are there others, which the driver or Lightning numbers.
    """
    own = place()
    if own is not None:
        return own.rank == 0
    return not is_launched() or all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))


def refuse_foreign_launchers() -> None:
    """Make sure that this driver is one process alone, and let no library take it for one of several.

    What an earlier launcher left in the environment is removed from it and told. In a SLURM allocation, Lightning is
    kept from waiting for processes that srun would start.

    Raises:
        PaveError: a launcher has started several of this process.
    """
    if is_launched():
        return
    sizes = {name: os.environ.get(key, "") for name, key in SIZES.items()}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sizes["torchrun"] = os.environ.get("WORLD_SIZE", "")
    for name, size in sizes.items():
        if size.isdecimal() and int(size) > 1:
            raise PaveError(
                f"{name} has started {size} of this process, but pave is to be started once and starts further "
                f"processes itself; run the command without {name} and set trainer.devices in the recipe"
            )
    left_over = [name for name in RANKS if os.environ.pop(name, None) is not None]
    if left_over:
        left_over += [name for name in MEETING_POINT if os.environ.pop(name, None) is not None]
        log.warning(
            "ignored, because no launcher has started this process: the environment variables %s", ", ".join(left_over)
        )
        loaded = sys.modules.get("lightning_utilities.core.rank_zero")
        if loaded is not None:  # which reads them once, when it is imported
            loaded.rank_zero_only.rank = 0
    if "SLURM_NTASKS" in os.environ:
        os.environ["SLURM_JOB_NAME"] = "interactive"


def end_with_parent() -> None:
    """Let this process end soon after the one that started it, however that one ended.

    The process is asked to end as by SIGTERM, which leaves it time to tidy up. One that waits for a lost process in a
    library cannot hear that, and is ended all the same. The parent may have ended while Python was starting, so what
    `PARENT` says of it counts; processes that this one starts are told the same of this one.
    """
    told = os.environ.get(PARENT, "")
    parent = int(told) if told.isdecimal() and sys.platform != "win32" else os.getppid()  # there a stub stands between
    os.environ[PARENT] = str(os.getpid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
