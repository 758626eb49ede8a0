"""The Fisher information of a head's outputs, as the directions in which they are to be differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from pave_lightning.tasks.heads import Likelihood


def directions(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """Directions for outputs of one example, shape ``(n, C)``, by how what is right is drawn from them.

    Returns:
        Shape ``(k, n, C)``, of the outputs' dtype.
    """
    if likelihood is Likelihood.GAUSSIAN:
        return gaussian_directions(outputs)
    if likelihood is Likelihood.BERNOULLI:
        return bernoulli_directions(outputs)
    if likelihood is Likelihood.JOINT:  # each column is what the softmax goes over
        return categorical_directions(outputs.T).transpose(1, 2)
    return categorical_directions(outputs)


def categorical_directions(outputs: Tensor) -> Tensor:
    """Directions for predictions that are drawn, apart from each other, by the softmax of their logits.

    Args:
        outputs: logits of shape ``(n, C)``.

    Returns:
        Shape ``(k, n, C)`` with k at most n (C - 1), the logits' dtype; each differs from zero in one prediction.
    """
    found = []
    for index, logits in enumerate(outputs):
        factor = covariance_factor(logits)
        rows = outputs.new_zeros((len(factor), *outputs.shape))
        rows[:, index] = factor
        found.append(rows)
    return torch.cat(found) if found else outputs.new_zeros((0, *outputs.shape))


def bernoulli_directions(outputs: Tensor) -> Tensor:
    """Directions for outputs that are logits of events which happen apart from each other.

    Args:
        outputs: logits of shape ``(n, C)``.

    Returns:
        Shape ``(n C, n, C)``, of the outputs' dtype: one output each, times the standard deviation of its event.
    """
    likely = outputs.double().sigmoid()
    spread = (likely * (-outputs.double()).sigmoid()).sqrt()
    return torch.diag(spread.flatten()).reshape(-1, *outputs.shape).to(outputs.dtype)


def gaussian_directions(outputs: Tensor) -> Tensor:
    """Directions for outputs that are means of Gaussians of variance one.

    Args:
        outputs: shape ``(n, C)``.

    Returns:
        Shape ``(n C, n, C)``, of the outputs' dtype: one output each.
    """
    return torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device).reshape(-1, *outputs.shape)


def drawn_directions(outputs: Tensor, draws: int, seed: int = 0) -> Tensor:
    r"""Directions for predictions that are drawn by the softmax of their logits, of which a few estimate all.

    For a class c drawn by p, the outer product of :math:`e_c - p` has the expectation
    :math:`\mathrm{diag}(p) - p p^T`, and those of different predictions have the expectation zero. So each draw takes
    all predictions at once, and the mean over draws, and over examples, has no bias.

    Args:
        outputs: logits of shape ``(n, C)``.
        draws: how many.
        seed: of the draws.

    Returns:
        Shape ``(draws, n, C)``, of the outputs' dtype.
    """
    likely = outputs.detach().double().softmax(dim=1)
    generator = torch.Generator().manual_seed(seed)
    classes = torch.multinomial(likely.cpu(), draws, replacement=True, generator=generator).T.to(outputs.device)
    rows = torch.zeros(draws, *outputs.shape, dtype=likely.dtype, device=outputs.device) - likely
    rows.scatter_add_(2, classes[..., None], torch.ones_like(rows[..., :1]))
    found: Tensor = (rows / draws**0.5).to(outputs.dtype)
    return found


def covariance_factor(logits: Tensor) -> Tensor:
    r"""Rows :math:`v_k` with :math:`\sum_k v_k v_k^T = \mathrm{diag}(p) - p p^T`, where p is the softmax of the logits.

    The class is thought to be drawn by asking for one class after the other whether it is the one. With :math:`q_k` the
    probability of class k or a later one, and :math:`m_k` the mean of the one-hot vector given one of these, the answer
    about class k adds the outer product of
    :math:`v_k = \sqrt{p_k q_{k+1} / q_k} (e_k - m_{k+1})`. Likely classes come first, so that nothing cancels.

    Args:
        logits: shape ``(C,)``.

    Returns:
        Shape ``(k, C)`` with k at most C - 1, the logits' dtype; k is less where p of a class is zero in float64.
    """
    likely, order = logits.double().softmax(dim=0).sort(descending=True)
    tails = likely.flip(0).cumsum(0).flip(0)
    after = tails[1:]
    means = likely.expand(len(after), -1).triu(1) / after[:, None]
    rows = torch.eye(len(likely), dtype=likely.dtype, device=likely.device)[:-1] - means
    rows = rows * (likely[:-1] * after / tails[:-1]).sqrt()[:, None]
    factor = torch.empty_like(rows)
    factor[:, order] = rows
    return factor[after > 0].to(logits.dtype)
