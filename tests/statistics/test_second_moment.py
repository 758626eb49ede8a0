import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.statistics import LayerMoment, SecondMoment
from pave_lightning.statistics.second_moment import (
    FEWEST_WAITING,
    float32_products_are_exact,
    full_precision,
)

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


@pytest.mark.parametrize("batch", [1, 7, 100, 700, 2000])
@pytest.mark.parametrize("kind", ["input", "cross", "output"])
def test_batches_of_any_size_add_up(kind: Any, batch: int) -> None:
    rows, outputs = torch.randn(2000, 30), torch.randn(2000, 9)
    moment = SecondMoment(30, None if kind == "input" else 9, kind=kind)
    for some, others in zip(rows.split(batch), outputs.split(batch), strict=True):
        moment.update(None if kind == "output" else some, None if kind == "input" else others)
    expected = {"input": exact(rows), "cross": exact(rows, outputs), "output": exact(outputs)}[kind]
    assert moment.moment().kind == kind
    assert moment.moment().rows == 2000
    torch.testing.assert_close(moment.mean().double(), expected, atol=1e-5, rtol=1e-5)


def test_what_is_given_may_change_afterwards() -> None:
    rows, moment = torch.randn(5, 8), SecondMoment(8)
    expected = exact(rows)
    moment.update(rows)
    rows.zero_()
    torch.testing.assert_close(moment.mean().double(), expected, atol=1e-6, rtol=1e-5)


def test_fewer_rows_than_the_width_are_kept() -> None:
    rows = torch.randn(12, 12)
    moment = SecondMoment(12)
    for count, batch in [(4, rows[:4]), (11, rows[4:11])]:
        moment.update(batch)
        found = moment.moment()
        assert (found.kind, found.rows, found.matrix.dtype) == ("rows", count, torch.float32)
        torch.testing.assert_close(found.matrix, rows[:count] / count**0.5)
        torch.testing.assert_close(found.covariance().double(), exact(rows[:count]), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(moment.mean().double(), exact(rows[:count]), atol=1e-6, rtol=1e-5)
    moment.update(rows[11:])
    assert moment.moment().kind == "input"
    torch.testing.assert_close(moment.mean().double(), exact(rows), atol=1e-6, rtol=1e-5)


def test_rows_are_not_kept_when_not_wanted() -> None:
    rows, moment = torch.randn(4, 12), SecondMoment(12, keep_rows=False)
    moment.update(rows)
    assert moment.moment().kind == "input"
    torch.testing.assert_close(moment.moment().matrix.double(), exact(rows), atol=1e-6, rtol=1e-5)


def test_the_covariance_of_each_kind() -> None:
    square = torch.randn(3, 3)
    assert LayerMoment("input", square, 4).covariance() is square
    few = torch.randn(2, 3)
    found = LayerMoment("rows", few, 2).covariance()
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, few.T @ few)
    for kind in ("cross", "output"):
        with pytest.raises(PaveError, match=rf"found a moment of kind '{kind}'.*moments='input'"):
            LayerMoment(kind, square, 4).covariance()  # type: ignore[arg-type]


def test_what_was_seen_is_counted_apart() -> None:
    first, second = SecondMoment(3), SecondMoment(3)
    first.update(torch.randn(2, 3), seen=10)
    second.update(torch.randn(4, 3))
    first.merge(second)
    assert (first.moment().rows, first.moment().seen) == (6, 14)


def test_merging_kept_rows_with_sums() -> None:
    rows = torch.randint(-8, 8, (60, 5)).float()
    for cut in (2, 58):
        first, second = SecondMoment(5), SecondMoment(5)
        first.update(rows[:cut])
        second.update(rows[cut:])
        first.merge(second)
        torch.testing.assert_close(first.mean().double(), exact(rows))
        assert second.rows == 60 - cut
    one, other = SecondMoment(5), SecondMoment(5)
    one.update(rows[:2])
    other.update(rows[2:4])
    one.merge(other)
    assert one.moment().kind == "rows"
    torch.testing.assert_close(one.moment().covariance().double(), exact(rows[:4]))


