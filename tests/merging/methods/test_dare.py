import hashlib
import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.merging import merge
from pave_lightning.merging.methods.dare import (
    Dare,
    DareOptions,
    DareTies,
    DareTiesOptions,
    DroppedTaskVectors,
    kept_elements,
    uniform_draws,
)
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.methods.ties import Ties, TiesOptions


def survivors(shape, drop_rate, seed, task, name):
    """The mask of a whole tensor, drawn from the first counter on."""
    key = hashlib.sha256(json.dumps([seed, task, name]).encode()).digest()[:16]
    size = int(np.prod(shape))
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size // 2 + 1)
    draws = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], axis=1).ravel()[:size]
    return (draws / 2**32 >= drop_rate).reshape(shape)


def dropped(vectors, drop_rate, seed, rescale="keep_probability"):
    """Drop and rescale in numpy."""

    def of_one(value, mask):
        if rescale == "keep_probability":
            return value * mask / (1 - drop_rate)
        left = np.abs(value * mask).sum()
        return value * mask * (np.abs(value).sum() / left if left else 1)

    return {
        task: {
            name: of_one(value, survivors(value.shape, drop_rate, seed, task, name)) for name, value in named.items()
        }
        for task, named in vectors.items()
    }


def run(method, source):
    return {name: vector.numpy() for name, vector in merge(method, source).vectors.items()}


def test_against_numpy(make_source, random_vectors):
    found = run(Dare(DareOptions(drop_rate=0.5, seed=3)), make_source(random_vectors))
    expected = dropped(random_vectors, 0.5, 3)
    for name, vector in found.items():
        assert np.array_equal(vector, sum(named[name] for named in expected.values()))
    assert any(np.any(vector) for vector in found.values())


def test_dare_ties_is_ties_of_the_dropped_vectors(make_source, random_vectors):
    options = DareTiesOptions(drop_rate=0.5, seed=3, density=0.3)
    found = run(DareTies(options), make_source(random_vectors))
    expected = run(Ties(TiesOptions(density=0.3)), make_source(dropped(random_vectors, 0.5, 3)))
    for name, vector in found.items():
        assert np.array_equal(vector, expected[name])


def test_restoring_each_tensors_sum_of_magnitudes_against_numpy(make_source, random_vectors):
    options = DareOptions(drop_rate=0.5, seed=3, rescale="l1")
    found = run(Dare(options), make_source(random_vectors, elements=5))
    expected = dropped(random_vectors, 0.5, 3, "l1")
    for name, vector in found.items():
        assert vector == pytest.approx(sum(named[name] for named in expected.values()), rel=1e-5, abs=1e-6)
    after = DroppedTaskVectors(make_source(random_vectors), options)
    sums = {p.name: float(after.vector("one", p).abs().sum()) for p in after.parameters}
    original = {name: float(np.abs(value).sum()) for name, value in random_vectors["one"].items()}
    assert {name: sums[name] for name in "abc"} == pytest.approx({name: original[name] for name in "abc"})


def test_a_tensor_of_which_nothing_is_kept_stays_zero(make_source):
    source = make_source({task: {"w": [3.0], "v": [0.0]} for task in "ab"})
    seed = next(s for s in range(99) if not any(survivors((1,), 0.9, s, task, "w")[0] for task in "ab"))
    found = run(Dare(DareOptions(drop_rate=0.9, seed=seed, rescale="l1")), source)
    assert found["w"].tolist() == found["v"].tolist() == [0.0]


def test_ties_looks_at_what_is_rescaled_over_whole_tensors(make_source, random_vectors):
    options = DareTiesOptions(drop_rate=0.5, seed=3, density=0.3, rescale="l1")
    found = run(DareTies(options), make_source(random_vectors, elements=4))
    expected = run(Ties(TiesOptions(density=0.3)), make_source(dropped(random_vectors, 0.5, 3, "l1")))
    for name, vector in found.items():
        assert vector == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_a_mask_is_the_same_from_any_start():
    whole = kept_elements(101, 0.4, task="a", parameter="w")
    for start in range(40):
        for count in (0, 1, 2, 9, 61):
            part = kept_elements(count, 0.4, task="a", parameter="w", start=start)
            assert torch.equal(part, whole[start : start + count])


def test_draws_are_uniform_and_masks_are_draws_that_reach_the_drop_rate():
    draws = uniform_draws(20_000, task="a", parameter="w", seed=2)
    assert 0 <= draws.min() < 0.001
    assert 0.999 < draws.max() < 1
    assert torch.histc(draws, 10, 0, 1).tolist() == pytest.approx([2000] * 10, rel=0.1)
    for rate in (0.0, 0.25, 0.75):
        assert torch.equal(kept_elements(20_000, rate, task="a", parameter="w", seed=2), draws >= rate)


def test_masks_do_not_depend_on_the_other_tasks(make_source, random_vectors):
    options = DareOptions(drop_rate=0.6)
    alone = DroppedTaskVectors(make_source({"one": random_vectors["one"]}), options)
    turned = DroppedTaskVectors(make_source(dict(reversed(random_vectors.items()))), options)
    for parameter in alone.parameters:
        assert torch.equal(alone.vector("one", parameter), turned.vector("one", parameter))


