import hashlib
import json

import numpy as np
import pytest

from pave_lightning.merging import make_method, merge
from pave_lightning.transforms import make_transform, transformed


def kept(shape, seed, task, name, rate):
    """Which elements stay, drawn by NumPy from the first counter on."""
    key = hashlib.sha256(json.dumps([seed, task, name]).encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(np.prod(shape) // 2 + 1)
    draws = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], axis=1).ravel()[: np.prod(shape)]
    return (draws / 2**32 >= rate).reshape(shape)


def test_against_numpy(source, arrays):
    found = arrays(transformed(source, [make_transform("dare", {"drop_rate": 0.25, "seed": 4})]))
    zeros = 0
    for (task, name), vector in source.arrays.items():
        mask = kept(vector.shape, 4, task, name, 0.25)
        assert found[task, name] == pytest.approx(vector * mask / 0.75, rel=1e-6)
        zeros += int((found[task, name] == 0).sum())
    assert zeros > 30


def test_it_drops_what_the_method_dare_drops(source):
    options = {"drop_rate": 0.5, "seed": 1}
    summed = merge(make_method("task_arithmetic", {}), transformed(source, [make_transform("dare", options)]))
    expected = merge(make_method("dare", options), source)
    for name, vector in expected.vectors.items():
        assert vector.equal(summed.vectors[name])