def test_memory_does_not_depend_on_the_number_of_rows() -> None:
    def held(batches: int) -> int:
        moment = SecondMoment(40)
        for _ in range(batches):
            moment.update(torch.ones(3, 40))
        return moment.held_bytes

    assert held(30) == held(3000) == 6 * 40 * 40 + 4 * FEWEST_WAITING * 40


@pytest.mark.parametrize(("width", "outputs"), [(768, None), (384, 96), (130, 40)])
def test_sums_take_no_more_than_half_as_much_again_as_is_stored_of_them(width: int, outputs: int | None) -> None:
    moment = SecondMoment(width, outputs)
    rows = torch.ones(width, width)
    for _ in range(2):
        moment.update(rows, None if outputs is None else torch.ones(width, outputs))
    stored = moment.moment().matrix.nbytes
    share = 1.5 if outputs is not None else 6 / 4 * 9 / 16
    assert moment.held_bytes <= share * stored


def test_many_rows_are_summed_as_in_float64() -> None:
    rows = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
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
    with pytest.raises(ValueError, match=r"at least one row of the layer's input \(token\)"):
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
    with pytest.raises(ValueError, match="outputs only"):
        SecondMoment(4, 3, kind="output").update(torch.ones(2, 4), torch.ones(2, 3))
    for kind, width in (("rows", None), ("output", None), ("cross", None), ("input", 3)):
        with pytest.raises(ValueError, match=f"kind '{kind}'"):
            SecondMoment(4, width, kind=kind)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("width", "own", "others", "later"), [(64, 10, 200, 100), (128, 100, 128, 50), (128, 100, 20, 50)]
)
def test_rows_that_come_after_merging_are_not_lost(width, own, others, later):
    parts = [
        torch.randn(count, width, generator=torch.Generator().manual_seed(count)) for count in (own, others, later)
    ]
    moment, other = SecondMoment(width), SecondMoment(width)
    moment.update(parts[0])
    other.update(parts[1])
    moment.merge(other)
    moment.update(parts[2])
    rows = torch.cat(parts).double()
    torch.testing.assert_close(moment.mean().double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_one_large_update_keeps_what_small_ones_keep():
    # Columns from 1 down to 10^-3.5: in one float32 sum over all rows the smallest eigenvalue is off by a tenth.
    rows = torch.randn(200_000, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3.5, 64)
    moment = SecondMoment(64)
    moment.update(rows)
    exact = torch.linalg.eigvalsh(rows.double().T @ rows.double() / len(rows))[0]
    found = torch.linalg.eigvalsh(moment.mean().double())[0]
    assert float(found) == pytest.approx(float(exact), rel=0.05)


@pytest.mark.parametrize("width", [3, 8, 16, 64])
def test_rows_that_are_much_alike_leave_no_negative_eigenvalues(width):
    torch.manual_seed(0)
    rows = 3 * torch.rand(1, width) + 1e-5 * torch.randn(4096, width)
    moment = SecondMoment(width, keep_rows=False)
    moment.update(rows)
    values = torch.linalg.eigvalsh(moment.mean().double())
    assert values[0] > -16 * torch.finfo(torch.float32).eps * values[-1]


@pytest.mark.parametrize(("width", "outputs", "kind"), [(70, None, None), (70, 12, None), (70, 12, "output")])
@pytest.mark.parametrize("rows", [5, 200])
def test_finishing_gives_the_moment(width, outputs, kind, rows):
    torch.manual_seed(0)
    moment = SecondMoment(width, outputs, kind=kind)
    inputs = None if kind == "output" else torch.randn(rows, width)
    moment.update(inputs, None if outputs is None else torch.randn(rows, outputs), seen=300)
    wanted = moment.copy().moment()
    found = moment.finish()
    assert torch.equal(found.matrix, wanted.matrix)
    assert (found.kind, found.rows, found.seen) == (wanted.kind, wanted.rows, wanted.seen)
    with pytest.raises(ValueError, match="at least one row"):
        SecondMoment(3).finish()
