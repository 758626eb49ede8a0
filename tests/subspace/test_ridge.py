import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pave_lightning.subspace.ridge import AnchoredRidge, divided


def drawn(seed, tasks=3, d_out=4, d_in=6, rows=20):
    """Weights, inputs of the sought matrix and of the tasks' matrices."""
    random = np.random.default_rng(seed)
    return [
        (
            random.standard_normal((d_out, d_in)),
            random.standard_normal((rows, d_in)),
            random.standard_normal((rows, d_in)),
        )
        for _ in range(tasks)
    ]


def tensor(array):
    return torch.tensor(array, dtype=torch.float64)


def regression(problem, shares, ridge, anchor, *, aimed=False):
    """The same minimum from one long list of equations, solved by least squares: no moments, no inverse."""
    left, right = [], []
    for (weight, inputs, other), share in zip(problem, shares, strict=True):
        root = np.sqrt(share / len(inputs))
        left.append(root * inputs)
        right.append(root * (other if aimed else inputs) @ weight.T)
    left.append(np.sqrt(ridge) * np.eye(anchor.shape[1]))
    right.append(np.sqrt(ridge) * anchor.T)
    return np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=None)[0].T


def solved(problem, shares, ridge, anchor, *, aimed=False, **options):
    sums = AnchoredRidge(anchor.shape)
    for (weight, inputs, other), share in zip(problem, shares, strict=True):
        cross = tensor(inputs.T @ other / len(inputs)) if aimed else None
        sums.add(tensor(weight), tensor(inputs.T @ inputs / len(inputs)), cross=cross, share=share)
    return sums.solve(ridge, tensor(anchor), **options).numpy()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ridge=st.sampled_from([1e-9, 1e-3, 0.5, 20.0]),
    rows=st.sampled_from([1, 4, 30]),
    aimed=st.booleans(),
)
def test_any_ridge_as_the_long_list_of_equations(seed, ridge, rows, aimed):
    problem, shares = drawn(seed, rows=rows), [1.0, 0.25, 3.0]
    anchor = np.random.default_rng(seed + 1).standard_normal((4, 6))
    expected = regression(problem, shares, ridge, anchor, aimed=aimed)
    assert np.allclose(solved(problem, shares, ridge, anchor, aimed=aimed), expected, atol=1e-5)


