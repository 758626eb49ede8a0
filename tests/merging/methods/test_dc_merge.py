import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods.dc_merge import DcMerge, DcMergeOptions, agreeing_mean, largest_entries


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def smoothed(values, smoothing, ratio):
    if smoothing == "mean":
        return np.full_like(values, values.mean())
    if smoothing == "linear":
        largest = min(ratio, values[0] / values[-1])
        weights = np.array([largest + (1 - largest) * i / (len(values) - 1) for i in range(len(values))])
        return values.sum() * weights / weights.sum()
    return values


def reference(matrices, rank, keep_share, smoothing="none", ratio=5.0):
    """DC-Merge with the whole cover space, a sort and loops over entries, in float64 (arXiv 2603.06242)."""
    parts = [np.linalg.svd(matrix.astype(np.float64), full_matrices=False) for matrix in matrices]
    left = polar(np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1))
    right = polar(np.concatenate([v[:rank] for _, _, v in parts], axis=0))
    size = rank * len(matrices)
    entries = []
    for u, s, v in parts:
        cut = u[:, :rank] @ np.diag(smoothed(s[:rank], smoothing, ratio)) @ v[:rank]
        inside = left.T @ cut @ right.T
        threshold = np.sort(np.abs(inside), axis=None)[::-1][max(1, int(keep_share * inside.size)) - 1]
        entries.append(np.where(np.abs(inside) >= threshold, inside, 0.0))
    merged = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            values = [matrix[i, j] for matrix in entries]
            agreeing = [value for value in values if value * sum(values) > 0]
            if i // rank == j // rank and agreeing:
                merged[i, j] = np.mean(agreeing)
    return left @ merged @ right


def vectors_of(matrices):
    return {f"task{index}": {"w": matrix} for index, matrix in enumerate(matrices)}


def run(make_source, matrices, /, base=None, **options):
    source = make_source(vectors_of(matrices), base=base, matrices=["w"])
    return merge(DcMerge(DcMergeOptions(**options)), source).vectors["w"].numpy()


def random_matrices(count, shape, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32))


