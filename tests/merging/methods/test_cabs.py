import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods.cabs import Cabs, CabsOptions


def run(source, n, m):
    return merge(Cabs(CabsOptions(n=n, m=m)), source).vectors


def reference(tensors, n, m):
    """Group by group and task by task: take the largest free element n times over (arXiv 2503.01874)."""
    flat = [np.ravel(tensor).astype(float) for tensor in tensors]
    merged = np.zeros(len(flat[0]))
    for start in range(0, len(merged), m):
        free = list(range(start, min(start + m, len(merged))))
        share = n * len(free) // m
        for vector in flat:
            for _ in range(share):
                best = max(free, key=lambda index: (abs(vector[index]), -index))
                free.remove(best)
                merged[best] = vector[best]
    return merged.reshape(np.shape(tensors[0]))


def test_by_hand(make_source):
    vectors = {"a": {"w": [5.0, 1.0, -3.0, 0.5, 0.1, -0.2]}, "b": {"w": [9.0, 2.0, -1.0, -4.0, 0.5, 0.4]}}
    # Of the first four a takes the first, b the last; of the two that are left over none has half an element to take.
    assert run(make_source(vectors), 1, 4)["w"].tolist() == [5.0, 0.0, 0.0, -4.0, 0.0, 0.0]
    # With 2 of 4 each, all are taken; of the two that are left over each takes one.
    taken = run(make_source(vectors), 2, 4)["w"].tolist()
    assert taken == pytest.approx([5.0, 2.0, -3.0, -4.0, 0.5, -0.2])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([(1, 3), (1, 4), (2, 6), (3, 10), (1, 5)]), st.sampled_from([1, 4, 100]))
def test_any_vectors_as_the_plain_reference(make_source, draw_vectors, data, shares, elements):
    shapes = {"a": (4, 5), "b": (7,), "c": (3, 2, 2), "d": (), "e": (2, 6)}
    vectors = draw_vectors(data, shapes, tasks=data.draw(st.integers(2, 3)), parts=4)
    found = run(make_source(vectors, elements=elements), *shares)
    for name in shapes:
        assert np.array_equal(found[name].numpy(), reference([named[name] for named in vectors.values()], *shares))


def test_no_two_tasks_change_the_same_weight_and_each_has_its_share(make_source):
    random = np.random.default_rng(0)
    # The sign and the size of a weight tell whose it is.
    vectors = {task: {"w": scale + random.uniform(size=(8, 12))} for task, scale in (("a", 10), ("b", -30), ("c", 50))}
    merged = run(make_source(vectors), 2, 8)["w"].view(-1, 8)
    for low, high in ((10, 11), (-30, -29), (50, 51)):
        assert ((merged >= low) & (merged <= high)).sum(dim=1).tolist() == [2] * 12


def test_zeros_of_an_earlier_task_take_no_more_than_its_share(make_source):
    vectors = {"idle": {"w": [0.0] * 4}, "b": {"w": [4.0, 3.0, 2.0, 1.0]}}
    assert run(make_source(vectors), 1, 4)["w"].tolist() == [0.0, 3.0, 0.0, 0.0]


def test_of_many_elements_that_tie_the_first_ones_are_taken(make_source):
    vectors = {task: {"w": scale * np.tile([1.0, -1.0], 100)} for task, scale in (("a", 1.0), ("b", 3.0))}
    found = run(make_source(vectors), 50, 200)["w"].abs()
    assert found.tolist() == [1.0] * 50 + [3.0] * 50 + [0.0] * 100


def test_earlier_tasks_choose_first(make_source):
    vectors = {"a": {"w": [2.0, 1.0, 0.0]}, "b": {"w": [3.0, 0.5, 0.0]}}
    turned = dict(reversed(vectors.items()))
    assert run(make_source(vectors), 1, 3)["w"].tolist() == [2.0, 0.5, 0.0]
    assert run(make_source(turned), 1, 3)["w"].tolist() == [3.0, 1.0, 0.0]
    assert Cabs.ordered


def test_blocks_only_where_no_group_is_cut(make_source):
    source = make_source(
        {task: {"a": np.ones((3, 8)), "b": np.ones(8), "c": np.ones((2, 6)), "d": 1.0} for task in "xy"}
    )
    method = Cabs(CabsOptions(n=1, m=4))
    assert {parameter.name: method.in_blocks(parameter) for parameter in source.parameters} == {
        "a": True,
        "b": False,
        "c": False,
        "d": False,
    }


def test_groups_too_small_for_all_tasks_are_refused(make_source, random_vectors):
    with pytest.raises(PaveError, match=r"3 tasks cannot each keep 2 elements of a group of 5.*at most 1 .*at least 6"):
        run(make_source(random_vectors), 2, 5)
    with pytest.raises(
        PaveError, match=r"3 tasks cannot each keep 1 elements of a group of 2.*; set options.m to at le"
    ):
        run(make_source(random_vectors), 1, 2)


@pytest.mark.parametrize("options", [{"n": 0}, {"m": 1}, {"n": 1.5}])
def test_impossible_counts_are_refused(options):
    with pytest.raises(ValidationError):
        CabsOptions(**options)


def test_defaults():
    assert (CabsOptions().n, CabsOptions().m, Cabs.default_scale) == (3, 32, 0.7)
