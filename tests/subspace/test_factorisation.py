import numpy as np
import pytest
import torch

from pave_lightning.subspace.factorisation import leading_triplets, polar_factor, rounding_level


def decaying(rows, columns, seed=0, decay=0.8):
    random = np.random.default_rng(seed)
    size = min(rows, columns)
    left, _ = np.linalg.qr(random.standard_normal((rows, size)))
    right, _ = np.linalg.qr(random.standard_normal((columns, size)))
    return left * decay ** np.arange(size) @ right.T


@pytest.mark.parametrize("shape", [(6, 6), (40, 50), (50, 40), (1, 5), (5, 1), (70, 70)])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_triplets_are_those_of_an_svd(shape, rank):
    matrix = decaying(*shape)
    found = leading_triplets(torch.tensor(matrix), rank)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    count = len(found.values)
    assert count == min(rank or 99, int((values > max(shape) * 2.0**-23 * values[0]).sum()))
    assert np.allclose(found.values.numpy(), values[:count], rtol=1e-9)
    best = left[:, :count] * values[:count] @ right[:count]
    assert np.allclose(found.product().numpy(), best, atol=1e-9)
    for basis in (found.left.T, found.right):
        assert np.allclose((basis @ basis.T).numpy(), np.eye(count), atol=1e-6)


def test_noise_of_a_low_rank_product_is_left_out():
    random = np.random.default_rng(1)
    base = random.standard_normal((40, 60)).astype(np.float32)
    low_rank = (random.standard_normal((40, 3)) @ random.standard_normal((3, 60))).astype(np.float32)
    found = leading_triplets(torch.tensor((base + low_rank) - base))
    assert len(found.values) == 3


def test_a_zero_matrix_has_no_triplets_and_a_zero_polar_factor():
    zero = torch.zeros(4, 7)
    assert len(leading_triplets(zero).values) == 0
    assert leading_triplets(zero).product().shape == (4, 7)
    assert not polar_factor(zero).any()
    assert polar_factor(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9)])
def test_the_polar_factor_is_u_vt(shape):
    matrix = np.random.default_rng(2).standard_normal(shape)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    assert np.allclose(polar_factor(torch.tensor(matrix)).numpy(), left @ right, atol=1e-10)


def test_the_polar_factor_of_a_matrix_without_full_rank_is_a_partial_isometry():
    matrix = np.outer([3.0, 0.0, 4.0], [0.0, 2.0])
    assert np.allclose(polar_factor(torch.tensor(matrix)).numpy(), [[0, 0.6], [0, 0], [0, 0.8]])


def test_directions_that_two_bases_nearly_share_are_not_told_apart_by_rounding():
    random = np.random.default_rng(4)
    basis = np.linalg.qr(random.standard_normal((60, 5)))[0]
    again = basis + 4 * 2.0**-23 * random.standard_normal(basis.shape)
    factor = polar_factor(torch.tensor(np.hstack([basis, again])))
    assert np.allclose(factor.numpy(), np.hstack([basis, basis]) / np.sqrt(2), atol=1e-5)
    assert int((torch.linalg.svdvals(factor) > 0.5).sum()) == 5


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_a_residual_of_rounding_has_no_triplets(shape):
    matrix = torch.tensor(decaying(*shape, decay=0.9), dtype=torch.float32)
    left = torch.linalg.svd(matrix).U
    rest = matrix - left @ (left.T @ matrix)
    assert rest.any()
    assert len(leading_triplets(rest, floor=rounding_level(matrix)).values) == 0
    assert len(leading_triplets(rest).values) > 0


def test_the_floor_cuts_singular_values():
    matrix = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))[:, :3]
    assert leading_triplets(matrix, floor=2.5).values.tolist() == pytest.approx([4, 3])
    assert leading_triplets(matrix.T, 1, floor=2.5).values.tolist() == pytest.approx([4])


def test_the_rounding_level_by_hand():
    matrix = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 4.0]])
    assert rounding_level(matrix) == pytest.approx(3 * 2.0**-23 * np.sqrt(32))
    assert rounding_level(matrix.T) == rounding_level(matrix)
    assert rounding_level(torch.zeros(2, 2)) == 0
    assert rounding_level(torch.zeros(0, 2)) == 0


def test_broken_matrices_are_refused():
    broken = torch.full((3, 3), float("nan"))
    for function in (leading_triplets, polar_factor):
        with pytest.raises(ValueError, match=r"overflow|NaN"):
            function(broken)
