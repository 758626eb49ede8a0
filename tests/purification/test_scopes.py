"""How the scopes share out ranks, against loops in plain Python over spectra by NumPy."""

from itertools import permutations

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.purification import PurifiedTaskVectors
from pave_lightning.purification.options import Compute, Purify
from pave_lightning.purification.vectors import layers_at_once

DAMPING = 0.1
SCOPES = ["layer", "model", "global"]
LAYERS = ("block.wide", "block.tall", "end.square", "end.flipped")


@pytest.fixture(scope="module")
def spectra(source, statistics, seen_through):
    """(task, layer) -> left singular vectors and values."""
    return {
        (task, layer): seen_through(weight, statistics[task], layer)
        for layer in LAYERS
        for task, weight in source.matrices(layer)[1].items()
    }


def greedy(values, rho, share=1.5):
    """Take away the weakest last component of all, one after the other, none from those that lost all they may."""
    ranks = {key: len(found) for key, found in values.items()}
    floors = {key: max(1, d - round(share * (d - round(rho * d)))) for key, d in ranks.items()}
    wanted = round(rho * sum(ranks.values()))
    while sum(ranks.values()) > wanted:
        candidates = [key for key in ranks if ranks[key] > floors[key]]
        if not candidates:
            break
        weakest = min(candidates, key=lambda key: values[key][ranks[key] - 1] / values[key][0])
        ranks[weakest] -= 1
    return ranks


def greedy_by_layer(spectra, rho):
    ranks = {}
    for layer in LAYERS:
        ranks.update(greedy({key: values for key, (_, values) in spectra.items() if key[1] == layer}, rho))
    return ranks


def averaged(spectra, ranks):
    full = {key: len(spectra[key][1]) for key in ranks}
    share = {
        task: sum(rank for key, rank in ranks.items() if key[0] == task)
        / sum(n for key, n in full.items() if key[0] == task)
        for task in {key[0] for key in ranks}
    }
    return {key: max(1, round(share[key[0]] * full[key])) for key in ranks}


def read_all(vectors):
    """Compute everything; returns the ranks."""
    for parameter in vectors.layers:
        for task in vectors.tasks:
            vectors.expert(task, parameter)
    return {key: kept.rank for key, kept in vectors.ranks.items()}


def check_weights(source, vectors, spectra, ranks, upright):
    for (task, layer), (directions, _) in spectra.items():
        kept = directions[:, : ranks[task, layer]]
        expected = kept @ kept.T @ source.matrices(layer)[1][task]
        assert upright(vectors, task, source.named(layer)) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("rho", [0.6, 0.75, 0.9])
def test_scope_model_averages_the_ranks_of_all_layers_to_one_share_for_each_task(
    source, statistics, spectra, upright, rho
):
    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=rho, damping=DAMPING, scope="model"))
    by_layer = greedy_by_layer(spectra, rho)
    expected = averaged(spectra, by_layer)
    assert expected != by_layer
    assert read_all(vectors) == expected
    check_weights(source, vectors, spectra, expected, upright)


@pytest.mark.parametrize("share", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("rho", [0.6, 0.75, 0.9])
def test_scope_global_is_one_greedy_search_over_all_layers_and_tasks(source, statistics, spectra, upright, rho, share):
    options = Purify(rho=rho, damping=DAMPING, scope="global", stopping_share=share)
    vectors = PurifiedTaskVectors(source, statistics, options)
    expected = greedy({key: values for key, (_, values) in spectra.items()}, rho, share)
    assert read_all(vectors) == expected
    if share > 1:
        assert sum(expected.values()) == round(rho * 3 * (6 + 7 + 9 + 5))
        assert expected != greedy_by_layer(spectra, rho)
    check_weights(source, vectors, spectra, expected, upright)


def test_scope_layer_is_one_greedy_search_for_each_layer(source, statistics, spectra, upright):
    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.7, damping=DAMPING))
    expected = greedy_by_layer(spectra, 0.7)
    assert len(set(expected.values())) > 4
    assert read_all(vectors) == expected
    check_weights(source, vectors, spectra, expected, upright)


def test_even_allocation_keeps_the_same_share_in_every_scope(source, statistics):
    full = {"block.wide": 6, "block.tall": 7, "end.square": 9, "end.flipped": 5}
    even = {layer: round(0.7 * d) for layer, d in full.items()}
    mean = sum(even[layer] / full[layer] for layer in full) / 4
    for scope in SCOPES:
        options = Purify(rho=0.7, damping=DAMPING, scope=scope, allocation="even")
        share = {layer: round(mean * d) for layer, d in full.items()} if scope == "model" else even
        ranks = read_all(PurifiedTaskVectors(source, statistics, options))
        assert ranks == {(task, layer): share[layer] for task in "abc" for layer in full}


