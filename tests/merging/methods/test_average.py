import numpy as np
import pytest

from pave_lightning.merging import merge
from pave_lightning.merging.methods.average import Average


def test_the_mean_by_hand(make_source):
    merged = merge(Average(), make_source({"a": {"w": [[1.0, -2.0]]}, "b": {"w": [[3.0, 2.0]]}, "c": {"w": [[5, 3]]}}))
    assert merged.vectors["w"].tolist() == [[3.0, 1.0]]
    assert merged.masks == {}
    assert merged.rescalers == {}


def test_base_plus_merged_is_the_mean_of_the_experts(make_source, random_vectors):
    base = {name: np.full(np.shape(value), 0.5) for name, value in random_vectors["one"].items()}
    merged = merge(Average(), make_source(random_vectors, base))
    for name, start in base.items():
        mean = np.mean([start + vectors[name] for vectors in random_vectors.values()], axis=0)
        assert (start + merged.vectors[name].numpy()) == pytest.approx(mean, abs=1e-6)


def test_it_has_no_scale():
    assert Average.default_scale is None
