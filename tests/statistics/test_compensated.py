import numpy as np
import pytest
import torch

from pave_lightning.statistics.compensated import CompensatedSum

SHAPES = [((5, 5), True), ((200, 200), True), ((700, 700), True), ((5, 9), False), ((300, 900), False), ((0, 4), False)]


def factors(rng, shape, lower, rows):
    left = rng.standard_normal((rows, shape[0])).astype(np.float32)
    right = left if lower else rng.standard_normal((rows, shape[1])).astype(np.float32)
    return left, right


@pytest.mark.parametrize(("shape", "lower"), SHAPES)
def test_products_are_added_up(shape, lower):
    rng = np.random.default_rng(0)
    found, wanted = CompensatedSum(shape, lower=lower), np.zeros(shape)
    for rows in (3, 40, 1):
        left, right = factors(rng, shape, lower, rows)
        found.add_product(torch.tensor(left), torch.tensor(right))
        wanted += left.astype(np.float64).T @ right
    assert found.mean(4).numpy() == pytest.approx(wanted / 4, rel=1e-5, abs=1e-5)
    if lower:
        assert torch.equal(found.mean(3), found.mean(3).T)
    assert found.bytes <= 6 * shape[0] * shape[1]


def test_long_sums_lose_nothing_but_their_last_rounding():
    """As a float64 sum of the same float32 products, where a float32 sum is off by hundreds of roundings."""
    rng, size = np.random.default_rng(0), 70
    found, plain, exact = CompensatedSum((size, size), lower=True), torch.zeros(size, size), np.zeros((size, size))
    for _ in range(3000):
        rows = torch.tensor(rng.standard_normal((4, size)).astype(np.float32))
        found.add_product(rows, rows)
        for start in (0, 64):  # the very products that are added
            product = rows[:, start:].T @ rows[:, start : start + 64]
            exact[start:, start : start + 64] += product.double().numpy()
            plain[start:, start : start + 64] += product
    lower = np.tril_indices(size)
    step = 2.0**-24 * np.abs(exact[lower])
    errors = np.abs(found.mean(1).double().numpy() - exact)[lower]
    assert (errors <= 1.1 * step + 1e-5 * np.sqrt(np.diag(exact).mean())).all()
    diagonal = np.arange(size)
    assert (np.abs(found.mean(1).double().numpy() - exact)[diagonal, diagonal] <= 1.01 * 2.0**-24 * 12500).all()
    assert np.abs(plain.double().numpy() - exact)[diagonal, diagonal].max() > 10 * 2.0**-24 * 12000


def test_small_eigenvalues_survive():
    """One direction a million times as strong as another, over many products."""
    rng, size = np.random.default_rng(1), 64
    turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
    scales = np.geomspace(1, 1e-3, size)
    found, count, exact = CompensatedSum((size, size), lower=True), 0, np.zeros((size, size))
    for _ in range(400):
        rows = (rng.standard_normal((256, size)) * scales @ turn.T).astype(np.float32)
        found.add_product(torch.tensor(rows), torch.tensor(rows))
        exact += rows.astype(np.float64).T @ rows
        count += len(rows)
    values = np.linalg.eigvalsh(found.mean(count).double().numpy())
    assert values[0] == pytest.approx(np.linalg.eigvalsh(exact / count)[0], rel=0.05)


@pytest.mark.parametrize(("shape", "lower"), SHAPES)
def test_sums_of_shards_and_copies(shape, lower):
    rng = np.random.default_rng(0)
    pairs = [tuple(map(torch.tensor, factors(rng, shape, lower, 10))) for _ in range(3)]
    whole, first, second = (CompensatedSum(shape, lower=lower) for _ in range(3))
    for pair in pairs:
        whole.add_product(*pair)
    first.add_product(*pairs[0])
    kept = first.copy()
    for pair in pairs[1:]:
        second.add_product(*pair)
    first.add(second)
    torch.testing.assert_close(first.mean(3), whole.mean(3), rtol=1e-6, atol=1e-6)
    assert torch.equal(kept.mean(1), CompensatedSum.mean(kept.copy(), 1))
    assert not shape[0] or not torch.equal(kept.mean(3), first.mean(3))
    parts = [values for _, _, values in whole.parts()]
    first.replace(iter(parts))
    assert torch.equal(first.mean(2), whole.mean(2))


@pytest.mark.parametrize(("shape", "lower"), SHAPES)
def test_a_sum_that_is_used_up_gives_the_same_mean(shape, lower):
    rng = np.random.default_rng(0)
    found = CompensatedSum(shape, lower=lower)
    for _ in range(3):
        found.add_product(*map(torch.tensor, factors(rng, shape, lower, 10)))
    wanted = found.mean(30)
    taken = found.take_mean(30)
    assert torch.equal(taken, wanted)
    assert taken.is_contiguous()
