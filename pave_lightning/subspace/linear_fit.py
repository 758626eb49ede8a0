"""Linear maps fitted to pairs of rows in closed form: ridge regression, and the orthogonal turn.

All in float64 on the CPU; rows may come in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Strengths that are tried, as multiples of the mean square of a centred feature.
STRENGTHS = tuple(10.0**exponent for exponent in range(-8, 5))
# Singular values below this share of the largest one are rounding.
NOTHING = 1e-12


@dataclass(frozen=True)
class LinearFit:
    """A linear map with intercept: ``x @ weight.T + bias``.

    Attributes:
        weight: shape ``(d_out, d_in)``, float64.
        bias: shape ``(d_out,)``, float64.
        strength: the penalty that was chosen, as a multiple of the mean square of a centred feature.
        left_out: mean squared error of each row by the fit to all others; NaN where it was not asked for.
    """

    weight: Tensor
    bias: Tensor
    strength: float = 0.0
    left_out: float = math.nan


def fit_ridge(inputs: Tensor, targets: Tensor, strengths: tuple[float, ...] = STRENGTHS) -> LinearFit:
    r"""Ridge regression with the strength whose leave-one-out error is least, all strengths by one decomposition.

    With centred inputs :math:`X = U S V^T` and strength :math:`\lambda`, the fit to all rows but one errs on that row
    by its residual over :math:`1 - h_i`, :math:`h_i = 1/n + \sum_k U_{ik}^2 s_k^2 / (s_k^2 + \lambda)`; the intercept
    is not penalised. Of several strengths that err alike the largest is taken.

    Args:
        inputs: shape ``(n, d_in)``, floating-point, at least two rows.
        targets: shape ``(n, d_out)``, floating-point.
        strengths: the penalties that are tried, as multiples of the mean square of a centred input.

    Raises:
        ValueError: there are fewer than two rows, different numbers of them, or values that are not finite.

    Source: Allen, *The Relationship between Variable Selection and Data Augmentation and a Method for Prediction*,
    Technometrics 1974 (PRESS); Golub, Heath & Wahba, *Generalized Cross-Validation*, Technometrics 1979.

    Example:
        >>> inputs = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> fit = fit_ridge(inputs, 2 * inputs + 1)
        >>> round(float(fit.weight), 4), round(float(fit.bias), 4)
        (2.0, 1.0)
    """
    centred, aims, middle, aim = centred_rows(inputs, targets)
    rows = len(centred)
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    kept = values > NOTHING * values.max() if values.numel() and values.max() > 0 else values > 0
    left, values, right = left[:, kept], values[kept], right[kept]
    spread = float(centred.square().mean()) if kept.any() else 0.0
    seen = left.T @ aims
    best: tuple[float, float, Tensor] | None = None
    for strength in sorted(strengths, reverse=True):
        shrunk = values.square() / (values.square() + strength * spread * rows)
        leverage = 1 / rows + (left.square() * shrunk).sum(dim=1)
        residual = aims - left @ (shrunk[:, None] * seen)
        held_out = residual / (1 - leverage).clamp(min=NOTHING)[:, None]
        error = float(held_out.square().mean())
        if best is None or error < best[0]:
            best = error, strength, right.T @ ((shrunk / values)[:, None] * seen)
    error, strength, solved = best or (math.nan, 0.0, centred.new_zeros(centred.shape[1], aims.shape[1]))
    weight = solved.T.contiguous()
    return LinearFit(weight, aim - weight @ middle, strength, error)


def fit_turn(inputs: Tensor, targets: Tensor) -> LinearFit:
    r"""The orthogonal map that brings centred inputs nearest to centred targets, and the shift between their means.

    It minimises :math:`\|X R - Y\|_F` over orthogonal R: with :math:`X^T Y = U S V^T`, :math:`R = U V^T`.

    Args:
        inputs: shape ``(n, d)``, floating-point.
        targets: shape ``(n, d)``, floating-point.

    Raises:
        ValueError: as `fit_ridge`, or they have different widths.

    Source: Schönemann, *A Generalized Solution of the Orthogonal Procrustes Problem*, Psychometrika 1966.
    """
    if inputs.shape != targets.shape:
        raise ValueError(f"expected inputs and targets of one shape, found {list(inputs.shape)}, {list(targets.shape)}")
    centred, aims, middle, aim = centred_rows(inputs, targets)
    left, _, right = torch.linalg.svd(centred.T @ aims)
    weight = (left @ right).T.contiguous()
    return LinearFit(weight, aim - weight @ middle)


def centred_rows(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets less their means, and the means: float64, on the CPU.

    Raises:
        ValueError: there are fewer than two rows, different numbers of them, or values that are not finite.
    """
    if inputs.ndim != 2 or targets.ndim != 2 or len(inputs) != len(targets) or len(inputs) < 2:
        raise ValueError(
            f"expected at least two rows of inputs and as many of targets, found {list(inputs.shape)} and "
            f"{list(targets.shape)}"
        )
    wide, aims = inputs.detach().double().cpu(), targets.detach().double().cpu()
    if not (torch.isfinite(wide).all() and torch.isfinite(aims).all()):
        raise ValueError("inputs or targets hold NaN or infinity")
    middle, aim = wide.mean(dim=0), aims.mean(dim=0)
    return wide - middle, aims - aim, middle, aim
