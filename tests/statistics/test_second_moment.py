import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pave_lightning.statistics import SecondMoment
from pave_lightning.statistics.second_moment import PARTIAL_ROWS, float32_products_are_exact, full_precision

torch.set_num_threads(1)


def exact(rows: Tensor, outputs: Tensor | None = None) -> Tensor:
    left = rows if outputs is None else outputs
    return left.double().T @ rows.double() / len(rows)


# 200 and 530 are no multiples of the blocks that the lower triangle is cut into.
@pytest.mark.parametrize("width", [1, 3, 64, 65, 200, 530])
def test_input_moment(width: int) -> None:
    rows = torch.randn(90, width)
    moment = SecondMoment(width)
    for batch in rows.split(40):
        moment.update(batch)
    mean = moment.mean()
    assert mean.dtype == torch.float32
    assert torch.equal(mean, mean.T)
    assert moment.rows == 90
    assert moment.kind == "input"
    torch.testing.assert_close(mean.double(), exact(rows), atol=1e-5, rtol=1e-5)


def test_cross_moment() -> None:
    rows, outputs = torch.randn(90, 7), torch.randn(90, 3)
    moment = SecondMoment(7, 3)
    for batch, batch_outputs in zip(rows.split(40), outputs.split(40), strict=True):
        moment.update(batch, batch_outputs)
    assert (moment.kind, moment.shape) == ("cross", (3, 7))
    torch.testing.assert_close(moment.mean().double(), exact(rows, outputs), atol=1e-6, rtol=1e-5)


def test_many_rows_are_summed_in_float64() -> None:
    rows = torch.randn(PARTIAL_ROWS, 8, generator=torch.Generator().manual_seed(0))
    moment, single = SecondMoment(8), torch.zeros(8, 8)
    for _ in range(64):
        moment.update(rows)
        single.addmm_(rows.T, rows)
    error = (moment.mean() - exact(rows)).abs().max()
    assert error < 0.5 * (single / (64 * len(rows)) - exact(rows)).abs().max()
    assert error < 5e-6


def test_merging_shards_is_exact() -> None:
    rows = torch.randint(-8, 8, (60, 5)).float()
    whole, first, second = SecondMoment(5), SecondMoment(5), SecondMoment(5)
    whole.update(rows)
    first.update(rows[:13])
    second.update(rows[13:])
    first.merge(second)
    assert torch.equal(first.mean(), whole.mean())
    assert first.rows == 60
    first.merge(second)
    assert first.rows == 107
    assert second.rows == 47


def test_no_rows_change_nothing() -> None:
    moment = SecondMoment(5)
    moment.update(torch.empty(0, 5))
    with pytest.raises(ValueError, match="at least one row"):
        moment.mean()
    moment.update(torch.ones(2, 5))
    assert torch.equal(moment.mean(), torch.ones(5, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_upcast_before_the_product(dtype: torch.dtype) -> None:
    rows, outputs = torch.randn(50, 70).to(dtype), torch.randn(50, 3).to(dtype)
    square, cross = SecondMoment(70), SecondMoment(70, 3)
    square.update(rows)
    cross.update(rows, outputs)
    torch.testing.assert_close(square.mean().double(), exact(rows), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cross.mean().double(), exact(rows, outputs), atol=1e-6, rtol=1e-5)


def test_autocast_does_not_reach_the_product() -> None:
    rows = torch.randn(50, 70)
    plain, under_autocast = SecondMoment(70), SecondMoment(70)
    plain.update(rows)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast.update(rows)
    assert torch.equal(plain.mean(), under_autocast.mean())


def test_results_of_an_inference_pass_are_ordinary_tensors() -> None:
    with torch.inference_mode():
        moment = SecondMoment(4)
        moment.update(torch.ones(3, 4))
        inside = moment.mean()
    moment.update(torch.ones(3, 4))
    assert not inside.is_inference()
    assert torch.equal(moment.mean(), torch.ones(4, 4))


def test_matrix_precision_is_raised_and_put_back() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        assert not float32_products_are_exact()
        with full_precision("cpu"):
            assert float32_products_are_exact()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one switch only")
def test_matrix_precision_set_for_one_backend_is_put_back() -> None:
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        assert not float32_products_are_exact()
        with full_precision("cpu"):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    assert float32_products_are_exact()


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="rows only"):
        SecondMoment(4).update(torch.ones(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="rows and outputs"):
        SecondMoment(4, 3).update(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"rows of shape \(2, 5\)"):
        SecondMoment(4).update(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"outputs of shape \(1, 3\)"):
        SecondMoment(4, 3).update(torch.ones(2, 4), torch.ones(1, 3))
    with pytest.raises(ValueError, match="cannot merge"):
        SecondMoment(4).merge(SecondMoment(4, 4))


def test_all_reduce_alone_does_nothing() -> None:
    moment = SecondMoment(2)
    moment.update(torch.ones(3, 2))
    moment.all_reduce()
    assert moment.rows == 3


def reduce_in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    moment = SecondMoment(4)
    if rank == 0:
        moment.update(torch.arange(12.0).reshape(3, 4))
    moment.all_reduce()
    torch.save((moment.rows, moment.mean()), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_reduce_over_two_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=reduce_in_process, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    alone = SecondMoment(4)
    alone.update(torch.arange(12.0).reshape(3, 4))
    for rank in range(2):
        rows, mean = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert rows == 3
        assert torch.equal(mean, alone.mean())