@pytest.mark.parametrize("allocation", ["spectral", "even"])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_keeps_one_direction_at_least(make_source, capture, scope, allocation):
    source = make_source(layers={"narrow": ((2, 4), 1), **{f"w{n}": ((20, 20), 1) for n in range(4)}})
    options = Purify(rho=0.06, scope=scope, allocation=allocation, nearest_budget=True)
    ranks = read_all(PurifiedTaskVectors(source, capture(source), options))
    assert {rank for (_, layer), rank in ranks.items() if layer == "narrow"} == {1}
    assert min(ranks.values()) == 1


@pytest.mark.parametrize("allocation", ["spectral", "even"])
@pytest.mark.parametrize("target", ["expert", "delta", "delta_by_expert"])
@pytest.mark.parametrize("scope", SCOPES)
def test_keeping_everything_changes_no_bit(source, statistics, same_everywhere, scope, target, allocation):
    vectors = PurifiedTaskVectors(
        source, statistics, Purify(rho=1.0, scope=scope, target=target, allocation=allocation)
    )
    same_everywhere(vectors, source)
    assert all(kept.rank == kept.full for kept in vectors.ranks.values())
    assert len(vectors.ranks) == 3 * 4


@pytest.mark.parametrize("target", ["expert", "delta"])
@pytest.mark.parametrize("allocation", ["spectral", "even"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_order_of_tasks_does_not_matter(make_source, capture, same_everywhere, scope, allocation, target):
    # The experts of b and bb are equal, so that every one of their components ties with another one.
    options = Purify(rho=0.62, damping=DAMPING, scope=scope, allocation=allocation, target=target)
    tasks = ("a", "b", "bb")
    first = make_source(tasks)
    statistics = capture(first)
    ordered = PurifiedTaskVectors(first, statistics, options)
    ranks = read_all(ordered)
    if allocation == "spectral":
        assert any(ranks["b", layer] != ranks["bb", layer] for layer in LAYERS)
    for order in permutations(tasks):
        vectors = PurifiedTaskVectors(make_source(order), {task: statistics[task] for task in order}, options)
        assert vectors.tasks == order
        same_everywhere(ordered, vectors)
        assert read_all(vectors) == ranks


@pytest.mark.parametrize("scope", SCOPES)
def test_a_task_that_is_not_purified_takes_no_part_in_the_budget(source, capture, statistics, make_source, scope):
    options = Purify(rho=0.7, damping=DAMPING, scope=scope, tasks=["c", "a"])
    chosen = PurifiedTaskVectors(source, statistics, options)
    pair = make_source(("a", "c"))
    alone = PurifiedTaskVectors(pair, capture(pair), Purify(rho=0.7, damping=DAMPING, scope=scope))
    assert read_all(chosen) == read_all(alone)
    for parameter in source.parameters:
        assert chosen.expert("b", parameter).equal(source.expert("b", parameter))
        assert chosen.expert("c", parameter).equal(alone.expert("c", parameter))


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_number_of_workers_changes_no_bit(source, statistics, same_everywhere, scope, workers):
    options = Purify(rho=0.7, scope=scope)
    one = PurifiedTaskVectors(source, statistics, options, Compute(workers=1))
    several = PurifiedTaskVectors(source, statistics, options, Compute(workers=workers))
    same_everywhere(one, several)
    assert one.ranks == several.ranks


@pytest.mark.parametrize("tasks", [None, ["b"], ["c", "a"]])
@pytest.mark.parametrize("scope", SCOPES)
def test_layers_that_are_purified_side_by_side_are_the_same(source, statistics, tasks, scope):
    options = Purify(rho=0.7, scope=scope, tasks=tasks)
    one = PurifiedTaskVectors(source, statistics, options, Compute(workers=1))
    several = PurifiedTaskVectors(source, statistics, options, Compute(workers=7))
    found = list(several.purified())
    names = [task for task in "abc" if task in (tasks or "abc")]
    assert [(task, parameter) for task, parameter, _ in found] == [
        (t, source.named(layer)) for layer in LAYERS for t in names
    ]
    for task, parameter, weight in found:
        assert torch.equal(weight, one.expert(task, parameter)), (task, parameter.name)
    assert several.ranks == one.ranks


def test_as_many_layers_go_together_as_there_are_workers_for():
    assert [layers_at_once(tasks, 4) for tasks in (1, 2, 3, 4, 8)] == [4, 2, 1, 1, 1]
    assert layers_at_once(1, 1) == layers_at_once(0, 1) == 1


@pytest.mark.parametrize("metric", ["covariance", "root", "identity"])
@pytest.mark.parametrize("target", ["expert", "delta", "delta_by_expert"])
def test_full_decompositions_agree_with_the_fast_path(source, statistics, same_everywhere, metric, target):
    fast, exact = (
        PurifiedTaskVectors(source, statistics, Purify(rho=0.7, metric=metric, target=target, exact=exact))
        for exact in (False, True)
    )
    same_everywhere(fast, exact, abs=1e-6)
    assert fast.ranks == exact.ranks
    assert any(kept.rank < kept.full for kept in fast.ranks.values())


def test_full_decompositions_hold_where_the_fast_path_loses_digits(make_source, capture, seen_through):
    source = make_source(("a",), layers={"x": ((20, 20), 1)})
    statistics = capture(source, replace={("a", "x"): np.diag(10.0 ** (-0.6 * np.arange(20)))})
    weight = source.matrices("x")[1]["a"]
    directions, _ = seen_through(weight, statistics["a"], "x", 0.0)
    expected = directions[:, :14] @ directions[:, :14].T @ weight
    off = {}
    for exact in (False, True):
        vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.7, damping=0.0, exact=exact))
        off[exact] = np.abs(vectors.expert("a", source.named("x")).numpy() - expected).max()
    assert off[True] < 1e-6
    assert off[False] > 1e-5


