"""Metrics of texts that are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.text import squad
from torchmetrics.text import SQuAD

from pave_lightning.tasks.options import MetricName


class SquadScore(SQuAD):
    """One of the two scores of SQuAD, from 0 to 1.

    Texts are compared without case, punctuation, articles and repeated blanks; of several right answers the best one
    counts.

    Args:
        part: ``exact_match``, or ``f1``, which is that of the words of prediction and answer, the mean over rows.
    """

    higher_is_better = True

    def __init__(self, part: Literal["exact_match", "f1"], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.part = part

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:  # type: ignore[override]
        """Take in a batch.

        Args:
            predictions: n texts; an empty one for no answer.
            targets: for each the right answers; an empty text alone where there is none.
        """
        super().update(*_as_squad(predictions, targets))

    def compute(self) -> Tensor:  # type: ignore[override]
        """The score of everything seen: a float32 scalar."""
        return super().compute()[self.part] / 100


def build_squad_metrics(names: Sequence[MetricName]) -> MetricCollection:
    """The scores of SQuAD, keyed by their names in the recipe: ``exact_match`` and ``token_f1``; see `SquadScore`."""
    metrics: dict[str, Metric | MetricCollection] = {
        name: SquadScore("f1" if name == "token_f1" else "exact_match") for name in names
    }
    return MetricCollection(metrics, compute_groups=False)


def squad_scores(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> list[dict[MetricName, float]]:
    """``exact_match`` and ``token_f1`` of each prediction by itself, from 0 to 1; see `SquadScore`."""
    found: list[dict[MetricName, float]] = []
    for said, right in zip(predictions, targets, strict=True):
        scored = squad(*_as_squad([said], [right]))
        found.append({"exact_match": float(scored["exact_match"]) / 100, "token_f1": float(scored["f1"]) / 100})
    return found


def _as_squad(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> tuple[Any, Any]:
    """Predictions and right answers as torchmetrics takes them."""
    said = [{"prediction_text": text, "id": str(row)} for row, text in enumerate(predictions)]
    right = [
        {"answers": {"answer_start": [0] * len(texts), "text": list(texts)}, "id": str(row)}
        for row, texts in enumerate(targets)
    ]
    return said, right
