"""Independent jobs on several cores, each on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

T = TypeVar("T")


def in_parallel(jobs: Sequence[Callable[[], T]], workers: int) -> list[T]:
    """Run independent jobs in threads, every job on one core.

    Small decompositions gain little from several cores each, so several of them side by side are faster. While the
    jobs run, PyTorch uses one thread in each worker, and BLAS libraries outside of PyTorch use one (see
    `one_blas_thread`); both are as before afterwards. With one worker the jobs run one after the other in the calling
    thread, with all the threads that PyTorch may use. Call it from one thread at a time.

    Args:
        jobs: functions without arguments.
        workers: number of jobs that run at a time, at least 1.

    Returns:
        The results, in the order of the jobs.

    Raises:
        ValueError: ``workers`` is below 1.
        Exception: the first one, in the order of the jobs, that a job raised; jobs that have not begun by then are
            left out.

    Example:
        >>> in_parallel([lambda: 1 + 1, lambda: 2 * 2], workers=2)
        [2, 4]
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, found {workers}")
    workers = min(workers, len(jobs))
    if workers <= 1:
        with one_blas_thread():
            return [job() for job in jobs]
    threads = torch.get_num_threads()
    try:
        with one_blas_thread(), ThreadPoolExecutor(workers, initializer=_alone) as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        # Workers set the number for new threads as well as their own.
        torch.set_num_threads(threads)


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Let PyTorch and the BLAS libraries outside of it use so many threads; None leaves them as they are.

    Sums and products are cut by the number of threads, and round accordingly.
    """
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _libraries().limit(limits=threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let BLAS libraries outside of PyTorch (NumPy's and SciPy's) use one thread in the whole process.

    PyTorch's own threads wait for their next product by spinning, so that a second pool of threads has to share their
    cores with them: a decomposition of order 384 then takes five times as long, one of order 768 twice.
    """
    with _libraries().limit(limits=1, user_api="blas"):
        yield


def _alone() -> None:
    torch.set_num_threads(1)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
