import numpy as np
import pytest
import torch

from pave_lightning.statistics import NormSquares


def test_as_the_plain_mean_of_squares() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    squares = NormSquares(6)
    for part in rows.split(7):
        squares.update(part, seen=2 * len(part))
    moment = squares.moment()
    expected = (rows.double().numpy() ** 2).mean(axis=0)
    assert np.allclose(moment.squares.numpy(), expected, rtol=1e-6)
    assert moment.squares.dtype == torch.float32
    assert (moment.rows, moment.seen) == (50, 100)


def test_small_squares_survive_large_sums() -> None:
    squares = NormSquares(1)
    squares.update(torch.tensor([[1e4]]))
    for _ in range(1000):
        squares.update(torch.tensor([[1.0]]))
    assert squares.moment().squares[0] * 1001 == pytest.approx(1e8 + 1000, rel=1e-7)


def test_half_precision_rows_are_squared_in_float32() -> None:
    squares = NormSquares(1)
    squares.update(torch.tensor([[300.0]], dtype=torch.float16))
    assert squares.moment().squares.item() == 9e4


def test_what_is_begun_in_an_inference_pass_can_be_added_to_after_it() -> None:
    with torch.inference_mode():
        squares = NormSquares(2)
        squares.update(torch.ones(3, 2))
    squares.update(torch.zeros(1, 2))
    assert squares.moment().squares.tolist() == [0.75, 0.75]


def test_says_what_is_wrong() -> None:
    squares = NormSquares(3)
    with pytest.raises(ValueError, match=r"at least one row of its input \(token\), found none"):
        squares.moment()
    squares.update(torch.empty(0, 3), seen=4)
    with pytest.raises(ValueError, match=r"at least one row of its input \(token\), found none"):
        squares.moment()
    for wrong in (torch.ones(2, 4), torch.ones(3), torch.ones(2, 3, 1)):
        with pytest.raises(ValueError, match="norm squares of width 3 cannot take rows of shape"):
            squares.update(wrong)
