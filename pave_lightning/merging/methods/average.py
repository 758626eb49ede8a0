"""Simple average of the experts."""

from __future__ import annotations

from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.sequential import RunningMean


@merge_method("average")
class Average(RunningMean):
    r"""The mean of the experts' weights, :math:`W = W_0 + \frac{1}{T} \sum_t \tau_t`.

    Cost: one addition a weight and task. Source: Wortsman et al., *Model soups*, 2022 (arXiv 2203.05482), used across
    tasks; heads are not averaged.
    """

    summary = "mean of the experts' weights"
    source = "Wortsman et al. 2022, arXiv 2203.05482"
    elementwise = True
    single_precision = True