@pytest.mark.parametrize("keep_share", [0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("count", "shape"), [(2, (8, 8)), (3, (10, 14)), (3, (14, 10)), (4, (40, 36))])
def test_as_the_plain_reference(make_source, count, shape, keep_share):
    matrices = random_matrices(count, shape)
    found = run(make_source, matrices, keep_share=keep_share)
    assert np.allclose(found, reference(matrices, min(shape) // count, keep_share), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"smoothing": "mean"},
        {"smoothing": "linear"},
        {"smoothing": "linear", "smoothing_ratio": 1.2},
        {"smoothing": "none"},
    ],
)
def test_smoothing_and_another_rank(make_source, options):
    matrices = random_matrices(3, (16, 14))
    found = run(make_source, matrices, rank=3, keep_share=0.2, **options)
    expected = reference(matrices, 3, 0.2, options["smoothing"], options.get("smoothing_ratio", 5.0))
    assert np.allclose(found, expected, atol=1e-5)


def test_the_defaults_keep_one_entry_in_a_thousand(make_source):
    matrices = random_matrices(2, (50, 40))
    assert np.allclose(run(make_source, matrices), reference(matrices, 20, 0.001), atol=1e-5)
    # 40 x 40 entries, of which each task keeps one: the merged matrix has a rank of at most two.
    assert np.linalg.matrix_rank(run(make_source, matrices), tol=1e-5) <= 2


@pytest.mark.parametrize("smoothing", ["none", "mean", "linear"])
def test_tasks_in_orthogonal_directions_are_added_up(make_source, smoothing):
    first, second = np.zeros((4, 4)), np.zeros((4, 4))
    first[0, 1], first[1, 0] = 9.0, 1.0
    second[2, 3], second[3, 2] = 3.0, 1.0
    found = run(make_source, [first, second], keep_share=1.0, smoothing=smoothing)
    # Linear: 10 is split five to one, no more; 4 is split three to one, as it was.
    values = {"none": [9, 1, 3, 1], "mean": [5, 5, 2, 2], "linear": [10 * 5 / 6, 10 / 6, 3, 1]}[smoothing]
    expected = np.zeros((4, 4))
    expected[[0, 1, 2, 3], [1, 0, 3, 2]] = values
    assert np.allclose(found, expected, atol=1e-6)


def test_the_trim_keeps_the_strongest_directions(make_source):
    first, second = np.zeros((4, 4)), np.zeros((4, 4))
    first[0, 1], first[1, 0] = 9.0, 1.0
    second[2, 3], second[3, 2] = 3.0, 1.0
    expected = np.zeros((4, 4))
    expected[0, 1], expected[2, 3] = 9.0, 3.0
    assert np.allclose(run(make_source, [first, second]), expected, atol=1e-6)


def test_equal_entries_survive_the_trim_together(make_source):
    # Tasks that agree: all nine blocks of each task's entries are the same but for rounding, three are diagonal.
    matrix = random_matrices(1, (9, 12))[0]
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    found = run(make_source, [matrix] * 3)
    assert np.allclose(found, values[0] / 3 * np.outer(left[:, 0], right[0]), atol=1e-5)


def test_tasks_that_contradict_each_other_cancel(make_source):
    matrix = random_matrices(1, (9, 12))[0]
    assert np.allclose(run(make_source, [matrix, -matrix], keep_share=1.0), 0, atol=1e-6)


def test_low_rank_updates_bring_no_noise_of_the_base(make_source):
    random = np.random.default_rng(5)
    base = random.standard_normal((24, 40)).astype(np.float32)
    updates = [
        (0.1 * random.standard_normal((24, rank)) @ random.standard_normal((rank, 40))).astype(np.float32)
        for rank in (2, 2, 2)
    ]
    found = run(make_source, updates, base={"w": base}, keep_share=0.3)
    assert np.allclose(found, reference(updates, 2, 0.3), atol=1e-5)


def test_tasks_of_different_rank_have_blocks_of_their_own(make_source):
    first, second, third = np.zeros((6, 6)), np.zeros((6, 6)), np.zeros((6, 6))
    first[0, 0] = 2.0
    second[1, 1], second[2, 2] = 3.0, 4.0
    found = run(make_source, [first, second, third], keep_share=1.0)
    assert np.allclose(found, first + second, atol=1e-6)


def test_the_largest_entries_with_ties():
    matrix = torch.tensor([[4.0, -1.0, 2.0], [-2.0, 2.0 - 1e-15, 0.5]], dtype=torch.float64)
    assert largest_entries(matrix, 0.01).tolist() == [[4, 0, 0], [0, 0, 0]]
    kept = largest_entries(matrix, 1 / 3)
    assert kept.tolist() == [[4, 0, 2], [-2, pytest.approx(2), 0]]
    assert torch.equal(largest_entries(matrix, 1.0), matrix)
    assert largest_entries(torch.zeros(0, 0), 0.5).shape == (0, 0)


def test_the_mean_of_what_agrees():
    rows = [3.0, -1.0, 0.0, 1.0], [1.0, 2.0, -4.0, -1.0 + 1e-15]
    values = [torch.tensor([row], dtype=torch.float64) for row in rows]
    assert agreeing_mean(values).tolist() == [[2, 2, -4, 0]]


def test_too_many_tasks_for_a_matrix(make_source):
    with pytest.raises(PaveError, match="w is 5 x 30: its 5 singular directions cannot be split among 6 tasks; merge"):
        run(make_source, random_matrices(6, (5, 30)))
    with pytest.raises(PaveError, match="w is 5 x 30: its 5 outputs are fewer than two for each of 3 tasks"):
        run(make_source, random_matrices(3, (5, 30)), rank=1)


def test_a_rank_that_needs_more_directions_than_there_are(make_source):
    message = "w is 8 x 30: 3 singular directions for each of 3 tasks are more than its 8; keep at most 2 for each, or"
    with pytest.raises(PaveError, match=message):
        run(make_source, random_matrices(3, (8, 30)), rank=3)
    found = run(make_source, random_matrices(3, (9, 30)), rank=3, keep_share=0.2)
    assert np.allclose(found, reference(random_matrices(3, (9, 30)), 3, 0.2), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"keep_share": 0}, {"keep_share": 1.1}, {"smoothing": "power"}, {"smoothing_ratio": 0.9}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValidationError):
        DcMergeOptions(**options)


def test_defaults_are_those_of_the_source():
    options = DcMergeOptions()
    assert (options.rank, options.keep_share, options.smoothing, options.smoothing_ratio) == (None, 0.001, "none", 5.0)
    assert options.others == "mean"
