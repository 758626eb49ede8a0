"""Ridge regression and the orthogonal turn, against scikit-learn, scipy and the definitions."""

import numpy as np
import pytest
import scipy.linalg
import torch

from pave_lightning.subspace.linear_fit import STRENGTHS, fit_ridge, fit_turn


def pairs(rows, width, outputs, seed=0, noise=0.3):
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(rows, width)) @ draw.normal(size=(width, width)) + draw.normal(size=width)
    targets = inputs @ draw.normal(size=(width, outputs)) + noise * draw.normal(size=(rows, outputs)) + 3
    return inputs, targets


def solved(inputs, targets, strength):
    """The normal equations of centred rows."""
    x, y = inputs - inputs.mean(0), targets - targets.mean(0)
    penalty = strength * np.mean(x**2) * len(x)
    weight = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y).T
    return weight, targets.mean(0) - weight @ inputs.mean(0)


@pytest.mark.parametrize(("rows", "width"), [(40, 6), (12, 30), (7, 7)])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_a_fit_solves_the_normal_equations(rows, width, strength):
    inputs, targets = pairs(rows, width, 3)
    fit = fit_ridge(torch.tensor(inputs), torch.tensor(targets), (strength,))
    weight, bias = solved(inputs, targets, strength)
    assert np.allclose(fit.weight, weight, rtol=1e-7, atol=1e-9)
    assert np.allclose(fit.bias, bias, rtol=1e-7, atol=1e-9)
    assert fit.strength == strength


@pytest.mark.parametrize(("rows", "width"), [(20, 4), (10, 25)])
def test_the_error_is_that_of_fits_without_the_row(rows, width):
    """One fit a row, with the penalty of all rows, as the closed form has it."""
    inputs, targets = pairs(rows, width, 2)
    for strength in (1e-4, 1e-2, 1.0):
        x = inputs - inputs.mean(0)
        penalty = strength * np.mean(x**2) * len(x)
        errors = []
        for row in range(rows):
            others = np.delete(np.arange(rows), row)
            held, aims = inputs[others], targets[others]
            a, b = held - held.mean(0), aims - aims.mean(0)
            weight = np.linalg.solve(a.T @ a + penalty * np.eye(width), a.T @ b).T
            errors.append(targets[row] - (weight @ (inputs[row] - held.mean(0)) + aims.mean(0)))
        found = fit_ridge(torch.tensor(inputs), torch.tensor(targets), (strength,)).left_out
        assert found == pytest.approx(np.mean(np.square(errors)), rel=1e-6)


def test_the_best_strength_is_taken():
    inputs, targets = (torch.tensor(each) for each in pairs(30, 20, 2, noise=4.0))
    best = fit_ridge(inputs, targets)
    errors = {strength: fit_ridge(inputs, targets, (strength,)).left_out for strength in STRENGTHS}
    assert best.left_out == min(errors.values())
    assert errors[best.strength] == best.left_out
    assert min(STRENGTHS) < best.strength < max(STRENGTHS)


def test_as_scikit_learn_has_it():
    linear_model = pytest.importorskip("sklearn.linear_model")
    inputs, targets = pairs(50, 8, 2)
    fit = fit_ridge(torch.tensor(inputs), torch.tensor(targets))
    x = inputs - inputs.mean(0)
    model = linear_model.Ridge(alpha=fit.strength * np.mean(x**2) * len(x)).fit(inputs, targets)
    assert np.allclose(fit.weight, model.coef_, rtol=1e-6)
    assert np.allclose(fit.bias, model.intercept_, rtol=1e-6)


def test_an_exact_map_is_found_again():
    inputs, _ = pairs(60, 10, 1)
    weight, bias = np.random.default_rng(1).normal(size=(4, 10)), np.arange(4.0)
    fit = fit_ridge(torch.tensor(inputs), torch.tensor(inputs @ weight.T + bias))
    assert np.allclose(fit.weight, weight, atol=1e-5)
    assert np.allclose(fit.bias, bias, atol=1e-4)


def test_rows_in_any_order_and_constant_features():
    inputs, targets = (torch.tensor(each) for each in pairs(25, 5, 2))
    inputs[:, 2] = 7.0
    fit, order = fit_ridge(inputs, targets), torch.randperm(25, generator=torch.Generator().manual_seed(0))
    again = fit_ridge(inputs[order], targets[order])
    assert torch.allclose(fit.weight, again.weight, atol=1e-10)
    assert torch.allclose(fit.bias, again.bias, atol=1e-9)
    assert fit.weight[:, 2].abs().max() < 1e-12
    still = fit_ridge(torch.ones(6, 3), targets[:6])
    assert not still.weight.any()
    assert torch.allclose(still.bias, targets[:6].mean(0))


@pytest.mark.parametrize("rows", [40, 5])
def test_a_turn_is_that_of_scipy(rows):
    inputs, targets = pairs(rows, 8, 8)
    fit = fit_turn(torch.tensor(inputs), torch.tensor(targets))
    x, y = inputs - inputs.mean(0), targets - targets.mean(0)
    turn, _ = scipy.linalg.orthogonal_procrustes(x, y)
    assert torch.allclose(fit.weight @ fit.weight.T, torch.eye(8, dtype=torch.float64), atol=1e-10)
    found = x @ fit.weight.T.numpy()
    assert np.linalg.norm(found - y) == pytest.approx(np.linalg.norm(x @ turn - y), rel=1e-9)
    if rows > 8:
        assert np.allclose(fit.weight, turn.T, atol=1e-8)


def test_a_rotation_is_undone_to_the_last_digit():
    inputs, _ = pairs(50, 9, 1)
    rotation = scipy.linalg.qr(np.random.default_rng(3).normal(size=(9, 9)))[0]
    turned = torch.tensor(inputs @ rotation + 2)
    fit = fit_turn(turned, torch.tensor(inputs))
    assert torch.allclose(turned @ fit.weight.T + fit.bias, torch.tensor(inputs), atol=1e-12 * 1e3)
    assert np.allclose(fit.weight, rotation, atol=1e-12)


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (torch.zeros(1, 2), torch.zeros(1, 1)),
        (torch.zeros(3, 2), torch.zeros(2, 1)),
        (torch.tensor([[1.0], [torch.nan]]), torch.zeros(2, 1)),
        (torch.ones(2, 1), torch.tensor([[1.0], [torch.inf]])),
    ],
)
def test_what_cannot_be_fitted(inputs, targets):
    with pytest.raises(ValueError, match=r"expected at least two rows|NaN or infinity"):
        fit_ridge(inputs, targets)
    with pytest.raises(ValueError, match="of one shape"):
        fit_turn(torch.zeros(3, 2), torch.zeros(3, 3))
