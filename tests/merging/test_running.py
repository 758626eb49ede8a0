"""What holds for every rule."""

import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import (
    Average,
    Dare,
    DareOptions,
    DareTies,
    DareTiesOptions,
    Emr,
    TaskArithmetic,
    Ties,
    merge,
    methods,
)
from pave_lightning.merging.ties import TiesOptions

RULES = {
    "average": Average,
    "task_arithmetic": TaskArithmetic,
    "ties": lambda: Ties(TiesOptions(density=0.4)),
    "emr": Emr,
    "dare": lambda: Dare(DareOptions(drop_rate=0.5, seed=3)),
    "dare_ties": lambda: DareTies(DareTiesOptions(drop_rate=0.5, seed=3, density=0.4)),
}
# Rules with options of which they change nothing that experts agree on.
HARMLESS = {
    **RULES,
    "ties": lambda: Ties(TiesOptions(density=1.0)),
    "dare": lambda: Dare(DareOptions(drop_rate=0.0)),
    "dare_ties": lambda: DareTies(DareTiesOptions(drop_rate=0.0, density=1.0)),
}
ADDING = ("task_arithmetic", "dare")
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def task_vector(merged, task, name):
    """What a task's weights differ from the base by, before scaling."""
    if not merged.masks:
        return merged.vectors[name]
    return merged.rescalers[task] * merged.masks[task][name] * merged.vectors[name]


def test_these_are_all_rules():
    ours = {name for name, kind in methods().items() if kind.__module__.startswith("pave_lightning.")}
    assert ours == set(RULES)


@each_rule
def test_the_order_of_tasks_does_not_matter(rule, make_source, random_vectors):
    turned = {task: random_vectors[task] for task in ("three", "one", "two")}
    first, second = merge(rule(), make_source(random_vectors)), merge(rule(), make_source(turned))
    for name, vector in first.vectors.items():
        assert torch.equal(vector, second.vectors[name])
        for task in first.masks:
            assert torch.equal(first.masks[task][name], second.masks[task][name])
    assert first.rescalers == second.rescalers


@each_rule
@pytest.mark.parametrize("elements", [1, 4, 7, 12])
def test_blocks_of_rows_give_what_whole_tensors_give(rule, elements, make_source, random_vectors):
    whole = merge(rule(), make_source(random_vectors))
    parts = merge(rule(), make_source(random_vectors, elements=elements))
    for name, vector in whole.vectors.items():
        assert vector.dtype == torch.float32
        assert torch.equal(vector, parts.vectors[name])
        for task in whole.masks:
            assert torch.equal(whole.masks[task][name], parts.masks[task][name])
    assert parts.rescalers == pytest.approx(whole.rescalers, rel=1e-12)


@each_rule
def test_rules_are_fed_blocks_where_they_allow_it(rule, make_source, random_vectors, monkeypatch):
    method, sizes = rule(), []
    plain = type(method).merge

    def watched(self, parameter, base, vectors):
        sizes.append(base.numel())
        assert all(vector.shape == base.shape for vector in vectors.values())
        return plain(self, parameter, base, vectors)

    monkeypatch.setattr(type(method), "merge", watched)
    merge(method, make_source(random_vectors, elements=5))
    assert max(sizes) <= 5
    assert sum(sizes) == 7 * 5 + 11 + 3 * 2 * 2 + 1


def test_rules_that_are_not_elementwise_get_whole_tensors(make_source, random_vectors):
    shapes = []

    class Whole(Average):
        elementwise = False

        def merge(self, parameter, base, vectors):
            shapes.append(tuple(base.shape))
            return super().merge(parameter, base, vectors)

    merge(Whole(), make_source(random_vectors, elements=1))
    assert shapes == [(7, 5), (11,), (3, 2, 2), ()]


def test_what_is_merged_is_nobodys_own(make_source, random_vectors):
    class First(Average):
        def merge(self, parameter, base, vectors):
            return base

    source = make_source(random_vectors)
    for parameter in source.parameters:
        merged = merge(First(), source).vectors[parameter.name]
        merged.fill_(7)
        assert not source.base(parameter).any()


@pytest.mark.parametrize("name", RULES)
def test_identical_experts(name, make_source, random_vectors):
    same = dict.fromkeys("abc", random_vectors["one"])
    source = make_source(same)
    merged = merge(HARMLESS[name](), source)
    times = 3 if name in ADDING else 1
    for parameter in source.parameters:
        for task in source.tasks:
            expected = times * source.vector(task, parameter)
            assert torch.allclose(task_vector(merged, task, parameter.name), expected, atol=1e-6)


@each_rule
def test_experts_that_equal_the_base_give_the_base(rule, make_source, random_vectors):
    still = {task: {name: 0 * value for name, value in random_vectors["one"].items()} for task in "ab"}
    merged = merge(rule(), make_source(still, base=random_vectors["two"]))
    for name in still["a"]:
        for task in still:
            assert not task_vector(merged, task, name).any()


@each_rule
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_experts(rule, count, make_source, random_vectors):
    few = dict(list(random_vectors.items())[:count])
    with pytest.raises(PaveError, match=f"merging needs at least two experts, found {count}"):
        merge(rule(), make_source(few))


@each_rule
def test_nothing_in_common(rule, make_source):
    with pytest.raises(PaveError, match="share no floating-point tensor"):
        merge(rule(), make_source({"a": {}, "b": {}}))
