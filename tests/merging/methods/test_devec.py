import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.merging import merge
from pave_lightning.merging.methods.devec import DeVec, DeVecOptions, shared_directions
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic


def projector(matrix, energy):
    left, values, _ = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    rank = next(k for k in range(1, len(values) + 1) if sum(values[:k] ** 2) >= energy * sum(values**2) - 1e-12)
    return left[:, :rank] @ left[:, :rank].T


def reference(matrices, energy, overlap, weight=1.0):
    """The sum of what projectors leave out, d_out x d_out, and each task's shared part (arXiv 2512.22511)."""
    values, vectors = np.linalg.eigh(sum(np.eye(len(matrix)) - projector(matrix, energy) for matrix in matrices))
    # What the tasks lack of a direction, added up.
    shared = vectors[:, values < 1 - overlap] @ vectors[:, values < 1 - overlap].T
    return sum(matrix + weight * shared @ matrix for matrix in matrices)


def vectors_of(matrices):
    return {f"task{index}": {"w": matrix} for index, matrix in enumerate(matrices)}


def run(make_source, matrices, /, **options):
    merged = merge(DeVec(DeVecOptions(**options)), make_source(vectors_of(matrices), matrices=["w"]))
    return merged.vectors["w"].numpy()


def random_matrices(count, shape, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32))


def one_in_common(seed=1):
    """Three matrices of rank three whose column spaces share one direction."""
    random = np.random.default_rng(seed)
    common = random.standard_normal((20, 1))
    return [
        np.hstack([common, random.standard_normal((20, 2))]) @ random.standard_normal((3, 15)) for _ in range(3)
    ], common / np.linalg.norm(common)


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (30, 20)])
@pytest.mark.parametrize(("energy", "overlap"), [(0.9, 0.85), (0.7, 0.6), (1.0, 0.85), (0.5, 0.5)])
def test_as_the_plain_reference(make_source, shape, energy, overlap):
    matrices = random_matrices(3, shape)
    found = run(make_source, matrices, energy=energy, overlap=overlap)
    assert np.allclose(found, reference(matrices, energy, overlap), atol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 2.5, -1.0])
def test_a_direction_in_all_tasks_counts_more(make_source, weight):
    matrices, common = one_in_common()
    total = sum(matrices)
    found = run(make_source, matrices, energy=1.0, shared_weight=weight)
    assert np.allclose(found, total + weight * common @ (common.T @ total), atol=1e-4)
    assert np.allclose(found, reference(matrices, 1.0, 0.85, weight), atol=1e-4)


def test_by_hand(make_source):
    # Both write to the first output; the second is written to by one of them only.
    first, second = np.array([[3.0, 0.0], [0.0, 1.0], [0, 0]]), np.array([[0.0, 5.0], [0.0, 0.0], [0, 0]])
    assert np.allclose(run(make_source, [first, second], energy=1.0), [[6, 10], [0, 1], [0, 0]], atol=1e-6)
    assert np.allclose(run(make_source, [first, second], energy=1.0, shared_weight=-1), [[0, 0], [0, 1], [0, 0]])


def test_the_shared_directions_of_tensors():
    matrices, common = one_in_common()
    found = shared_directions([torch.tensor(matrix) for matrix in matrices], energy=1.0, overlap=0.85)
    assert found.shape == (20, 1)
    assert np.allclose(found @ found.T, common @ common.T, atol=1e-6)


def test_two_directions_at_an_angle():
    # In between, each of them has (1 + cos a) / 2 of the direction, and both together lack 1 - cos a.
    for angle in (0.3, 0.53, 0.57, 0.75, 1.2):
        pair = [torch.tensor([[1.0], [0.0]]), torch.tensor([[np.cos(angle)], [np.sin(angle)]])]
        found = shared_directions(pair, energy=1.0, overlap=0.85)
        assert found.shape[1] == (np.cos(angle) > 0.85)
        if found.shape[1]:
            between = torch.tensor([np.cos(angle / 2), np.sin(angle / 2)])
            assert float((found[:, 0] @ between).abs()) == pytest.approx(1)


@pytest.mark.parametrize("count", [2, 7, 8, 30])
def test_a_direction_that_one_task_lacks_is_not_shared(make_source, count):
    first, second = np.zeros((4, 3)), np.zeros((4, 3))
    first[0, 0], second[1, 1] = 2.0, 3.0
    found = run(make_source, [first] * (count - 1) + [second], energy=1.0)
    assert np.allclose(found, (count - 1) * first + second, atol=1e-5)
    # With the last task it is.
    second[0, 2] = 5.0
    found = run(make_source, [first] * (count - 1) + [second], energy=1.0)
    assert np.allclose(found[0], [4.0 * (count - 1), 0, 10.0], atol=1e-5)
    assert np.allclose(found[1], second[1], atol=1e-5)


def test_each_task_has_at_least_the_overlap_of_every_shared_direction():
    random = np.random.default_rng(4)
    common = random.standard_normal((12, 2))
    counts = set()
    for spread in (0.02, 0.2, 0.3, 0.4, 0.7):
        matrices = [common + spread * random.standard_normal((12, 2)) for _ in range(6)]
        found = shared_directions([torch.tensor(matrix) for matrix in matrices], energy=1.0, overlap=0.7).numpy()
        counts.add(found.shape[1])
        for matrix in matrices:
            assert (np.square(projector(matrix, 1.0) @ found).sum(axis=0) > 0.7).all()
    assert {0, 2} <= counts


def test_the_effective_rank_holds_the_share_of_energy():
    # Squares 16, 9, 4, 1 of 30: 25/30 are in two directions.
    matrix = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    ranks = [
        shared_directions([matrix, matrix], energy=energy, overlap=0.5).shape[1] for energy in (0.5, 0.83, 0.84, 1)
    ]
    assert ranks == [1, 2, 3, 4]


def test_with_all_the_energy_of_matrices_of_full_rank_everything_is_shared(make_source):
    matrices = random_matrices(3, (6, 9))
    assert np.allclose(run(make_source, matrices, energy=1.0), 2 * sum(matrices), atol=1e-5)


def test_a_task_that_changed_nothing_shares_nothing(make_source):
    matrices, _ = one_in_common()
    matrices[1] = np.zeros_like(matrices[1])
    assert np.allclose(run(make_source, matrices, energy=1.0), sum(matrices), atol=1e-5)


def test_without_the_shared_parts_it_is_task_arithmetic(make_source, random_vectors):
    source = make_source(random_vectors, matrices=["a"])
    found = merge(DeVec(DeVecOptions(shared_weight=0.0)), source).vectors
    expected = merge(TaskArithmetic(), source).vectors
    assert all(torch.allclose(found[name], vector, atol=1e-6) for name, vector in expected.items())
    assert DeVec.default_scale == TaskArithmetic.default_scale


@pytest.mark.parametrize(
    "options", [{"energy": 0}, {"energy": 1.1}, {"overlap": 0}, {"overlap": 1}, {"shared_weight": -2}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValidationError):
        DeVecOptions(**options)


def test_defaults():
    options = DeVecOptions()
    assert (options.energy, options.overlap, options.shared_weight, options.others) == (0.9, 0.85, 1.0, "sum")
