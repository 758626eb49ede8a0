"""ACE: regression on inputs that nobody has seen, their covariance estimated from the rows of the updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace import leading_triplets
from pave_lightning.subspace.ridge import divided
from pave_lightning.weights import Parameter

# Keeps the published form of the gate from dividing by zero.
_SMALL = 1e-12
# Rows whose differences are below this share of their norm are equal.
_ROUNDING = 1e-10


class AceOptions(MatrixOptions):
    """Options of ACE."""

    form: Literal["scale_free", "published"] = "scale_free"
    """scale_free: a multiple of all task vectors gives the same multiple of the result; published: ridge, gate and
    prior in absolute numbers, and updates without the mean of their rows, as the published code has it."""
    ridge: float = Field(default=0.01, gt=0)
    """What is added to the diagonal of each covariance: a multiple of the mean of its diagonal (scale_free) or the
    number itself (published; 1e-2 in the code, 1e-5 to 4e-2 in the paper by model)."""
    prior: bool = True
    """Whether the mean row of the summed covariances is added to all of its rows."""
    gate: Literal["auto", "always", "never"] = "auto"
    """Whether tasks count as unlike each other: their covariances are then brought to trace 1, and the result is
    refined. auto decides layer by layer."""
    gate_threshold: float = Field(default=0.3, ge=0)
    """auto: tasks are unlike each other where the variance of their log energies is above this; in the published form,
    that variance over the squared mean of the log energies."""
    refined_share: float = Field(default=0.3, gt=0, le=1)
    """Share of the singular directions that the refinement strengthens."""


@dataclass
class _Task:
    """One task's part in a layer.

    Attributes:
        vector: the update, as merged, ``(d_out, d_in)``, float64.
        covariance: of its centred rows, ``(d_in, d_in)``, normalised where tasks are unlike each other.
        ridge: what is added to the covariance's diagonal.
    """

    vector: Tensor
    covariance: Tensor
    ridge: float


@merge_method("ace")
class Ace(MatrixMethod[AceOptions]):
    r"""Fit one matrix to what the updates put out, for inputs that are spread as the rows of the updates are.

    A fine-tuned weight moved along the inputs it was trained on, so the covariance of the centred rows of
    :math:`\tau_t` (``d_out x d_in``), :math:`S_t = \bar\tau_t^T \bar\tau_t`, stands in for that of the layer's inputs.
    With the ridge :math:`\epsilon_t` and the prior :math:`c`, the mean row of :math:`\sum_t S_t`,

    .. math:: D = \Big(\sum_t \tau_t (S_t + \epsilon_t I)\Big)
              \Big(\sum_t (S_t + \epsilon_t I) + \mathbf{1} c\Big)^{-1}, \qquad W = W_0 + \lambda D

    Where tasks are unlike each other, as told by the spread of the energies :math:`\|\tau_t\|^2`, each :math:`S_t` is
    first divided by its trace, and D is refined: with the singular directions :math:`u_i, v_i` and values of
    :math:`D + \sum_t \tau_t (S_t - \bar S)`, the mean of the first k values times :math:`\sum_{i \le k} u_i v_i^T` is
    added; k is at least one, and in the default form :math:`\bar S` has no ridge. Matrix weights only; all else is
    averaged, and so are weights whose rows all moved alike. No data.

    Cost: one factorisation of order d_in a layer, and one of the smaller side where it is refined.

    Source: *ACE-Merging*, CVPR 2026 (arXiv 2603.02945), default scale 1. Departures of the default form, each undone
    by ``form: published``: the ridge is relative, since the published one is an absolute number in units of a squared
    weight; the gate looks at the variance of the log energies alone, since its published denominator is zero where
    energies are about 1; the prior is not divided by the mean energy; and the updates that are merged keep the mean of
    their rows, which the published code drops from the result for good. Position embeddings are no matrix weights here.
    """

    summary = "regression with input covariances estimated from the updates' own rows"
    source = "ACE-Merging 2026, arXiv 2603.02945"
    Options: ClassVar[type[AceOptions]] = AceOptions

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The closed form, refined where the gate says so."""
        full = [vector.double() for vector in vectors.values()]
        energies = torch.stack([vector.square().sum() for vector in full])
        unlike = self._are_unlike(energies)
        tasks = [self._task(vector, unlike) for vector in full]
        if not any(task.covariance.any() for task in tasks):
            return torch.stack(full).mean(dim=0)
        found = self._closed_form(tasks, energies, unlike)
        return self._refined(found, tasks, full) if unlike else found

    def _are_unlike(self, energies: Tensor) -> bool:
        if self.options.gate != "auto":
            return bool(self.options.gate == "always")
        logs = energies[energies > 0].log()
        if len(logs) < 2:
            return False
        spread = float(logs.var())
        if self.options.form == "published":
            spread /= float(logs.mean()) ** 2 + _SMALL
        return bool(spread > self.options.gate_threshold)

    def _task(self, vector: Tensor, unlike: bool) -> _Task:
        centred = vector - vector.mean(dim=0)
        if float(centred.norm()) <= _ROUNDING * float(vector.norm()):
            centred = torch.zeros_like(vector)
        covariance = centred.T @ centred
        trace = float(covariance.trace())
        ridge = float(self.options.ridge)
        if self.options.form == "scale_free":
            ridge *= trace / len(covariance)
        if unlike and trace > 0:
            covariance, ridge = covariance / trace, ridge / trace
        return _Task(centred if self.options.form == "published" else vector, covariance, ridge)

    def _closed_form(self, tasks: list[_Task], energies: Tensor, unlike: bool) -> Tensor:
        total, ridge = torch.zeros_like(tasks[0].covariance), 0.0
        images = torch.zeros_like(tasks[0].vector)
        for task in tasks:
            total += task.covariance
            ridge += task.ridge
            images += task.vector @ task.covariance + task.ridge * task.vector
        if not self.options.prior:
            return divided(images, total, ridge, tolerance=_ROUNDING)
        prior = total.mean(dim=0, keepdim=True)
        if unlike and self.options.form == "published":
            prior = prior / energies.mean()
        # Sherman-Morrison: the prior adds a matrix of rank one, the column of ones times its row.
        solved = divided(torch.cat([images, torch.ones_like(prior), prior]), total, ridge, tolerance=_ROUNDING)
        plain, ones, row = solved[:-2], solved[-2:-1], solved[-1:]
        share = plain.sum(dim=1, keepdim=True) / (1 + ones @ prior.T)
        corrected: Tensor = plain - share @ row
        return corrected

    def _refined(self, found: Tensor, tasks: list[_Task], full: list[Tensor]) -> Tensor:
        mean = torch.stack([task.covariance for task in tasks]).mean(dim=0)
        if self.options.form == "published":
            mean = mean + sum(task.ridge for task in tasks) / len(tasks) * torch.eye(len(mean), dtype=mean.dtype)
        rest = sum(
            (vector @ (task.covariance - mean) for vector, task in zip(full, tasks, strict=True)),
            torch.zeros_like(found),
        )
        rank = max(1, int(self.options.refined_share * min(found.shape)))
        leading = leading_triplets(rest + found, rank)
        if not len(leading.values):
            return found
        # Missing values are zeros of the spectrum, which count in its mean.
        return found + float(leading.values.sum()) / rank * (leading.left @ leading.right)
