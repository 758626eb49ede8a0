import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pave_lightning.recipe.schema
from pave_lightning.tasks.metrics import (
    non_finite_rows,
    scores,
    weak_experts,
)
from pave_lightning.tasks.task import Task

CLASSIFICATION = ["accuracy", "macro_f1", "matthews"]


def task_of(classes=2, metrics=None):
    common = {"name": "t", "data": {}, "text": "text"}
    if classes is None:
        return Task.model_validate({**common, "kind": "regression", "metrics": metrics})
    metrics = metrics or CLASSIFICATION + (["f1"] if classes == 2 else [])
    return Task.model_validate({**common, "classes": classes, "metrics": metrics})


def measured(task, logits, labels, batch=7):
    metrics = task.build_metrics()
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        metrics.update(task.chosen(logits[part]), labels[part])
    return scores(metrics)


def f1_of(predicted, labels, which):
    hits = np.sum((predicted == which) & (labels == which))
    return 2 * hits / max(np.sum(predicted == which) + np.sum(labels == which), 1)


def reference(predicted, labels):
    """Straight from the definitions; Matthews as the correlation of one-hot matrices."""
    occurring = np.union1d(predicted, labels)
    hot_a, hot_b = (np.equal.outer(values, occurring) * 1.0 for values in (predicted, labels))
    a, b = hot_a - hot_a.mean(0), hot_b - hot_b.mean(0)
    spread = np.sqrt((a * a).sum() * (b * b).sum())
    return {
        "accuracy": np.mean(predicted == labels),
        "f1": f1_of(predicted, labels, 1),
        "macro_f1": np.mean([f1_of(predicted, labels, which) for which in occurring]),
        "matthews": (a * b).sum() / spread if spread else 0.0,
    }


def logits_for(classes_predicted, classes):
    return torch.nn.functional.one_hot(torch.as_tensor(classes_predicted), classes) * 3.0 - 1.0


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([2, 3, 5]), st.integers(2, 40))
def test_classification_metrics_equal_their_definitions(data, classes, rows):
    draw = st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)
    predicted, labels = np.array(data.draw(draw)), np.array(data.draw(draw))
    found = measured(task_of(classes), logits_for(predicted, classes), torch.as_tensor(labels))
    expected = reference(predicted, labels)
    assert found == {name: pytest.approx(expected[name], abs=1e-6) for name in found}
    assert set(found) == set(task_of(classes).metrics)


def test_matthews_of_two_classes_is_pearson_of_the_indices():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 2, generator=generator), torch.randint(0, 2, (200,), generator=generator)
    expected = scipy.stats.pearsonr(logits.argmax(1), labels).statistic
    assert measured(task_of(2), logits, labels)["matthews"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_scipy(ties):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randn(301, generator=generator)
    guesses = labels + torch.randn(301, generator=generator)
    if ties:
        labels, guesses = labels.round(), guesses.round()
    found = measured(task_of(None, ["pearson", "spearman"]), guesses[:, None], labels)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(guesses, labels).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(guesses, labels).statistic, abs=1e-6)


def test_pearson_survives_one_far_outlier():
    # The streaming float32 form calls this variance zero and gives up.
    labels = torch.linspace(0, 1, 20_000)
    labels[0] = 1e4
    found = measured(task_of(None, ["pearson"]), labels[:, None] * 2 + 1, labels, batch=1000)
    assert found["pearson"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
def test_constant_regression_is_zero_without_a_warning(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measured(task_of(None, ["pearson", "spearman"]), torch.full((50, 1), value), torch.arange(50.0))
    assert found == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [1, 1, 1, 1]])
def test_constant_classifier_has_matthews_zero(classes, labels):
    for constant in range(2):
        logits = logits_for([constant] * 4, classes)
        assert measured(task_of(classes, ["matthews"]), logits, torch.tensor(labels)) == {"matthews": 0.0}


def test_a_diverged_regression_is_not_hidden():
    guesses = torch.tensor([[1.0], [torch.nan], [2.0]])
    found = measured(task_of(None, ["pearson", "spearman"]), guesses, torch.arange(3.0))
    assert all(np.isnan(value) for value in found.values())


def test_metrics_are_keyed_by_name_and_forget_after_reset():
    task = task_of(None, ["spearman", "pearson"])
    metrics = task.build_metrics()
    metrics.update(torch.arange(4.0), -torch.arange(4.0))
    assert scores(metrics) == {"spearman": pytest.approx(-1), "pearson": pytest.approx(-1)}
    metrics.reset()
    metrics.update(torch.arange(4.0), torch.arange(4.0))
    assert scores(metrics) == {"spearman": pytest.approx(1), "pearson": pytest.approx(1)}


