import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from pave_lightning.subspace import in_parallel, knowledge_spectrum


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    def job(position: int) -> int:
        time.sleep(0.01 * (5 - position))
        return position

    assert in_parallel([lambda position=position: job(position) for position in range(5)], workers) == list(range(5))
    assert in_parallel([], workers) == []


def test_one_worker_stays_in_the_thread_that_calls() -> None:
    assert in_parallel([threading.get_ident, threading.get_ident], 1) == [threading.get_ident()] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_exception_is_raised_and_what_waits_is_left_out(workers: int) -> None:
    done: list[int] = []

    def fail(text: str) -> None:
        raise RuntimeError(text)

    jobs = [
        lambda: fail("first"),
        lambda: fail("second"),
        *(lambda n=n: (time.sleep(0.02), done.append(n)) for n in range(50)),
    ]
    with pytest.raises(RuntimeError, match="first"):
        in_parallel(jobs, workers)
    assert len(done) < 50


def test_every_worker_has_one_thread_and_all_is_as_before_afterwards() -> None:
    before, libraries = torch.get_num_threads(), blas_threads()
    torch.set_num_threads(3)
    try:
        inside = in_parallel([lambda: (torch.get_num_threads(), blas_threads())] * 4, 2)
        assert inside == [(1, [1] * len(libraries))] * 4
        with pytest.raises(ZeroDivisionError):
            in_parallel([lambda: 1 // 0] * 4, 2)
        assert torch.get_num_threads() == 3
        assert blas_threads() == libraries
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_one_worker_leaves_torch_its_threads_and_takes_them_from_other_libraries() -> None:
    before, libraries = torch.get_num_threads(), blas_threads()
    torch.set_num_threads(3)
    try:
        assert in_parallel([lambda: (torch.get_num_threads(), blas_threads())], 1) == [(3, [1] * len(libraries))]
        assert blas_threads() == libraries
    finally:
        torch.set_num_threads(before)


def test_spectra_are_the_same_in_parallel() -> None:
    weights = [torch.from_numpy(np.random.default_rng(seed).normal(size=(50, 60))) for seed in range(6)]
    jobs = [lambda weight=weight: knowledge_spectrum(weight, torch.eye(60)).tail(45) for weight in weights]
    for side_by_side, alone in zip(in_parallel(jobs, 2), in_parallel(jobs, 1), strict=True):
        torch.testing.assert_close(side_by_side @ side_by_side.T, alone @ alone.T, rtol=0, atol=1e-9)


def test_refuses_no_workers() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        in_parallel([], 0)
