"""Metrics of a task: from what is predicted to plain numbers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from torchmetrics.functional.regression import pearson_corrcoef
from torchmetrics.utilities import dim_zero_cat

from pave_lightning.tasks.options import MetricName

# All metrics are 1 at best. An expert that comes no further from a constant answer's score to that has hardly learned.
HARDLY_LEARNED = 0.1


class Correlation(Metric):
    """Correlation of predictions and labels, computed in float64 over all rows at once.

    All rows are kept (8 bytes each), so the value does not depend on batches or on the number of processes. Where the
    predictions or the labels are constant the correlation is not defined; a constant predictor knows nothing, so the
    value is 0. A prediction that is not a number makes the value not a number.

    Args:
        ranked: correlate ranks, ties sharing their mean rank (Spearman), instead of values (Pearson).
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    predictions: list[Tensor]
    labels: list[Tensor]

    def __init__(self, *, ranked: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ranked = ranked
        self.add_state("predictions", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Take in a batch: two floating-point tensors of shape ``(n,)``."""
        self.predictions.append(predictions.detach())
        self.labels.append(labels.detach())

    def compute(self) -> Tensor:
        """The correlation of everything seen: a float32 scalar."""
        # Some devices know no float64.
        predictions, labels = (dim_zero_cat(state).cpu().double() for state in (self.predictions, self.labels))
        if _constant(predictions) or _constant(labels):
            return torch.zeros((), device=self.device)
        if not (predictions.isfinite().all() and labels.isfinite().all()):
            return torch.full((), torch.nan, device=self.device)
        if self.ranked:
            predictions, labels = _ranks(predictions), _ranks(labels)
        return pearson_corrcoef(predictions, labels).float().to(self.device)


class MatthewsCorrelation(MulticlassMatthewsCorrCoef):
    """Matthews correlation that is exactly 0 where only one class is predicted, or only one occurs."""

    def compute(self) -> Tensor:
        """The correlation of everything seen: a float32 scalar."""
        confusion = self.confmat
        if min(int((confusion.sum(dim) > 0).sum()) for dim in (0, 1)) < 2:
            return torch.zeros((), device=confusion.device)
        return super().compute().float()


def build_metrics(names: Sequence[MetricName], outputs: int) -> MetricCollection:
    """Metrics, keyed by their names in the recipe.

    ``accuracy`` is the share of right answers; ``f1`` is that of class 1; ``macro_f1`` is the mean F1 of the classes
    that occur among labels or predictions. Feed them with what is predicted and the labels, shape ``(n,)`` both: int64
    class indices, or floating-point numbers.

    Args:
        names: the metrics.
        outputs: number of classes.

    Returns:
        A collection whose states add up over batches and processes.
    """
    metrics: dict[str, Metric | MetricCollection] = {name: _metric(name, outputs) for name in names}
    # Compute groups are guessed from the first batch's values; these states are small, so nothing is risked for them.
    return MetricCollection(metrics, compute_groups=False)


class MultiLabelF1(MultilabelF1Score):
    """Mean F1 of the classes that occur among labels or predictions, as that of single labels; 0 where none does."""

    def compute(self) -> Tensor:
        """The mean over everything seen: a float32 scalar."""
        right, wrong, missed = (cast(Tensor, state) for state in (self.tp, self.fp, self.fn))
        occurring = right + wrong + missed > 0
        return super().compute()[occurring].mean() if occurring.any() else torch.zeros((), device=self.device)


class MultiLabelAveragePrecision(MultilabelAveragePrecision):
    """Mean average precision of the classes that occur among labels; 0 where none does."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """The mean over everything seen: a float32 scalar."""
        occurring = (dim_zero_cat(self.target) == 1).any(dim=0)
        with warnings.catch_warnings():  # of classes that do not occur
            warnings.simplefilter("ignore")
            return super().compute()[occurring].mean() if occurring.any() else torch.zeros((), device=self.device)


def build_multi_label_metrics(names: Sequence[MetricName], classes: int) -> MetricCollection:
    """Metrics of several labels a row, keyed by their names in the recipe.

    ``micro_f1`` is the F1 of all pairs of a row and a class, ``macro_f1`` the mean F1 of the classes that occur among
    labels or predictions, ``exact_match`` the share of rows whose classes are all right, ``mean_average_precision`` the
    mean, over the classes that occur among labels, of the area below precision over recall. Feed them with
    probabilities, of which those above one half are predictions, and whether each class holds: floating-point and
    int64, shape ``(n, classes)`` both.

    Args:
        names: the metrics.
        classes: their number.
    """

    def metric(name: MetricName) -> Metric:
        match name:
            case "micro_f1":
                return MultilabelF1Score(classes, average="micro", validate_args=False)
            case "macro_f1":
                return MultiLabelF1(classes, average="none", validate_args=False)
            case "exact_match":
                return MultilabelExactMatch(classes, validate_args=False)
            case "mean_average_precision":
                return MultiLabelAveragePrecision(classes, average="none", validate_args=False)
        raise ValueError(f"{name} is no metric of several labels")

    metrics: dict[str, Metric | MetricCollection] = {name: metric(name) for name in names}
    return MetricCollection(metrics, compute_groups=False)


def non_finite_rows(logits: Tensor) -> Tensor:
    """How many rows of logits hold NaN or infinity, int64 scalar on their device: argmax would choose a class of them.

    Args:
        logits: floating-point tensor of shape ``(n, ...)``.
    """
    return (~torch.isfinite(logits)).flatten(1).any(dim=1).sum()


def scores(metrics: MetricCollection) -> dict[str, float]:
    """The values of all metrics as plain numbers; over several processes every one of them has to call this."""
    return {name: float(value) for name, value in metrics.compute().items()}


def _metric(name: MetricName, outputs: int) -> Metric:
    # validate_args costs a pass over each batch; argmax and the checked labels are always valid.
    match name:
        case "accuracy":
            return MulticlassAccuracy(outputs, average="micro", validate_args=False)
        case "f1":
            return BinaryF1Score(validate_args=False)
        case "macro_f1":
            return MulticlassF1Score(outputs, average="macro", validate_args=False)
        case "matthews":
            return MatthewsCorrelation(outputs, validate_args=False)
        case "pearson":
            return Correlation(ranked=False)
        case "spearman":
            return Correlation(ranked=True)
    raise ValueError(f"{name} is no metric of single classes or numbers")


def weak_experts(primary_scores: Mapping[str, float], constants: Mapping[str, float]) -> str:
    """What to tell of experts that have hardly learned their task; empty where there are none.

    Scores of merged models are divided by their expert's: where that is hardly above what a constant answer scores,
    even the base may come close to 1, and where it is not above zero, the task is left out.

    Args:
        primary_scores: each expert's score in the primary metric on validation rows, by task.
        constants: what a constant answer scores there, see `pave_lightning.tasks.constants`.
    """
    weak = [
        f"{task} ({value:.3f}, always the same answer: {constants[task]:.3f})"
        for task, value in primary_scores.items()
        if not value - constants[task] >= HARDLY_LEARNED * (1 - constants[task])
    ]
    if not weak:
        return ""
    return (
        f"on validation rows the expert of {', '.join(weak)} has hardly learned its task; other models' scores are "
        "divided by it, or leave the task out where it is not above zero, so their averages say little"
    )


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _ranks(values: Tensor) -> Tensor:
    _, position, counts = torch.unique(values, return_inverse=True, return_counts=True)
    # The last rank of a value's ties minus half their spread is their mean rank.
    ranks: Tensor = counts.cumsum(0) - (counts - 1).double() / 2
    return ranks[position]
