"""Functions run by several processes at once, as a launcher of Lightning's would start them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 120


def run_together(work: Callable[..., None], world: int, *args: Any) -> None:
    """Call ``work(rank, *args)`` in processes that are forked from this one; each has to end well.

    In each of them Lightning finds a launcher, and pave a driver, so that only the first writes results.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_begin, args=(work, rank, world, port, args), daemon=True) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world


def _begin(work: Callable[..., None], rank: int, world: int, port: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "PAVE_DRIVER": "1",
    }
    work(rank, *args)
    if torch.distributed.is_initialized():
        # Left to the interpreter's exit, gloo's threads may abort a process whose work is done.
        torch.distributed.destroy_process_group()
