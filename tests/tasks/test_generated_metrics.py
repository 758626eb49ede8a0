"""Metrics of texts: shares that are counted by hand, torchmetrics' own, and perplexity, over batches."""

import math

import pytest
import torch
from torchmetrics.text import BLEUScore, CHRFScore, ROUGEScore, WordErrorRate

from pave_lightning.tasks.generated_metrics import build_generation_metrics
from pave_lightning.tasks.text_matches import is_contained, plain_text

WRITTEN = ["four", " Four. ", "it is twelve", "12", "", "a cat sat on the mat"]
RIGHT = [["four"], ["four"], ["twelve", "12"], ["2"], ["nothing"], ["the cat sat on the mat"]]


def scored(names, written=WRITTEN, right=RIGHT, ignore=(), size=2):
    metrics = build_generation_metrics(names, ignore)
    for start in range(0, len(written), size):
        metrics.update(written[start : start + size], right[start : start + size])
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize(
    ("ignore", "exact", "contains"),
    [((), 1 / 6, 2 / 6), (("case",), 1 / 6, 3 / 6), (("case", "punctuation"), 2 / 6, 3 / 6)],
)
def test_shares_are_those_counted_by_hand(ignore, exact, contains):
    found = scored(["exact_match", "contains"], ignore=ignore)
    assert found == pytest.approx({"exact_match": exact, "contains": contains})


def test_words_are_not_found_within_others():
    assert not is_contained("fourteen", ["four"])
    assert is_contained("(four)", ["four"])
    assert is_contained("a+b", ["a+b"])
    assert plain_text("A  b,\tc\n", ["case", "punctuation"]) == "a b c"


def test_others_are_torchmetrics_own():
    found = scored(["bleu", "chrf", "rouge_l", "word_error_rate"], size=4)
    first = [own[0] for own in RIGHT]
    assert found["bleu"] == pytest.approx(float(BLEUScore()(WRITTEN, RIGHT)))
    assert found["chrf"] == pytest.approx(float(CHRFScore()(WRITTEN, RIGHT)))
    assert found["word_error_rate"] == pytest.approx(float(WordErrorRate()(WRITTEN, first)))
    rouge = ROUGEScore(rouge_keys="rougeL", accumulate="best")(WRITTEN, RIGHT)
    assert found["rouge_l"] == pytest.approx(float(rouge["rougeL_fmeasure"]))


def test_perplexity_counts_tokens_and_only_it_is_given_losses():
    metrics = build_generation_metrics(["exact_match", "perplexity"])
    for losses in ([0.5, 1.0, 3.0], [2.0]):
        metrics.update(["a"], [["a"]], losses=torch.tensor(losses))
    found = metrics.compute()
    assert float(found["perplexity"]) == pytest.approx(math.exp(6.5 / 4))
    assert float(found["exact_match"]) == 1
