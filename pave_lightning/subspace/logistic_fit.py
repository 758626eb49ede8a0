"""Multinomial logistic regression to labels or to probabilities, its strength by cross-validation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pave_lightning.subspace.linear_fit import LinearFit, centred_rows

Array = npt.NDArray[np.float64]

# Strengths that are tried, as multiples of the mean square of a centred feature; one a row, as in ridge regression.
STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 4))
FOLDS = 5
MOST_STEPS = 500


def fit_logistic(
    inputs: Tensor, targets: Tensor, strengths: tuple[float, ...] = STRENGTHS, *, folds: int = FOLDS, seed: int = 0
) -> LinearFit:
    r"""The linear map whose softmax gives the targets the highest likelihood, with a penalty on its weights.

    It minimises
    :math:`-\frac{1}{n}\sum_i \sum_c p_{ic} \log \mathrm{softmax}(W x_i + b)_c + \frac{\lambda}{2}\|W\|_F^2`
    over W and b, by L-BFGS in float64; the intercept is not penalised. Of the strengths the one is taken whose
    probabilities for the rows of held-out folds have the least squared error (a likelihood has no bound where a class
    is in one fold alone); among equals the largest. The order of the rows does not matter.

    Args:
        inputs: shape ``(n, d)``, floating-point, at least as many rows as folds.
        targets: shape ``(n, C)``, floating-point: probabilities of classes, or one-hot labels.
        strengths: the penalties that are tried, as multiples of the mean square of a centred input.
        folds: how many folds; only where several strengths are tried.
        seed: of the folds.

    Raises:
        ValueError: there are fewer rows than folds, or values that are not finite.
    """
    from scipy.special import softmax  # here, because plans need none of it

    centred, _, middle, _ = centred_rows(inputs, targets)
    wide, aims = centred.numpy(), targets.detach().double().cpu().numpy()
    spread = float(np.mean(wide**2)) or 1.0
    strength, error = strengths[0], float("nan")
    if len(strengths) > 1:
        if len(wide) < folds:
            raise ValueError(f"expected at least {folds} rows, one a fold, found {len(wide)}")
        fold = _folds(wide, aims, folds, seed)
        lost = dict.fromkeys(sorted(strengths, reverse=True), 0.0)
        for held in range(folds):
            there = fold != held
            found: tuple[Array, Array] | None = None
            for tried in lost:  # each begins at the solution of the stronger one before
                found = _solve(wide[there], aims[there], tried * spread, begin=found)
                said = softmax(wide[~there] @ found[0].T + found[1], axis=1)
                lost[tried] += float(((said - aims[~there]) ** 2).sum())
        strength = min(lost, key=lambda tried: lost[tried])
        error = lost[strength] / len(wide)
    weight, bias = _solve(wide, aims, strength * spread, exact=True)
    solved = torch.from_numpy(weight)
    return LinearFit(solved, torch.from_numpy(bias) - solved @ middle, strength, error)


def _folds(wide: Array, aims: Array, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """The fold of each row: classes spread evenly, and the same for a row wherever it stands."""
    # Sorted by content, so that rows in another order come into the same folds.
    order = np.lexsort([*wide.T[:8], aims.argmax(axis=1)])
    fold = np.empty(len(wide), dtype=np.int64)
    start = int(np.random.default_rng(seed).integers(folds))
    fold[order] = (np.arange(len(wide)) + start) % folds
    return fold


def _solve(
    wide: Array, aims: Array, penalty: float, *, exact: bool = False, begin: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """Weight ``(C, d)`` and intercept ``(C,)`` for one strength; what is only compared need not be exact."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    rows, classes = len(wide), aims.shape[1]
    total = aims.sum(axis=1, keepdims=True)

    def loss(flat: Array) -> tuple[float, Array]:
        weight, bias = flat[:-classes].reshape(classes, -1), flat[-classes:]
        logged = log_softmax(wide @ weight.T + bias, axis=1)
        error = np.exp(logged) * total - aims
        slope = error.T @ wide / rows + penalty * weight
        value = -float((aims * logged).sum()) / rows + penalty * float((weight**2).sum()) / 2
        return value, np.concatenate([slope.ravel(), error.mean(axis=0)])

    start = np.zeros(classes * wide.shape[1] + classes)
    if begin is not None:
        start = np.concatenate([begin[0].ravel(), begin[1]])
    options = {"maxiter": MOST_STEPS, **({"ftol": 1e-14, "gtol": 1e-8} if exact else {"ftol": 1e-10, "gtol": 1e-5})}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    return found.x[:-classes].reshape(classes, -1), found.x[-classes:] - found.x[-classes:].mean()