def test_masks_differ_between_seeds_tasks_and_parameters():
    masks = [
        kept_elements(4000, 0.5, task=task, parameter=name, seed=seed)
        for task, name, seed in [("a", "w", 0), ("b", "w", 0), ("a", "v", 0), ("a", "w", 1), ("aw", "", 0)]
    ]
    for index, mask in enumerate(masks):
        assert abs(mask.double().mean() - 0.5) < 0.04
        for other in masks[:index]:
            assert abs((mask == other).double().mean() - 0.5) < 0.04


def test_masks_stay_what_they_are():
    mask = kept_elements(16, 0.5, task="movie", parameter="encoder.weight", seed=7)
    assert mask.tolist() == survivors((16,), 0.5, 7, "movie", "encoder.weight").tolist()
    assert "".join(str(int(kept)) for kept in mask) == "1101010110100000"


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements(drop_rate):
    kept = kept_elements(200_000, drop_rate, task="a", parameter="w").double().mean()
    assert float(kept) == pytest.approx(1 - drop_rate, abs=0.005)


def test_no_dropping_is_task_arithmetic_to_the_bit(make_source):
    random = np.random.default_rng(5)
    source = make_source({task: {"w": random.normal(size=(9, 4))} for task in "abc"}, elements=8)
    expected = merge(TaskArithmetic(), source).vectors["w"]
    assert torch.equal(merge(Dare(DareOptions(drop_rate=0)), source).vectors["w"], expected)
    expected = merge(Ties(), source).vectors["w"]
    assert torch.equal(merge(DareTies(DareTiesOptions(drop_rate=0)), source).vectors["w"], expected)


def test_the_mean_over_many_seeds_is_task_arithmetic(make_source):
    random = np.random.default_rng(5)
    source = make_source({task: {"w": random.normal(size=(5, 4))} for task in "abc"})
    draws = np.stack([run(Dare(DareOptions(drop_rate=0.7, seed=seed)), source)["w"] for seed in range(3000)])
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - run(TaskArithmetic(), source)["w"]) < 4.5 * error)
    spread = np.sqrt(0.7 / 0.3 * sum(source.vector(task, source.parameters[0]).numpy() ** 2 for task in "abc"))
    assert draws.std(axis=0) == pytest.approx(spread, rel=0.1)


def test_no_seed_means_zero(make_source, random_vectors):
    source = make_source(random_vectors)
    named, unnamed = run(Dare(DareOptions(seed=0)), source), run(Dare(), source)
    other = run(Dare(DareOptions(seed=1)), source)
    assert all(np.array_equal(named[name], unnamed[name]) for name in named)
    assert not all(np.array_equal(named[name], other[name]) for name in named)


@pytest.mark.parametrize("rescale", ["keep_probability", "l1"])
def test_an_expert_of_the_dropped_source_is_base_plus_vector(rescale, make_source, random_vectors):
    source = make_source(random_vectors, base=random_vectors["two"])
    after = DroppedTaskVectors(source, DareOptions(drop_rate=0.5, rescale=rescale))
    parameter = next(p for p in source.parameters if p.name == "a")
    whole = after.vector("one", parameter)
    assert torch.equal(after.base(parameter), source.base(parameter))
    assert torch.equal(after.expert("one", parameter), source.base(parameter) + whole)
    assert torch.equal(after.vector("one", parameter, slice(3, 6)), whole[3:6])
    assert torch.equal(after.vector("one", parameter, slice(-2, None)), whole[-2:])


@pytest.mark.parametrize("drop_rate", [-0.1, 1, 1.5, float("nan")])
def test_impossible_drop_rates_are_refused(drop_rate):
    with pytest.raises(ValidationError):
        DareOptions(drop_rate=drop_rate)


def test_blocks_are_whole_tensors_only_where_rescaling_needs_them(make_source, random_vectors):
    source = make_source(random_vectors)
    parameter = next(p for p in source.parameters if p.name == "a")
    for rescale, blocks in (("keep_probability", 4), ("l1", 1)):
        method = Dare(DareOptions(rescale=rescale))
        assert method.in_blocks(parameter) == (blocks > 1)
        assert len(list(DroppedTaskVectors(source, method.options).blocks(parameter, 10))) == blocks


def test_defaults():
    assert DareOptions().rescale == "keep_probability"
    assert DareOptions().drop_rate == 0.5
    assert Dare.default_scale == TaskArithmetic.default_scale
    assert DareTies.default_scale == Ties.default_scale
    assert DareTiesOptions().density == TiesOptions().density


def test_what_agrees_after_dropping_may_be_added_up_as_mergekit_does(make_source):
    """Dropped, rescaled to the old sum of magnitudes, signs elected by mass, added up; nothing is trimmed."""
    rng = np.random.default_rng(8)
    vectors = {task: {"w": rng.standard_normal((6, 5))} for task in ("one", "two", "three")}
    options = DareTiesOptions(drop_rate=0.4, rescale="l1", density=1, merge="sum", seed=3)
    left = []
    for task, own in vectors.items():
        value = own["w"].astype(np.float32).astype(np.float64)
        kept = value * survivors(value.shape, 0.4, 3, task, "w")
        left.append(kept * np.abs(value).sum() / np.abs(kept).sum())
    stacked = np.stack(left)
    agrees = np.sign(stacked) == np.sign(stacked.sum(axis=0))
    found = run(DareTies(options), make_source(vectors))["w"]
    assert found == pytest.approx((stacked * agrees).sum(axis=0), abs=1e-5)
    assert DareTiesOptions().merge == "mean"