def told(share):
    return f"{share:.4g}"


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_stopping_share_that_puts_the_budget_out_of_reach_is_refused_with_the_nearest_one(source, statistics, scope):
    options = Purify(rho=0.5, stopping_share=0.5, scope=scope)
    with pytest.raises(PaveError) as caught:
        PurifiedTaskVectors(source, statistics, options)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the task vectors cannot be purified like this:"
    found = {line.removeprefix("  - ").partition(":")[0]: line for line in lines[1:]}
    full = {"block.wide": 6, "block.tall": 7, "end.square": 9, "end.flipped": 5}
    floors = {layer: d - round(0.5 * (d - round(0.5 * d))) for layer, d in full.items()}
    # What rounding alone puts out of reach is no problem.
    refused = {layer for layer, d in full.items() if 3 * floors[layer] - round(0.5 * 3 * d) >= 3}
    assert refused == found.keys()
    assert len(refused) >= 3
    for layer, line in found.items():
        assert f"the nearest reachable budget keeps {told(floors[layer] / full[layer])} of them" in line
        assert "take that with nearest_budget: true, or change rho or stopping_share" in line

    nearest = PurifiedTaskVectors(source, statistics, options.model_copy(update={"nearest_budget": True}))
    ranks = read_all(nearest)
    assert all(ranks[task, layer] == floors[layer] for task in "abc" for layer in refused) or scope == "model"
    share = sum(floors.values()) / sum(full.values())
    if scope == "model":
        assert ranks == {(task, layer): round(share * d) for task in "abc" for layer, d in full.items()}


def test_scope_global_checks_its_one_budget_and_not_that_of_each_layer(make_source, capture):
    # The one row of the narrow layer cannot lose anything; the rest of the model can, for it.
    source = make_source(layers={"narrow": ((1, 4), 1), "broad": ((20, 20), 1)})
    statistics = capture(source)
    with pytest.raises(PaveError, match=r"- narrow: rho 0.5 leaves 2 of 3 components to 3 spectra"):
        PurifiedTaskVectors(source, statistics, Purify(rho=0.5))
    ranks = read_all(PurifiedTaskVectors(source, statistics, Purify(rho=0.5, scope="global")))
    assert sum(ranks.values()) == round(0.5 * 63)
    options = Purify(rho=0.5, scope="global", stopping_share=0.5)
    kept = told(1 - 3 * 5 / 63)
    with pytest.raises(PaveError, match=f"- all layers together: .* the nearest reachable budget keeps {kept} of them"):
        PurifiedTaskVectors(source, statistics, options)
    nearest = PurifiedTaskVectors(source, statistics, options.model_copy(update={"nearest_budget": True}))
    assert read_all(nearest) == {(task, layer): d for task in "abc" for layer, d in (("narrow", 1), ("broad", 15))}


