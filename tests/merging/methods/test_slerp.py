import math

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import make_method, merge
from pave_lightning.merging.methods.slerp import Slerp, SlerpOptions


def run(source, t=0.5):
    return merge(Slerp(SlerpOptions(t=t)), source).vectors


def rotated(first, second, t):
    """The first vector turned towards the second in their plane, for vectors of one length, by Gram-Schmidt."""
    length = np.linalg.norm(first)
    along = first / length
    across = second - (second @ along) * along
    across /= np.linalg.norm(across)
    angle = math.acos(float(np.clip(second @ along / np.linalg.norm(second), -1, 1)))
    return length * (math.cos(t * angle) * along + math.sin(t * angle) * across)


def test_by_hand_between_two_axes(make_source):
    source = make_source({"a": {"w": [2.0, 0.0]}, "b": {"w": [0.0, 4.0]}})
    half = math.sqrt(0.5)
    assert run(source)["w"].tolist() == pytest.approx([2 * half, 4 * half])
    third = run(source, t=1 / 3)["w"].tolist()
    assert third == pytest.approx([2 * math.sin(math.pi / 3), 4 * math.sin(math.pi / 6)])


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_weights_of_one_length_turn_in_their_plane(t, make_source):
    random = np.random.default_rng(1)
    first, second = random.normal(size=12), random.normal(size=12)
    second *= np.linalg.norm(first) / np.linalg.norm(second)
    base = random.normal(size=12)
    vectors = {"a": {"w": (first - base).reshape(3, 4)}, "b": {"w": (second - base).reshape(3, 4)}}
    merged = run(make_source(vectors, base={"w": base.reshape(3, 4)}), t)["w"].double().numpy().ravel()
    assert base + merged == pytest.approx(rotated(first, second, t), abs=1e-5)


def test_it_turns_weights_and_not_task_vectors(make_source):
    vectors = {"a": {"w": [1.0, 0.0]}, "b": {"w": [0.0, 1.0]}}
    far = run(make_source(vectors, base={"w": [1000.0, 1000.0]}))["w"]
    assert far.tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert run(make_source(vectors))["w"].tolist() == pytest.approx([math.sqrt(0.5)] * 2)


@pytest.mark.parametrize("t", [0.1, 0.5])
@pytest.mark.parametrize("second", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]], ids=["parallel", "opposed", "zero"])
def test_without_an_angle_it_goes_straight(t, second, make_source):
    merged = run(make_source({"a": {"w": [1.0, 2.0]}, "b": {"w": second}}), t)["w"].tolist()
    assert merged == pytest.approx([(1 - t) * 1 + t * second[0], (1 - t) * 2 + t * second[1]])


def test_just_within_the_limit_and_just_beyond(make_source):
    def merged(angle):
        second = [3 * math.cos(angle), 3 * math.sin(angle)]
        return run(make_source({"a": {"w": [1.0, 0.0]}, "b": {"w": second}}))["w"].tolist(), second

    found, second = merged(math.acos(0.9996))
    assert found == pytest.approx([0.5 + second[0] / 2, second[1] / 2], rel=1e-6)
    angle = math.acos(0.9990)
    found, second = merged(angle)
    factor = math.sin(angle / 2) / math.sin(angle)
    assert found == pytest.approx([factor * (1 + second[0]), factor * second[1]], rel=1e-6)


def test_each_tensor_has_its_own_angle(make_source):
    vectors = {"a": {"p": [1.0, 0.0], "q": [[1.0, 1.0]]}, "b": {"p": [0.0, 1.0], "q": [[2.0, 2.0]]}}
    merged = run(make_source(vectors, elements=1))
    assert merged["p"].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert merged["q"].tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.7])
def test_experts_that_equal_the_base_give_exactly_the_base(t, make_source, random_vectors):
    still = {task: {name: 0 * value for name, value in random_vectors["one"].items()} for task in ("x", "y")}
    merged = run(make_source(still, base=random_vectors["two"]), t)
    assert not any(vector.any() for vector in merged.values())


def test_both_ends_and_the_order_of_tasks(make_source, random_vectors):
    two = {task: random_vectors[task] for task in ("one", "two")}
    source, turned = make_source(two), make_source(dict(reversed(two.items())))
    for name in random_vectors["one"]:
        assert np.allclose(run(source, 0.0)[name].numpy(), random_vectors["one"][name], atol=1e-6)
        assert np.allclose(run(source, 1.0)[name].numpy(), random_vectors["two"][name], atol=1e-6)
        assert torch.allclose(run(source, 0.3)[name], run(turned, 0.7)[name], atol=1e-6)
    assert not torch.allclose(run(source, 0.3)["a"], run(turned, 0.3)["a"])
    assert Slerp.ordered


def test_more_than_two_experts_are_refused(make_source, random_vectors):
    with pytest.raises(PaveError, match="slerp goes between exactly two experts, found 3: one, two, three"):
        run(make_source(random_vectors))


def test_options():
    assert SlerpOptions().t == 0.5
    assert Slerp.default_scale is None
    with pytest.raises(PaveError, match=r"t: .*less than or equal to 1"):
        make_method("slerp", {"t": 1.5})
