import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pave_lightning.tasks.constants import constant_scores
from pave_lightning.tasks.metrics import scores
from pave_lightning.tasks.task import Task


def test_what_always_the_same_answer_scores():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    task = make_constant_task(["accuracy", "macro_f1", "matthews"], classes=["a", "b", "c"])
    # Always class 0: 6 of 10 right; its F1 is 12 / 16, those of the others 0.
    assert constant_scores(task, labels) == pytest.approx({"accuracy": 0.6, "macro_f1": 0.25, "matthews": 0})
    two = make_constant_task(["f1", "accuracy"], classes=["no", "yes"])
    # Always class 1, though it is the smaller one: 3 right, 7 wrong, F1 = 6 / 13.
    assert constant_scores(two, torch.tensor([0] * 7 + [1] * 3)) == pytest.approx({"f1": 6 / 13, "accuracy": 0.7})
    number = make_constant_task(["pearson", "spearman"], kind="regression")
    assert constant_scores(number, torch.tensor([0.1, 0.7, 3.0])) == {"pearson": 0, "spearman": 0}


def test_where_nothing_is_scored_there_is_no_score():
    task = make_constant_task(["accuracy", "macro_f1", "matthews"], classes=["a", "b", "c"])
    found = constant_scores(task, torch.tensor([], dtype=torch.long))
    assert list(found) == ["accuracy", "macro_f1", "matthews"]
    assert all(math.isnan(value) for value in found.values())


def make_constant_task(metrics, **head):
    data = dict.fromkeys(("train", "validation", "test"), "rows.csv")
    return Task.model_validate({"name": "words", "data": data, "text": "text", "metrics": metrics, **head})


@given(st.lists(st.integers(0, 1), min_size=1, max_size=30))
def test_no_constant_answer_scores_more_by_the_metrics_themselves(labels):
    task = make_constant_task(["accuracy", "f1", "macro_f1", "matthews"], classes=["no", "yes"])
    found = []
    for answer in (0, 1):
        metrics = task.build_metrics()
        metrics.update(torch.full((len(labels),), answer), torch.tensor(labels))
        found.append(scores(metrics))
    best = {name: max(one[name] for one in found) for name in task.metrics}
    assert constant_scores(task, torch.tensor(labels)) == pytest.approx(best, abs=1e-6)
