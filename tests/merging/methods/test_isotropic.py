import numpy as np
import pytest
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods.isotropic import IsoC, IsoCts, IsoCtsOptions


def vectors_of(matrices):
    return {f"task{index}": {"w": matrix} for index, matrix in enumerate(matrices)}


def run(make_source, matrices, method, /, **options):
    merged = merge(method, make_source(vectors_of(matrices), **({"matrices": ["w"]} | options)))
    return merged.vectors["w"].double().numpy()


def random_matrices(count, shape, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32))


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def common_and_task_specific(matrices, share):
    """Iso-CTS by full SVDs in float64 (arXiv 2502.04959); residuals must have full enough rank."""
    size, count = min(matrices[0].shape), len(matrices)
    specific = round((size - int(size * share)) / count) * count
    common, each = size - specific, specific // count
    left, values, right = np.linalg.svd(np.sum(matrices, axis=0, dtype=np.float64), full_matrices=False)
    lefts, all_values, rights = [left[:, :common]], [values[:common]], [right[:common]]
    outside = np.eye(len(left)) - lefts[0] @ lefts[0].T
    for matrix in matrices:
        left, values, right = np.linalg.svd(outside @ matrix, full_matrices=False)
        lefts.append(left[:, :each])
        all_values.append(values[:each])
        rights.append(right[:each])
    assert sum(len(values) for values in all_values) == size
    mean = np.concatenate(all_values).mean()
    return mean * polar(np.concatenate(lefts, axis=1)) @ polar(np.concatenate(rights, axis=0))


@pytest.mark.parametrize(("count", "shape"), [(2, (8, 8)), (3, (10, 14)), (3, (14, 10)), (4, (40, 36))])
def test_iso_c_as_the_plain_reference(make_source, count, shape):
    matrices = random_matrices(count, shape)
    left, values, right = np.linalg.svd(np.sum(matrices, axis=0, dtype=np.float64), full_matrices=False)
    assert np.allclose(run(make_source, matrices, IsoC()), values.mean() * left @ right, atol=1e-5)


def test_iso_c_by_hand(make_source):
    found = run(make_source, [np.diag([1.0, 3.0]), np.diag([1.0, -7.0])], IsoC())
    assert np.allclose(found, np.diag([3.0, -3.0]))


def test_iso_c_flattens_the_spectrum_of_the_sum_and_keeps_its_trace_norm(make_source):
    matrices = random_matrices(3, (10, 14))
    found = np.linalg.svd(run(make_source, matrices, IsoC()), compute_uv=False)
    assert np.allclose(found, found[0], rtol=1e-5)
    assert found.sum() == pytest.approx(np.linalg.svd(np.sum(matrices, axis=0), compute_uv=False).sum(), rel=1e-5)


def test_iso_c_counts_zeros_in_the_mean_but_makes_no_directions_of_them(make_source):
    first, second = np.zeros((4, 6)), np.zeros((4, 6))
    first[0, 2], second[3, 0] = 6.0, 2.0
    expected = np.zeros((4, 6))
    expected[0, 2] = expected[3, 0] = (6 + 2) / 4
    assert np.allclose(run(make_source, [first, second], IsoC()), expected, atol=1e-6)


@pytest.mark.parametrize("method", [IsoC(), IsoCts(), IsoCts(IsoCtsOptions(common_share=0.2))])
def test_rounding_of_the_base_does_not_become_a_direction(make_source, method):
    random = np.random.default_rng(5)
    base = random.standard_normal((24, 40)).astype(np.float32)
    updates = [(random.standard_normal((24, 2)) @ random.standard_normal((2, 40))).astype(np.float32) for _ in range(3)]
    values = np.linalg.svd(run(make_source, updates, method, base={"w": base}), compute_uv=False)
    assert values[5] > 0.1 * values[0]
    assert values[6] < 1e-5 * values[0]


@pytest.mark.parametrize(
    ("count", "shape", "share"),
    [
        (2, (20, 20), 0.8),  # 16 common directions, 2 for each task
        (3, (20, 26), 0.8),  # 4 left for 3 tasks: one each, so 17 common ones
        (3, (26, 20), 0.5),
        (5, (20, 24), 0.83),  # 4 left for 5 tasks: rounded up, so 15 common ones
    ],
)
def test_iso_cts_as_the_plain_reference(make_source, count, shape, share):
    matrices = random_matrices(count, shape)
    found = run(make_source, matrices, IsoCts(IsoCtsOptions(common_share=share)))
    assert np.allclose(found, common_and_task_specific(matrices, share), atol=1e-4)


def test_iso_cts_by_hand(make_source):
    # Of four directions two are common (8 and 6 in the sum), and each of two tasks gets one besides them.
    first, second = np.diag([4.0, 3.0, 2.0, 0.0]), np.diag([4.0, 3.0, 0.0, -1.0])
    found = run(make_source, [first, second], IsoCts(IsoCtsOptions(common_share=0.5)))
    assert np.allclose(found, (8 + 6 + 2 + 1) / 4 * np.diag([1.0, 1.0, 1.0, -1.0]), atol=1e-6)


def test_iso_cts_of_tasks_within_the_common_directions_has_only_those(make_source):
    # Both tasks have rank 2 and 3 directions are common: nothing is left for the tasks themselves.
    left = np.linalg.qr(np.random.default_rng(3).standard_normal((10, 2)))[0]
    right = np.linalg.qr(np.random.default_rng(4).standard_normal((10, 2)))[0]
    matrices = [left * values @ right.T for values in ([2.0, 5.0], [4.0, 1.0])]
    found = run(make_source, matrices, IsoCts(IsoCtsOptions(common_share=0.3)))
    assert np.allclose(found, (6 + 6) / 10 * left @ right.T, atol=1e-5)


def test_iso_cts_of_one_task_that_changed_nothing(make_source):
    matrices = [*random_matrices(2, (20, 26)), np.zeros((20, 26), np.float32)]
    found = run(make_source, matrices, IsoCts())
    assert np.linalg.matrix_rank(found, tol=1e-4) == 19


def test_too_many_tasks_for_a_matrix(make_source):
    message = (
        "w is 12 x 30: with common_share 0.8 none of its 12 singular directions is left for each of 7 tasks; lower"
    )
    with pytest.raises(PaveError, match=message):
        run(make_source, random_matrices(7, (12, 30)), IsoCts())
    run(make_source, random_matrices(5, (12, 30)), IsoCts())
    run(make_source, random_matrices(7, (12, 30)), IsoC())


def test_no_direction_for_the_common_part(make_source):
    message = "none of its 3 singular directions is left for the tasks' common part; raise common_share, merge fewer"
    with pytest.raises(PaveError, match=message):
        run(make_source, random_matrices(5, (3, 30)), IsoCts(IsoCtsOptions(common_share=0.1)))


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValidationError):
        IsoCtsOptions(common_share=share)


def test_defaults_are_those_of_the_source():
    assert IsoCtsOptions().common_share == 0.8
    assert IsoCtsOptions().others == "mean"
    assert IsoC.default_scale == IsoCts.default_scale == 1.0
