"""Metrics of generated texts, and of the likelihood of the right ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection, text

from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.text_matches import TESTS, plain_text
from pave_lightning.tasks.text_metrics import SquadScore


class Share(Metric):
    """The share of texts that pass a test.

    Args:
        test: a text and the right ones -> whether it passes.
        ignore: see `plain_text`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    passed: Tensor
    seen: Tensor

    def __init__(self, test: Callable[[str, Sequence[str]], bool], ignore: Collection[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.test, self.ignore = test, tuple(ignore)
        self.add_state("passed", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("seen", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Take in n texts, and for each the right ones."""
        for written, right in zip(predictions, targets, strict=True):
            plain = [plain_text(one, self.ignore) for one in right]
            self.passed += self.test(plain_text(written, self.ignore), plain)
        self.seen += len(predictions)

    def compute(self) -> Tensor:
        """The share of everything seen: a float32 scalar."""
        return self.passed.float() / self.seen


class ResponsePerplexity(Metric):
    """The exponential of the mean negative log-likelihood of the tokens of the right responses."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    losses: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("losses", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Any, targets: Any, *, losses: Tensor) -> None:
        """Take in the losses of all tokens of some responses, shape ``(tokens,)``."""
        self.losses += losses.double().sum()
        self.tokens += len(losses)

    def compute(self) -> Tensor:
        """The perplexity of everything seen: a float32 scalar."""
        return (self.losses / self.tokens).exp().float()


class WordErrorRate(text.WordErrorRate):
    """Share of words that are to be changed to get the first right text."""

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Take in n texts, and for each the right ones."""
        super().update(list(predictions), [right[0] for right in targets])


class CharErrorRate(text.CharErrorRate):
    """Share of characters that are to be changed to get the first right text."""

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Take in n texts, and for each the right ones."""
        super().update(list(predictions), [right[0] for right in targets])


class EditDistance(text.EditDistance):
    """Mean number of characters that are to be changed to get the first right text."""

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Take in n texts, and for each the right ones."""
        super().update(list(predictions), [right[0] for right in targets])


class Rouge(text.ROUGEScore):
    """The F1 of one kind of ROUGE; of several right texts the best counts.

    Args:
        key: ``rouge1``, ``rouge2`` or ``rougeL``.
    """

    def __init__(self, key: str, **kwargs: Any) -> None:
        super().__init__(rouge_keys=key, accumulate="best", **kwargs)
        self.key = key

    def compute(self) -> Tensor:  # type: ignore[override]
        """The mean over everything seen: a float32 scalar."""
        return super().compute()[f"{self.key}_fmeasure"]


_FURTHER: dict[str, Callable[[], Metric]] = {
    "token_f1": lambda: SquadScore("f1"),
    "perplexity": ResponsePerplexity,
    "bleu": text.BLEUScore,
    "chrf": text.CHRFScore,
    "rouge_1": lambda: Rouge("rouge1"),
    "rouge_2": lambda: Rouge("rouge2"),
    "rouge_l": lambda: Rouge("rougeL"),
    "word_error_rate": WordErrorRate,
    "character_error_rate": CharErrorRate,
    "edit_distance": EditDistance,
}


def build_generation_metrics(names: Sequence[MetricName], ignore: Collection[str] = ()) -> MetricCollection:
    """Metrics of generated texts, keyed by their names in the recipe.

    ``exact_match`` is the share of texts that are a right one but for blanks; ``contains`` that of texts in which a
    right one stands as whole words; ``token_f1`` is that of SQuAD; ``perplexity`` that of the right responses; all
    others are torchmetrics' own. Feed them with n texts, for each the right ones, and ``losses``: those of all tokens
    of the right responses, where ``perplexity`` is asked for.

    Args:
        names: the metrics.
        ignore: what makes no difference to ``exact_match`` and ``contains``, see `plain_text`.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        name: Share(TESTS[name], ignore) if name in TESTS else _FURTHER[name]() for name in names
    }
    return MetricCollection(metrics, compute_groups=False)
