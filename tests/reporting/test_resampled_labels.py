"""Metrics of several labels a row, for rows that are drawn again and again: those of scikit-learn with weights."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from pave_lightning.reporting.resampled_labels import label_metric
from pave_lightning.reporting.resampled_metrics import ResampledTask
from pave_lightning.tasks.predictions import TaskPredictions

ROWS, LABELS, DRAWS = 30, 4, 5


@pytest.fixture
def drawn():
    draw = np.random.default_rng(0)
    probabilities = draw.integers(0, 8, (ROWS, LABELS)) / 8 + 0.01  # many that are the same
    actual = draw.random((ROWS, LABELS)) < [0.2, 0.5, 0.8, 0.0]
    probabilities[:, 3] /= 4
    return probabilities, actual, draw.integers(0, ROWS, (DRAWS, ROWS))


def expected(name, probabilities, actual, rows):
    """By repeating the rows that were drawn, over the labels that occur."""
    probabilities, actual = probabilities[rows], actual[rows]
    predicted = probabilities > 0.5
    match name:
        case "exact_match":
            return accuracy_score(actual, predicted)
        case "micro_f1":
            return f1_score(actual, predicted, average="micro")
        case "macro_f1":
            there = (actual | predicted).any(axis=0)
            return f1_score(actual[:, there], predicted[:, there], average="macro")
    there = actual.any(axis=0)
    return average_precision_score(actual[:, there], probabilities[:, there])


@pytest.mark.parametrize("name", ["exact_match", "micro_f1", "macro_f1", "mean_average_precision"])
def test_drawn_rows_score_as_if_they_were_repeated(drawn, name):
    probabilities, actual, indices = drawn
    weights = np.stack([np.bincount(rows, minlength=ROWS) for rows in indices], axis=1).astype(float)
    found = label_metric(name, probabilities, actual, weights)
    assert found == pytest.approx([expected(name, probabilities, actual, rows) for rows in indices])
    kept = TaskPredictions.ordered(
        np.repeat(np.arange(ROWS), LABELS), probabilities.ravel(), actual.ravel().astype(float)
    )
    assert ResampledTask([kept, kept], ROWS, [name]).values(indices)[1, 0] == pytest.approx(found)


def test_nothing_that_was_drawn_has_no_score():
    for name in ("exact_match", "micro_f1", "macro_f1", "mean_average_precision"):
        with np.errstate(invalid="ignore"):
            found = label_metric(name, np.ones((2, 2)), np.ones((2, 2), dtype=bool), np.array([[0.0, 1], [0, 1]]))
        assert np.isnan(found[0])
        assert found[1] == 1
    with pytest.raises(ValueError, match="no metric of several labels"):
        label_metric("accuracy", np.ones((2, 2)), np.ones((2, 2), dtype=bool), np.ones((2, 1)))


def test_means_of_what_single_rows_score():
    rows = np.repeat([0, 2], 2)
    kept = TaskPredictions.ordered(rows, np.array([1.0, 0.0, 0.5, 1.0]), np.ones(4), means=("token_f1", "exact_match"))
    values = ResampledTask([kept], 3, ["exact_match", "token_f1", "accuracy"]).values(np.array([[0, 1, 2], [2, 2, 1]]))
    assert values[0, :2].tolist() == [[0.5, 1.0], [0.75, 0.5]]
    assert np.isnan(values[0, 2]).all()
