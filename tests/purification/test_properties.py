"""What must hold whatever the shapes, the moments and the way of purifying."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pave_lightning.purification import PurifiedTaskVectors, write_purified
from pave_lightning.purification.options import Compute, Purify
from pave_lightning.purification.stored import StoredPurification
from pave_lightning.weights import Checkpoint

WAYS = {
    "metric": get_args(Purify.model_fields["metric"].annotation),
    "target": get_args(Purify.model_fields["target"].annotation),
    "scope": get_args(Purify.model_fields["scope"].annotation),
    "allocation": get_args(Purify.model_fields["allocation"].annotation),
    "statistics": get_args(Purify.model_fields["statistics"].annotation),
    "exact": (False, True),
    "damping": (0.0, 0.1),
}
SIDES = st.tuples(st.tuples(st.integers(1, 12), st.integers(1, 12)), st.sampled_from((0, 1)))
MODELS = st.lists(SIDES, min_size=1, max_size=3).map(lambda found: {f"l{i}.w": each for i, each in enumerate(found)})
OPTIONS = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in WAYS.items()})
KINDS = st.sampled_from(("input", "rows", "cross", "output"))
ROWS = st.integers(1, 30)


def allowed(kind, options):
    """Whether moments of that kind serve that purification; the others are refused, which is tested elsewhere."""
    if not options.reads_statistics or kind in ("input", "rows"):
        return True
    return not options.needs_inputs and (kind == "cross" or options.metric == "root")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(layers=MODELS, ways=OPTIONS, kind=KINDS, rows=ROWS, workers=st.sampled_from((1, 2)))
def test_keeping_everything_changes_no_bit(make_source, capture, layers, ways, kind, rows, workers):
    options = Purify(rho=1.0, **ways)
    assume(allowed(kind, options))
    source = make_source(("a", "b", "bb"), layers=layers)
    vectors = PurifiedTaskVectors(source, capture(source, kind, rows=rows), options, Compute(workers=workers))
    for parameter in source.parameters:
        for task in source.tasks:
            assert torch.equal(vectors.expert(task, parameter), source.expert(task, parameter))
            assert torch.equal(vectors.vector(task, parameter), source.vector(task, parameter))
    assert vectors.ranks
    assert all(kept.rank == kept.full for kept in vectors.ranks.values())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(layers=MODELS, ways=OPTIONS, kind=KINDS, rows=ROWS, rho=st.floats(0.2, 0.95), order=st.permutations("abcd"))
def test_the_order_of_tasks_changes_no_bit(make_source, capture, layers, ways, kind, rows, rho, order):
    options = Purify(rho=rho, nearest_budget=True, **ways)
    # The other task is the next in order.
    assume(allowed(kind, options) and options.statistics != "other_task")
    source = make_source(tuple("abcd"), layers=layers)
    statistics = capture(source, kind, rows=rows)
    ordered = PurifiedTaskVectors(source, statistics, options)
    mixed = PurifiedTaskVectors(make_source(order, layers=layers), {t: statistics[t] for t in order}, options)
    for parameter in ordered.layers:
        for task in source.tasks:
            assert torch.equal(ordered.expert(task, parameter), mixed.expert(task, parameter))
    assert ordered.ranks == mixed.ranks
    assert ordered.untouched == mixed.untouched


def test_keeping_everything_changes_no_bit_on_disk(source, statistics, tmp_path):
    write_purified(PurifiedTaskVectors(source, statistics, Purify(rho=1.0)), tmp_path)
    stored = StoredPurification(source, {task: Checkpoint(tmp_path / task, "model") for task in source.tasks})
    for parameter in source.parameters:
        for task in source.tasks:
            assert torch.equal(stored.vector(task, parameter), source.vector(task, parameter))


@pytest.fixture
def adapted(make_source):
    """Experts that store base plus product rounded to bfloat16, and know the exact product."""

    class Adapted(make_source):
        def vector(self, task, parameter, rows=None, base=None):
            if not parameter.is_matrix:
                return super().vector(task, parameter, rows, base)
            left, right = (
                torch.tensor(np.random.default_rng(list(f"{task}{side}{parameter.name}".encode())).normal(size=shape))
                for side, shape in (("l", (parameter.shape[0], 2)), ("r", (2, parameter.shape[1])))
            )
            product = (0.01 * left @ right).float()
            return product if rows is None else product[rows]

        def expert(self, task, parameter, rows=None):
            if not parameter.is_matrix:
                return super().expert(task, parameter, rows)
            whole = (self.base(parameter) + self.vector(task, parameter)).bfloat16().float()
            return whole if rows is None else whole[rows]

    return Adapted()


def test_the_target_delta_takes_the_exact_product_of_an_adapter(adapted, capture):
    captured = capture(adapted)
    vectors = PurifiedTaskVectors(adapted, captured, Purify(rho=0.5, damping=0.1, target="delta"))
    for parameter in vectors.layers:
        for task in adapted.tasks:
            product = parameter.as_matrix(adapted.vector(task, parameter)).double().numpy()
            covariance = captured[task][parameter.layer].matrix.double().numpy()
            directions = np.linalg.svd(product @ (covariance + 0.1 * np.eye(len(covariance))))[0]
            found = parameter.as_matrix(vectors.vector(task, parameter)).double().numpy()
            kept = directions[:, : vectors.ranks[task, parameter.layer].rank]
            # The product has rank 2; what rounding added to the stored weight is some 1e-3.
            assert found == pytest.approx(kept @ (kept.T @ product), abs=1e-6)


def test_statistics_of_the_task_vector_are_those_of_the_exact_product(adapted):
    options = Purify(rho=0.7, damping=0.1, statistics="task_vector")
    vectors = PurifiedTaskVectors(adapted, {}, options)
    for parameter in vectors.layers:
        for task in adapted.tasks:
            product = parameter.as_matrix(adapted.vector(task, parameter)).double().numpy()
            weight = parameter.as_matrix(adapted.expert(task, parameter)).double().numpy()
            moment = product.T @ product / np.mean(np.sum(product**2, axis=0))
            directions = np.linalg.svd(weight @ (moment + 0.1 * np.eye(len(moment))), full_matrices=False)[0]
            found = parameter.as_matrix(vectors.expert(task, parameter)).double().numpy()
            kept = directions[:, : vectors.ranks[task, parameter.layer].rank]
            assert found == pytest.approx(kept @ (kept.T @ weight), abs=1e-5)
