"""Metrics of draws against torchmetrics' and scipy's own, on the rows that were drawn, one draw after the other."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from pave_lightning.reporting.resampled_metrics import ResampledTask, row_counts
from pave_lightning.tasks.metrics import build_metrics, scores
from pave_lightning.tasks.predictions import TaskPredictions, as_objects

ROWS, DRAWS = 30, 25


def of_rows(predictions, targets, rows=None):
    rows = np.arange(len(targets)) if rows is None else np.asarray(rows)
    return TaskPredictions.ordered(rows, np.asarray(predictions), np.asarray(targets))


def drawn_again(found, indices):
    """The predictions and targets of each draw, row after row."""
    for draw in indices:
        places = [place for row in draw for place in np.flatnonzero(found.rows == row)]
        yield found.predictions[places], found.targets[places]


def f1(predicted, targets, label):
    right = sum((p == label) and (t == label) for p, t in zip(predicted, targets, strict=True))
    both = sum(p == label for p in predicted) + sum(t == label for t in targets)
    return 2 * right / both if both else 0.0


def matthews(predicted, targets):
    """The correlation of indicator vectors, summed over classes (Gorodkin 2004)."""
    labels = sorted({*predicted, *targets})
    one, other = (
        np.array([[v == label for label in labels] for v in values], float) for values in (predicted, targets)
    )
    one, other = one - one.mean(0), other - other.mean(0)
    spread = (one**2).sum() * (other**2).sum()
    return (one * other).sum() / np.sqrt(spread) if spread > 0 else 0.0


def naive(metric, predicted, targets):
    match metric:
        case "accuracy":
            return np.mean([p == t for p, t in zip(predicted, targets, strict=True)])
        case "f1":
            return f1(predicted, targets, 1)
        case "macro_f1":
            return np.mean([f1(predicted, targets, label) for label in {*predicted, *targets}])
        case "matthews":
            return matthews(predicted, targets)
        case _:
            if len(set(predicted)) == 1 or len(set(targets)) == 1:
                return 0.0
            return (pearsonr if metric == "pearson" else spearmanr)(predicted, targets).statistic


@pytest.fixture
def indices():
    drawn = np.random.default_rng(1).integers(ROWS, size=(DRAWS, ROWS))
    drawn[0] = np.arange(ROWS)
    drawn[1] = 4  # one row alone, of which no correlation is defined
    return drawn


def several_words(random, classes):
    """Up to four predictions a row, some rows with none."""
    rows = np.repeat(np.arange(ROWS), random.integers(0, 5, ROWS))
    return [of_rows(random.integers(classes, size=len(rows)), np.arange(len(rows)) % classes, rows) for _ in range(3)]


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("words", [False, True])
def test_classes_are_those_of_a_plain_loop(classes, words, indices):
    random = np.random.default_rng(classes)
    targets = random.integers(classes, size=ROWS)
    found = [of_rows(random.integers(classes, size=ROWS), targets) for _ in range(3)]
    if words:
        found = several_words(random, classes)
        indices[1] = found[0].rows[0]
    metrics = ["accuracy", "f1", "macro_f1", "matthews"]
    values = ResampledTask(found, ROWS, metrics).values(indices)
    assert values.shape == (3, 4, DRAWS)
    for model, one in enumerate(found):
        for place, metric in enumerate(metrics):
            expected = [naive(metric, *drawn) for drawn in drawn_again(one, indices)]
            np.testing.assert_allclose(values[model, place], expected, rtol=0, atol=1e-12, err_msg=metric)


@pytest.mark.parametrize("kind", ["distinct", "tied", "constant", "far from zero"])
def test_correlations_are_those_of_a_plain_loop(kind, indices):
    random = np.random.default_rng(3)
    targets = random.normal(size=ROWS).round(1)
    predictions = {
        "distinct": random.normal(size=ROWS) + targets,
        "tied": (random.normal(size=ROWS) + targets).round(),
        "constant": np.full(ROWS, 0.3),
        "far from zero": 1e6 + targets + random.normal(size=ROWS),
    }[kind]
    found = [of_rows(predictions, targets), of_rows(targets, targets)]
    values = ResampledTask(found, ROWS, ["spearman", "pearson"]).values(indices)
    for model, one in enumerate(found):
        for place, metric in enumerate(["spearman", "pearson"]):
            expected = [naive(metric, *drawn) for drawn in drawn_again(one, indices)]
            atol = 1e-9 if kind == "far from zero" else 1e-12  # scipy itself subtracts means of 1e6
            np.testing.assert_allclose(values[model, place], expected, rtol=0, atol=atol, err_msg=metric)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"])
def test_all_rows_once_give_the_score_itself(metric):
    random = np.random.default_rng(5)
    if metric in ("pearson", "spearman"):
        predictions, targets = random.normal(size=(2, ROWS)).astype(np.float32)
        outputs = 1
    else:
        outputs = 2 if metric == "f1" else 4
        predictions, targets = random.integers(outputs, size=(2, ROWS))
    collection = build_metrics([metric], outputs)
    collection.update(torch.from_numpy(predictions), torch.from_numpy(targets))
    wide = np.float64 if outputs == 1 else np.int64
    task = ResampledTask([of_rows(predictions.astype(wide), targets.astype(wide))], ROWS, [metric])
    assert task.values(np.arange(ROWS)[None])[0, 0, 0] == pytest.approx(scores(collection)[metric], abs=1e-6)


def test_texts_are_those_of_a_plain_loop(indices):
    random = np.random.default_rng(0)
    right = as_objects([("yes",) if row % 2 else ("no", "not") for row in range(ROWS)])
    models = [as_objects([["yes", "no", "it is not", ""][place] for place in random.integers(4, size=ROWS)])] * 2
    models = [of_rows(one, right) for one in models]
    found = ResampledTask(models, ROWS, ["exact_match", "accuracy", "contains"]).values(indices)
    for model, one in enumerate(models):
        for draw, (texts, targets) in enumerate(drawn_again(one, indices)):
            exact = np.mean([text in own for text, own in zip(texts, targets, strict=True)])
            within = np.mean([bool(set(text.split()) & set(own)) for text, own in zip(texts, targets, strict=True)])
            assert found[model, :, draw] == pytest.approx([exact, np.nan, within], nan_ok=True)


def test_what_does_not_fit_or_is_not_finite_has_no_value(indices):
    targets = np.linspace(0, 1, ROWS)
    broken = targets.copy()
    broken[3] = np.nan
    values = ResampledTask(
        [of_rows(broken, targets), of_rows(targets, targets)], ROWS, ["accuracy", "pearson", "spearman"]
    ).values(indices[2:])
    assert np.isnan(values[0]).all()
    assert np.isnan(values[1, 0]).all()
    np.testing.assert_allclose(values[1, 1:], 1)
    classes = ResampledTask([of_rows([0, 1], [0, 1])], 2, ["pearson", "mine"]).values(np.zeros((1, 2), dtype=int))
    assert np.isnan(classes).all()


def test_draws_without_any_prediction_have_no_value():
    values = ResampledTask([of_rows([1, 0], [1, 0], [2, 2])], 4, ["accuracy", "f1", "macro_f1", "matthews"])
    found = values.values(np.array([[0, 1, 3, 3], [2, 2, 0, 0]]))
    assert np.isnan(found[0, [0, 2, 3], 0]).all()
    np.testing.assert_array_equal(found[0, :, 1], [1, 1, 1, 1])


def test_counts_of_rows():
    counts = row_counts(np.array([[0, 0, 2], [1, 1, 1]]), 3)
    np.testing.assert_array_equal(counts, [[2, 0], [0, 3], [1, 0]])
