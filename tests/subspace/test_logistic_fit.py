"""Logistic regression to labels and to probabilities, against scikit-learn and its own optimality."""

import numpy as np
import pytest
import torch

from pave_lightning.subspace.logistic_fit import FOLDS, STRENGTHS, _folds, fit_logistic


def labelled(rows=120, width=5, classes=3, seed=0):
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(rows, width)) * np.linspace(0.5, 3, width) + 2
    logits = inputs @ draw.normal(size=(width, classes)) + draw.gumbel(size=(rows, classes))
    return torch.tensor(inputs), torch.tensor(np.eye(classes)[logits.argmax(1)])


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_as_scikit_learn_has_it(strength):
    linear_model = pytest.importorskip("sklearn.linear_model")
    inputs, targets = labelled()
    fit = fit_logistic(inputs, targets, (strength,))
    x = inputs - inputs.mean(0)
    penalty = strength * float(x.square().mean())
    model = linear_model.LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10_000)
    model.fit(x.numpy(), targets.argmax(1).numpy())
    assert np.allclose(fit.weight, model.coef_, atol=1e-4)
    found = (inputs @ fit.weight.T + fit.bias).softmax(1)
    assert np.allclose(found, model.predict_proba(x.numpy()), atol=1e-4)


def test_the_gradient_is_zero_and_probabilities_count_as_they_are():
    inputs, _ = labelled()
    draw = torch.Generator().manual_seed(0)
    targets = torch.rand(len(inputs), 4, generator=draw, dtype=torch.float64).softmax(1)
    fit = fit_logistic(inputs, targets, (1e-2,))
    x = inputs - inputs.mean(0)
    error = (inputs @ fit.weight.T + fit.bias).softmax(1) - targets
    slope = error.T @ x / len(x) + 1e-2 * x.square().mean() * fit.weight
    assert slope.abs().max() < 1e-6
    assert error.mean(0).abs().max() < 1e-6


def test_the_strength_is_that_of_the_least_held_out_loss():
    """Held-out errors of scikit-learn's fits over the same folds, all of which have all classes."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    inputs, targets = labelled(rows=60, width=20, seed=2)
    best = fit_logistic(inputs, targets)
    x = (inputs - inputs.mean(0)).numpy()
    classes, fold = targets.argmax(1).numpy(), _folds(x, targets.numpy(), FOLDS, 0)
    losses = dict.fromkeys(STRENGTHS, 0.0)
    for strength in STRENGTHS:
        for held in range(FOLDS):
            there = fold != held
            penalty = strength * float(np.mean(x**2)) * int(there.sum())
            model = linear_model.LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=100_000)
            said = model.fit(x[there], classes[there]).predict_proba(x[~there])
            losses[strength] += float(((said - targets.numpy()[~there]) ** 2).sum()) / len(x)
    assert best.strength == min(losses, key=losses.get)
    assert best.left_out == pytest.approx(losses[best.strength], rel=2e-3)
    assert min(STRENGTHS) < best.strength < max(STRENGTHS)


def test_rows_in_any_order_give_the_same():
    inputs, targets = labelled()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))
    fit, again = fit_logistic(inputs, targets), fit_logistic(inputs[order], targets[order])
    assert fit.strength == again.strength
    assert fit.left_out == pytest.approx(again.left_out, rel=1e-6)
    assert torch.allclose(fit.weight, again.weight, atol=1e-5)


def test_what_cannot_be_fitted():
    inputs, targets = labelled(rows=4)
    with pytest.raises(ValueError, match="at least 5 rows"):
        fit_logistic(inputs, targets)
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_logistic(inputs * torch.nan, targets, (1.0,))
