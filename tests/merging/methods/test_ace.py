import numpy as np
import pytest

from pave_lightning.merging import merge
from pave_lightning.merging.methods.ace import Ace, AceOptions

TASKS = ("a", "b", "c")


def drawn(seed=0, sizes=(1.0, 1.1, 0.9), shape=(6, 8)):
    random = np.random.default_rng(seed)
    return {task: {"w": size * (random.standard_normal(shape) + 0.3)} for task, size in zip(TASKS, sizes, strict=True)}


def published(vectors, ridge, *, unlike, share=0.3, prior=True):
    """The steps of the published code, with the matrix that it inverts written out."""
    full = [named["w"] for named in vectors.values()]
    centred = [update - update.mean(axis=0) for update in full]
    energy = [np.linalg.norm(update) ** 2 for update in full]
    grams = [update.T @ update for update in centred]
    ridges = [ridge / np.trace(gram) if unlike else ridge for gram in grams]
    spread = [gram / np.trace(gram) if unlike else gram for gram in grams]
    return _assembled(centred, full, spread, ridges, share, unlike, np.mean(energy) if unlike else 1.0, prior, True)


def scale_free(vectors, ridge, *, unlike, share=0.3, prior=True):
    full = [named["w"] for named in vectors.values()]
    centred = [update - update.mean(axis=0) for update in full]
    grams = [update.T @ update for update in centred]
    spread = [gram / np.trace(gram) if unlike else gram for gram in grams]
    ridges = [ridge * np.mean(np.diag(gram)) for gram in spread]
    return _assembled(full, full, spread, ridges, share, unlike, 1.0, prior, False)


def _assembled(merged, full, spread, ridges, share, unlike, divisor, prior, ridge_in_mean):
    width = len(spread[0])
    regular = [gram + ridge * np.eye(width) for gram, ridge in zip(spread, ridges, strict=True)]
    row = sum(spread).mean(axis=0) / divisor if prior else np.zeros(width)
    images = sum(update @ gram for update, gram in zip(merged, regular, strict=True))
    found = images @ np.linalg.inv(sum(regular) + np.tile(row, (width, 1)))
    if not unlike:
        return found
    mean = sum(regular if ridge_in_mean else spread) / len(full)
    rest = sum(update @ (gram - mean) for update, gram in zip(full, spread, strict=True))
    left, values, right = np.linalg.svd(rest + found, full_matrices=False)
    count = max(1, int(share * min(found.shape)))
    return found + values[:count].mean() * left[:, :count] @ right[:count]


def run(make_source, vectors, **options):
    merged = merge(Ace(AceOptions(**options)), make_source(vectors, matrices=["w"])).vectors
    return merged["w"].numpy()


@pytest.mark.parametrize("gate", ["always", "never"])
@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (9, 4)])
def test_the_default_form(make_source, gate, prior, shape):
    vectors = drawn(1, shape=shape)
    found = run(make_source, vectors, gate=gate, prior=prior, ridge=0.05)
    assert np.allclose(found, scale_free(vectors, 0.05, unlike=gate == "always", prior=prior), atol=1e-4)


@pytest.mark.parametrize("ridge", [0.01, 1e-3, 1e-5])
def test_inputs_that_no_row_moved_along_count_by_the_ridge(make_source, ridge):
    # Four rows span few of the columns, whose sizes differ by far: the inverse is as ill-conditioned as layers have it.
    random = np.random.default_rng(4)
    size = 1 / np.sqrt(np.arange(1, 301))
    vectors = {task: {"w": 0.5 + random.standard_normal((4, 300)) * size} for task in TASKS}
    found = run(make_source, vectors, gate="never", ridge=ridge)
    expected = scale_free(vectors, ridge, unlike=False)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("gate", ["always", "never"])
@pytest.mark.parametrize("shape", [(6, 8), (9, 4)])
def test_the_published_form(make_source, gate, shape):
    vectors = drawn(2, shape=shape)
    found = run(make_source, vectors, gate=gate, form="published", ridge=0.02, refined_share=0.5)
    assert np.allclose(found, published(vectors, 0.02, unlike=gate == "always", share=0.5), atol=1e-4)


@pytest.mark.parametrize(("sizes", "unlike"), [((1.0, 1.1, 0.9), False), ((0.1, 1.0, 10.0), True)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_the_gate_tells_like_energies_from_unlike_ones_whatever_their_unit(make_source, sizes, unlike, size):
    vectors = drawn(3, [size * one for one in sizes])
    assert np.allclose(run(make_source, vectors) / size, scale_free(vectors, 0.01, unlike=unlike) / size, atol=1e-4)


def test_the_gates_threshold_is_the_variance_of_log_energies(make_source):
    vectors = drawn(4, (1.0, 2.0, 3.0))
    variance = np.var([np.log(np.linalg.norm(named["w"]) ** 2) for named in vectors.values()], ddof=1)
    for threshold, unlike in ((variance * 0.99, True), (variance * 1.01, False)):
        found = run(make_source, vectors, gate_threshold=threshold)
        assert np.allclose(found, scale_free(vectors, 0.01, unlike=unlike), atol=1e-4)


def test_the_published_gate_divides_by_the_squared_mean_of_log_energies(make_source):
    vectors = drawn(4, (1.0, 2.0, 3.0))
    logs = [np.log(np.linalg.norm(named["w"]) ** 2) for named in vectors.values()]
    level = np.var(logs, ddof=1) / np.mean(logs) ** 2
    for threshold, unlike in ((level * 0.99, True), (level * 1.01, False)):
        found = run(make_source, vectors, gate_threshold=threshold, form="published")
        assert np.allclose(found, published(vectors, 0.01, unlike=unlike), atol=1e-4)


def test_equal_updates_without_prior_come_back_with_the_mean_of_their_rows(make_source):
    same = dict.fromkeys(TASKS, drawn(6)["a"])
    assert np.allclose(run(make_source, same, prior=False), same["a"]["w"], atol=1e-5)
    # The published code loses that mean.
    found = run(make_source, same, prior=False, form="published")
    assert np.allclose(found, same["a"]["w"] - same["a"]["w"].mean(axis=0), atol=1e-5)


def test_a_task_that_changes_nothing(make_source):
    vectors = drawn(7)
    vectors["b"]["w"] = 0 * vectors["b"]["w"]
    two = {task: vectors[task] for task in ("a", "c")}
    assert np.allclose(run(make_source, vectors), scale_free(two, 0.01, unlike=False), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 8), (5, 3)])
def test_updates_whose_rows_are_all_alike_are_averaged(make_source, shape):
    random = np.random.default_rng(0)
    vectors = {task: {"w": np.ones((shape[0], 1)) * random.standard_normal(shape[1])} for task in TASKS}
    mean = sum(named["w"] for named in vectors.values()) / 3
    for gate in ("always", "never"):
        assert np.allclose(run(make_source, vectors, gate=gate), mean, atol=1e-6)


def test_defaults_are_those_of_the_source():
    options = AceOptions()
    assert (options.ridge, options.gate_threshold, options.refined_share) == (0.01, 0.3, 0.3)
    assert Ace.default_scale == 1.0
    assert not Ace.needs