def test_by_hand():
    sums = AnchoredRidge((1, 2))
    sums.add(torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    sums.add(torch.tensor([[6.0, 4.0]]), torch.tensor([[4.0, 0.0], [0.0, 1.0]]), share=0.5)
    # Per input: (2 * 2 + 0.5 * 4 * 6) / 4 and (1 + 0.5 * 4) / 1.5; pulled to 1 by a ridge of 4 and of 1.5 as strong.
    assert sums.solve().numpy() == pytest.approx(np.array([[4.0, 2.0]]))
    assert sums.solve(4.0, torch.ones(1, 2))[0, 0] == pytest.approx(2.5)
    assert sums.solve(1.5, torch.ones(1, 2))[0, 1] == pytest.approx(1.5)
    assert sums.mean_square == (4 + 1.5) / 2


def test_without_a_ridge_unseen_inputs_keep_the_anchor_or_are_zero():
    problem, anchor = drawn(3, tasks=2, rows=2), np.random.default_rng(9).standard_normal((4, 6))
    stacked = np.concatenate([inputs for _, inputs, _ in problem])
    unseen = np.eye(6) - np.linalg.pinv(stacked) @ stacked
    nearest = solved(problem, [1.0, 1.0], 0.0, anchor)
    smallest = solved(problem, [1.0, 1.0], 0.0, 0 * anchor)
    assert np.allclose(nearest @ unseen, anchor @ unseen, atol=1e-8)
    assert np.allclose(smallest @ unseen, 0, atol=1e-8)
    assert np.allclose(nearest - nearest @ unseen, smallest, atol=1e-6)
    # Every other minimum, such as this one, is longer.
    assert np.linalg.norm(smallest) < np.linalg.norm(nearest)
    residuals = [(w - smallest) @ x.T for w, x, _ in problem]
    assert np.allclose(sum(r @ x for r, (_, x, _) in zip(residuals, problem, strict=True)), 0, atol=1e-6)


def test_the_limit_of_a_small_ridge_is_no_ridge():
    problem, anchor = drawn(4, rows=2), np.random.default_rng(1).standard_normal((4, 6))
    without = solved(problem, [1.0] * 3, 0.0, anchor)
    assert np.allclose(solved(problem, [1.0] * 3, 1e-10, anchor), without, atol=1e-6)


def test_rounding_of_the_moments_is_not_divided_by():
    random = np.random.default_rng(0)
    weight, inputs = random.standard_normal((3, 5)), random.standard_normal((40, 5)) @ np.diag([9, 5, 3, 1, 0])
    turn = np.linalg.qr(random.standard_normal((5, 5)))[0]
    inputs = inputs @ turn
    moment = torch.tensor(inputs.T @ inputs / 40, dtype=torch.float32)
    assert 0 < abs(torch.linalg.eigvalsh(moment.double())[0]) < 1e-5
    sums = AnchoredRidge((3, 5))
    sums.add(tensor(weight), moment)
    lost = turn[4:].T @ turn[4:]
    for ridge in (0.0, 1e-12):
        assert np.allclose(sums.solve(ridge).numpy(), weight - weight @ lost, atol=1e-4)


def test_the_tolerance_says_what_is_unseen():
    sums = AnchoredRidge((1, 3))
    sums.add(torch.ones(1, 3), torch.diag(torch.tensor([1.0, 1e-2, 1e-4])))
    assert sums.solve().numpy() == pytest.approx(np.ones((1, 3)))
    assert sums.solve(tolerance=1e-3).numpy() == pytest.approx(np.array([[1, 1, 0]]), abs=0)
    assert sums.solve(1e-5, torch.full((1, 3), 7.0), tolerance=1e-3)[0, 2] == 7


def test_a_ridge_above_the_tolerance_lifts_what_is_unseen():
    matrix = torch.diag(torch.tensor([1.0] + [0.0] * 99, dtype=torch.float64))
    rows = torch.full((1, 100), 2e-6, dtype=torch.float64)
    lifted = divided(rows, matrix, 2e-6).numpy()
    assert lifted == pytest.approx(np.array([[2e-6 / (1 + 2e-6)] + [1.0] * 99]))
    assert not divided(rows, matrix, 0.5e-6)[:, 1:].any()
    assert divided(rows, matrix, 0.5e-6, tolerance=1e-9).numpy()[:, 1:] == pytest.approx(4.0)


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_nothing_seen_gives_the_anchor(ridge):
    sums = AnchoredRidge((2, 3))
    assert not sums.solve(ridge).any()
    assert sums.solve(ridge, torch.full((2, 3), 4.0)).eq(4).all()
    sums.add(torch.ones(2, 3), torch.zeros(3, 3))
    assert sums.solve(ridge, torch.full((2, 3), 4.0)).eq(4).all()


def test_a_matrix_without_inputs():
    sums = AnchoredRidge((2, 0))
    assert sums.solve().shape == (2, 0)
    assert sums.mean_square == 0


def test_solving_changes_nothing_and_tasks_may_come_in_any_order():
    problem, anchor = drawn(8), np.zeros((4, 6))
    sums = AnchoredRidge((4, 6))
    for weight, inputs, _ in problem:
        sums.add(tensor(weight), tensor(inputs.T @ inputs))
    first, other = sums.solve(0.1), sums.solve()
    assert torch.equal(sums.solve(0.1), first)
    assert not torch.allclose(first, other)
    turned = solved(problem[::-1], [20.0] * 3, 0.1, anchor)
    assert np.allclose(turned, first.numpy(), atol=1e-9)


def test_an_indefinite_sum_is_solved_all_the_same():
    # Rounding, or cancelling shares, may leave an eigenvalue below minus the ridge.
    matrix = tensor(np.diag([1.0, 0.5, -1e-3]))
    found = divided(torch.ones(1, 3, dtype=torch.float64), matrix, 1e-4)
    assert found.numpy() == pytest.approx(np.array([[1 / 1.0001, 1 / 0.5001, 0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.add(torch.ones(3, 2), torch.ones(3, 3)), r"weight must have shape \(2, 3\), found \(3, 2\)"),
        (lambda s: s.add(torch.ones(2, 3), torch.ones(2, 3)), r"moment must have shape \(3, 3\), found \(2, 3\)"),
        (
            lambda s: s.add(torch.ones(2, 3), torch.eye(3), cross=torch.eye(2)),
            r"cross must have shape \(3, 3\), found \(2, 2\)",
        ),
        (lambda s: s.add(torch.ones(2, 3), torch.eye(3), share=-1.0), "share must be .* found -1.0"),
        (lambda s: s.add(torch.ones(2, 3), torch.eye(3), share=float("inf")), "share must be .* found inf"),
        (lambda s: s.solve(-0.5), "ridge must be .* found -0.5"),
        (lambda s: s.solve(float("nan")), "ridge must be .* found nan"),
        (lambda s: s.solve(tolerance=1.0), r"tolerance must be .* found 1\.0"),
        (lambda s: s.solve(0.0, torch.ones(3, 2)), r"anchor must have shape \(2, 3\), found \(3, 2\)"),
        (
            lambda s: (s.add(torch.ones(2, 3), torch.full((3, 3), float("nan"))), s.solve(1.0)),
            "the summed moments hold NaN or infinite values",
        ),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(AnchoredRidge((2, 3)))
