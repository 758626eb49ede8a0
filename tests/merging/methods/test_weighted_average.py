import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import make_method, merge
from pave_lightning.merging.methods.average import Average
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.methods.weighted_average import WeightedAverage, WeightedAverageOptions

VECTORS = {"a": {"w": [[1.0, -2.0]]}, "b": {"w": [[3.0, 2.0]]}, "c": {"w": [[5.0, 3.0]]}}


def run(source, **options):
    return merge(WeightedAverage(WeightedAverageOptions(**options)), source).vectors


def test_by_hand(make_source):
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    assert run(make_source(VECTORS), weights=weights)["w"].tolist() == [[3.0, 1.25]]
    assert run(make_source(VECTORS), weights=weights, normalise=False)["w"].tolist() == [[12.0, 5.0]]


def test_a_negative_weight_takes_a_task_away(make_source):
    merged = run(make_source(VECTORS), weights={"c": -1.0, "a": 1.0, "b": 0.0}, normalise=False)
    assert merged["w"].tolist() == [[-4.0, -5.0]]


def test_without_weights_it_is_the_average_or_task_arithmetic(make_source, random_vectors):
    source = make_source(random_vectors)
    for method, normalise in ((Average(), True), (TaskArithmetic(), False)):
        expected, found = merge(method, source).vectors, run(source, normalise=normalise)
        assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)


def test_only_the_ratio_of_the_weights_matters_where_they_are_normalised(make_source, random_vectors):
    source = make_source(random_vectors)
    first = run(source, weights={"one": 0.2, "two": 0.3, "three": 0.5})
    second = run(source, weights={"three": 5.0, "two": 3.0, "one": 2.0})
    expected = {
        name: sum(share * random_vectors[task][name] for task, share in (("one", 0.2), ("two", 0.3), ("three", 0.5)))
        for name in first
    }
    for name, vector in first.items():
        assert torch.allclose(vector, second[name], atol=1e-6)
        assert np.allclose(vector.numpy(), expected[name], atol=1e-6)


def test_wrong_and_missing_names_are_told_at_once(make_source):
    with pytest.raises(PaveError) as caught:
        run(make_source(VECTORS), weights={"a": 1.0, "bb": 1.0})
    told = str(caught.value)
    assert "options.weights names the unknown task 'bb': did you mean 'b'?" in told
    assert "options.weights must name every task; missing: b, c" in told


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": -1.0}, {"a": 0.1, "b": 0.2, "c": -0.3}, {"a": 0.0, "b": 0.0}])
def test_weights_that_cancel_cannot_be_normalised(weights):
    with pytest.raises(PaveError, match=r"weights: .*the weights add up to zero, so they cannot be normalised"):
        make_method("weighted_average", {"weights": weights})
    assert make_method("weighted_average", {"weights": weights, "normalise": False}).options.weights == weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much"])
def test_weights_are_finite_numbers(value):
    with pytest.raises(PaveError, match=r"weights\.a"):
        make_method("weighted_average", {"weights": {"a": value, "b": 1.0}})


def test_it_has_no_scale():
    assert WeightedAverage.default_scale is None