def test_half_precision_logits():
    task = task_of(None, ["pearson"])
    logits = torch.arange(8, dtype=torch.bfloat16)[:, None]
    assert measured(task, logits, torch.arange(8.0))["pearson"] == pytest.approx(1.0)
    assert task.chosen(logits).dtype == torch.float32


def test_cross_entropy_by_hand():
    logits, labels = torch.tensor([[1.0, 3.0], [0.5, -0.5]]), torch.tensor([1, 1])
    expected = np.mean([np.log(1 + np.exp(-2)), np.log(1 + np.exp(1))])
    assert task_of(2).output_loss(logits, labels).item() == pytest.approx(expected, abs=1e-6)


def test_squared_error_by_hand():
    found = task_of(None, ["pearson"]).output_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([2.0, 2.0]))
    assert found.item() == pytest.approx(2.5)


@pytest.mark.parametrize(("classes", "outputs"), [(3, 3), (None, 1)])
def test_loss_is_float32_and_has_a_gradient(classes, outputs):
    logits = torch.randn(4, outputs, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0]) if classes else torch.zeros(4)
    found = task_of(classes, None if classes else ["pearson"]).output_loss(logits, labels)
    found.backward()
    assert found.dtype == torch.float32
    assert logits.grad is not None


def random_tasks(rows=11):
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(rows, 3, generator=generator), torch.randint(0, 3, (rows,), generator=generator)
    numbers = torch.randn(rows, generator=generator)
    return [(task_of(3), logits, labels), (task_of(None, ["pearson", "spearman"]), logits[:, :1], numbers)]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("case", random_tasks(), ids=["classification", "regression"])
def test_shares_of_rows_merge_to_the_whole(case):
    task, logits, labels = case
    whole = task.build_metrics()
    for rank in range(3):
        share = task.build_metrics()
        share.update(task.chosen(logits[rank::3]), labels[rank::3])
        for name, metric in share.items():
            whole[name].merge_state(metric)
    found = {name: float(metric.compute()) for name, metric in whole.items()}
    assert found == {name: pytest.approx(value, abs=1e-6) for name, value in measured(task, logits, labels).items()}


ONE_RANK = """
import json, sys
import torch
from pave_lightning.tasks.task import Task
from pave_lightning.tasks.metrics import scores
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for number, (task, logits, labels) in enumerate(torch.load(sys.argv[1], weights_only=True)):
    task = Task.model_validate_json(task)
    # Uneven shares, then one process without any row.
    for kind, rows in {"uneven": slice(rank, None, 2), "empty": slice(0, None if rank == 0 else 0)}.items():
        metrics = task.build_metrics()
        if len(labels[rows]):
            metrics.update(task.chosen(logits[rows]), labels[rows])
        with open(f"{sys.argv[2]}/{number}-{kind}-{rank}.json", "w") as file:
            json.dump(scores(metrics), file)
# Left to the interpreter's exit, gloo's threads may abort a process whose work is done.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_same_scores_as_one(tmp_path):
    cases = random_tasks()
    torch.save([(task.model_dump_json(), *tensors) for task, *tensors in cases], tmp_path / "cases.pt")
    (tmp_path / "one_rank.py").write_text(ONE_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [tmp_path / "one_rank.py", tmp_path / "cases.pt", tmp_path]
    root = Path(pave_lightning.recipe.schema.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *map(str, arguments)], timeout=240, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    for number, case in enumerate(cases):
        expected = {name: pytest.approx(value, abs=1e-6) for name, value in measured(*case).items()}
        found = [json.loads(path.read_text()) for path in tmp_path.glob(f"{number}-*.json")]
        assert found == [expected] * 4


@pytest.mark.parametrize(("value", "told"), [(0.1, False), (0.099, True), (-0.5, True), (math.nan, True)])
def test_what_counts_as_hardly_learned(value, told):
    constants = {"good": 0.5, "words": 0.0}
    assert bool(weak_experts({"good": 0.9, "words": value}, constants)) is told
    assert "good" not in weak_experts({"good": 0.9, "words": value}, constants)


@pytest.mark.parametrize(("value", "told"), [(0.4, True), (0.5, True), (0.549, True), (0.56, False)])
def test_an_expert_is_measured_against_always_the_same_answer(value, told):
    assert bool(weak_experts({"words": value}, {"words": 0.5})) is told


def test_rows_without_finite_outputs_are_counted():
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [math.inf, math.nan], [1.0, -1e30]])
    assert int(non_finite_rows(logits)) == 2