@pytest.mark.parametrize("allocation", ["spectral", "even"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_ratio_that_leaves_nothing_is_refused_with_the_nearest_one(source, statistics, scope, allocation):
    options = Purify(rho=0.05, stopping_share=20.0, scope=scope, allocation=allocation)
    with pytest.raises(PaveError) as caught:
        PurifiedTaskVectors(source, statistics, options)
    if scope == "global" and allocation == "spectral":
        expected = [f"rho 0.05 leaves {round(0.05 * 81)} of 81 components to 12 spectra", told(12 / 81)]
    else:
        expected = [f"{layer}: rho 0.05 leaves" for layer in LAYERS] + [told(1 / d) for d in (6, 7, 9, 5)]
    assert all(words in str(caught.value) for words in expected)
    ranks = read_all(PurifiedTaskVectors(source, statistics, options.model_copy(update={"nearest_budget": True})))
    assert set(ranks.values()) == {1}


def test_a_budget_that_untouched_tasks_put_out_of_reach_by_rounding_is_no_error(make_source, capture, same_everywhere):
    # Each of two tasks would lose 0.6 components, which together is one; alone it is one as well, but none may go.
    source = make_source(("a", "b"), layers={"x": ((10, 10), 1)})
    options = Purify(rho=0.94, stopping_share=0.4)
    unseen = capture(source, replace={("b", "x"): np.zeros((10, 10))})
    vectors = PurifiedTaskVectors(source, unseen, options)
    same_everywhere(vectors, source)
    assert vectors.untouched == {("b", "x"): "all its inputs were zero"}


def test_an_automatic_ratio_is_refused_in_words(source, statistics):
    with pytest.raises(PaveError, match="rho: auto is chosen by a workflow on validation data; give a number here"):
        PurifiedTaskVectors(source, statistics, Purify(rho="auto"))


# ---- ratios of single tasks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["spectral", "even"])
@pytest.mark.parametrize("scope", SCOPES)
def test_tasks_of_equal_ratios_share_a_budget(source, capture, statistics, make_source, scope, allocation):
    options = Purify(rho=0.7, damping=DAMPING, scope=scope, allocation=allocation, task_rho={"b": 0.9})
    found = PurifiedTaskVectors(source, statistics, options)
    ranks = read_all(found)
    plain = options.model_copy(update={"task_rho": {}})
    pair, single = make_source(("a", "c")), make_source(("b",))
    others = PurifiedTaskVectors(pair, capture(pair), plain)
    own = PurifiedTaskVectors(single, capture(single), plain.model_copy(update={"rho": 0.9}))
    assert ranks == read_all(others) | read_all(own)
    for parameter in source.parameters:
        assert found.expert("b", parameter).equal(own.expert("b", parameter))
        assert found.expert("c", parameter).equal(others.expert("c", parameter))


def test_a_ratio_of_one_leaves_a_task_as_it_is(source, statistics):
    found = PurifiedTaskVectors(source, statistics, Purify(rho=0.7, task_rho={"a": 1.0}))
    assert all(found.expert("a", parameter).equal(source.expert("a", parameter)) for parameter in source.parameters)
    assert not all(found.expert("b", parameter).equal(source.expert("b", parameter)) for parameter in source.parameters)


def test_ratios_of_tasks_that_there_are_not_are_refused(source, statistics):
    with pytest.raises(PaveError, match="task 'd' is to be purified, but there are only a, b, c"):
        PurifiedTaskVectors(source, statistics, Purify(task_rho={"d": 0.9}))


def test_a_ratio_of_one_task_that_leaves_nothing_is_told(source, statistics):
    with pytest.raises(PaveError, match=r"rho 0.05 leaves 0 of 5 components to 1 spectra"):
        PurifiedTaskVectors(source, statistics, Purify(rho=0.7, task_rho={"a": 0.05}))


def test_options_without_ratios_of_tasks_are_written_as_before():
    """What is stored of a purification is found by what its options say."""
    assert "task_rho" not in Purify().model_dump()
    assert Purify(task_rho={"a": 0.5}).model_dump()["task_rho"] == {"a": 0.5}
    assert not Purify(rho=1, task_rho={"a": 0.5}).changes_nothing
    assert Purify(rho=1, task_rho={"a": 1.0}).changes_nothing
    assert Purify(rho=0.9, task_rho={"a": 0.5}).summary.startswith("rho 0.9, covariance")
    assert "rho 0.5 for a" in Purify(task_rho={"a": 0.5}).summary
