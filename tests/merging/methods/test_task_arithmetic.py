import numpy as np

from pave_lightning.merging import merge
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic


def test_the_sum_by_hand(make_source):
    merged = merge(TaskArithmetic(), make_source({"a": {"w": [1.0, -2.0]}, "b": {"w": [3.0, 2.0]}}))
    assert merged.vectors["w"].tolist() == [4.0, 0.0]


def test_the_sum_is_exact_and_not_scaled(make_source, random_vectors):
    merged = merge(TaskArithmetic(), make_source(random_vectors))
    for name in random_vectors["one"]:
        total = sum(vectors[name] for vectors in random_vectors.values())
        assert np.array_equal(merged.vectors[name].numpy(), total)


def test_the_default_scale_is_the_common_one():
    assert TaskArithmetic.default_scale == 0.3
