import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods.tsv import TsvCompress, TsvCompressOptions, TsvMerge, TsvMergeOptions


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def reference(matrices, rank):
    """TSV-M by full SVDs in float64 (arXiv 2412.00081); every matrix must have at least that rank."""
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1)
    right = np.concatenate([v[:rank] for _, _, v in parts], axis=0)
    return polar(left) @ np.diag(np.concatenate([s[:rank] for _, s, _ in parts])) @ polar(right)


def vectors_of(matrices):
    return {f"task{index}": {"w": matrix} for index, matrix in enumerate(matrices)}


def run(make_source, matrices, method=None, /, **options):
    merged = merge(method or TsvMerge(), make_source(vectors_of(matrices), **({"matrices": ["w"]} | options)))
    return merged.vectors["w"].numpy()


def random_matrices(count, shape, seed=0):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32))


# Three tasks do not divide a rank of ten.
@pytest.mark.parametrize(("count", "shape"), [(2, (8, 8)), (3, (10, 14)), (3, (14, 10)), (4, (40, 36))])
def test_merging_as_the_plain_reference(make_source, count, shape):
    matrices = random_matrices(count, shape)
    assert np.allclose(run(make_source, matrices), reference(matrices, min(shape) // count), atol=1e-5)


@pytest.mark.parametrize(("share", "rank"), [(0.31, 3), (0.29, 2), (0.1, 1)])
def test_another_share_of_the_directions(make_source, share, rank):
    matrices = random_matrices(3, (10, 14))
    found = run(make_source, matrices, TsvMerge(TsvMergeOptions(rank_share=share)))
    assert np.allclose(found, reference(matrices, rank), atol=1e-5)


def test_a_share_that_is_no_binary_fraction_loses_no_direction(make_source):
    assert int(100 * 0.29) == 28
    source = make_source(vectors_of([np.eye(100), np.eye(100)]), matrices=["w"])
    kept = merge(TsvCompress(TsvCompressOptions(rank_share=0.29)), source)
    assert kept.factors["task0"]["w"].left.shape == (100, 29)


def test_tasks_in_orthogonal_directions_are_added_up(make_source):
    first, second = np.zeros((4, 4)), np.zeros((4, 4))
    first[0, 1], first[1, 0] = 3.0, 1.0
    second[2, 3], second[3, 2], second[1, 1] = 5.0, 4.0, 0.5  # of three directions two are kept
    expected = first + second - np.diag([0, 0.5, 0, 0])
    assert np.allclose(run(make_source, [first, second]), expected, atol=1e-6)
    only_largest = np.where(np.isin(expected, (3.0, 5.0)), expected, 0.0)
    found = run(make_source, [first, second], TsvMerge(TsvMergeOptions(rank_share=0.25)))
    assert np.allclose(found, only_largest, atol=1e-6)


def test_tasks_that_agree_give_their_leading_directions_once(make_source):
    matrix = random_matrices(1, (9, 12))[0]
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    found = run(make_source, [matrix] * 3)
    assert np.allclose(found, left[:, :3] * values[:3] @ right[:3], atol=1e-5)


def test_directions_that_coincide_are_not_filled_up_with_arbitrary_ones(make_source):
    # Same output direction, different input directions: [u, u] has the polar factor [u, u] / sqrt(2).
    first, second = np.zeros((4, 4)), np.zeros((4, 4))
    first[0, 0], second[0, 1] = 2.0, 3.0
    expected = np.zeros((4, 4))
    expected[0, :2] = np.array([2.0, 3.0]) / np.sqrt(2)
    assert np.allclose(run(make_source, [first, second]), expected, atol=1e-6)


def test_low_rank_updates_bring_no_noise_of_the_base(make_source):
    random = np.random.default_rng(5)
    base = random.standard_normal((24, 40)).astype(np.float32)
    updates = [
        (0.1 * random.standard_normal((24, 2)) @ random.standard_normal((2, 40))).astype(np.float32) for _ in range(3)
    ]
    found = run(make_source, updates, base={"w": base})
    assert np.linalg.matrix_rank(found, tol=1e-4) == 6
    assert np.allclose(found, reference(updates, 2), atol=1e-5)


def test_one_task_that_changed_nothing(make_source):
    matrices = random_matrices(2, (9, 12))
    matrices.append(np.zeros((9, 12), np.float32))
    assert np.allclose(run(make_source, matrices), reference(matrices[:2], 3), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ((5, 30), 6, "w is 5 x 30: its 5 singular directions cannot be split among 6 tasks; merge fewer tasks, or use"),
        ((30, 2), 3, "w is 30 x 2: its 2 singular directions cannot be split among 3 tasks"),
        ((5, 30), 3, "w is 5 x 30: its 5 outputs are fewer than two for each of 3 tasks; merge fewer tasks, or use"),
    ],
)
def test_too_many_tasks_for_a_matrix(make_source, shape, count, message):
    with pytest.raises(PaveError, match=message):
        run(make_source, random_matrices(count, shape))
    with pytest.raises(PaveError, match=message):
        run(make_source, random_matrices(count, shape), TsvMerge(TsvMergeOptions(rank_share=0.2)))
    source = make_source(vectors_of(random_matrices(count, shape)), matrices=["w"])
    assert set(merge(TsvCompress(), source).factors) == set(source.tasks)


@pytest.mark.parametrize(("share", "kept"), [(0.5, 5), (1.0, 10), (0.4, 4)])
def test_a_share_that_needs_more_directions_than_there_are(make_source, share, kept):
    message = (
        f"w is 14 x 10: {kept} singular directions for each of 3 tasks are more than its 10; keep at most 3 for each, "
        "or merge fewer tasks"
    )
    with pytest.raises(PaveError, match=message):
        run(make_source, random_matrices(3, (14, 10)), TsvMerge(TsvMergeOptions(rank_share=share)))
    found = run(make_source, random_matrices(2, (14, 10)), TsvMerge(TsvMergeOptions(rank_share=0.5)))
    assert np.allclose(found, reference(random_matrices(2, (14, 10)), 5), atol=1e-5)


def test_a_share_that_leaves_nothing(make_source):
    with pytest.raises(
        PaveError, match=r"w is 5 x \d+: of its 5 singular directions the share .* leaves none; raise rank_share"
    ):
        run(make_source, random_matrices(2, (5, 30)), TsvMerge(TsvMergeOptions(rank_share=0.1)))


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
@pytest.mark.parametrize("options", [TsvMergeOptions, TsvCompressOptions])
def test_impossible_shares_are_refused(options, share):
    with pytest.raises(ValidationError):
        options(rank_share=share)


def test_defaults_are_those_of_the_source():
    assert TsvMerge.default_scale == 1.0
    assert TsvMergeOptions().others == "mean"
    assert TsvCompress.default_scale is None


@pytest.mark.parametrize("storage", [{"matrices": ["w"]}, {"transposed": ["w"]}, {}])
def test_compression_keeps_each_tasks_leading_directions(make_source, storage):
    # A table of embeddings, which is no matrix weight, is compressed as well.
    matrices = random_matrices(3, (14, 10))
    merged = merge(TsvCompress(), make_source(vectors_of(matrices), **storage))
    assert not merged.vectors["w"].any()
    assert merged.per_task
    for task, matrix in zip(("task0", "task1", "task2"), matrices, strict=True):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        assert np.allclose(merged.own(task, "w").numpy(), left[:, :3] * values[:3] @ right[:3], atol=1e-5)
        kept = merged.factors[task]["w"]
        assert (tuple(kept.left.shape), tuple(kept.right.shape)) == ((14, 3), (3, 10))
        assert kept.left.dtype == kept.right.dtype == torch.float32


def test_compression_by_hand(make_source):
    merged = merge(
        TsvCompress(), make_source({"a": {"w": np.diag([1.0, -3.0])}, "b": {"w": np.eye(2)[:1].T @ [[2, 2]]}})
    )
    assert np.allclose(merged.own("a", "w"), [[0, 0], [0, -3]], atol=1e-6)
    assert np.allclose(merged.own("b", "w"), [[2, 2], [0, 0]], atol=1e-6)


def test_compression_keeps_vectors_and_scalars_as_they_are(make_source, random_vectors):
    merged = merge(TsvCompress(), make_source(random_vectors, matrices=["a"]))
    for task, named in random_vectors.items():
        for name in ("b", "c", "d"):
            assert np.array_equal(merged.own(task, name).numpy(), named[name])
    assert merged.rescalers == dict.fromkeys(random_vectors, 1.0)


def test_compression_with_more_tasks_than_directions_keeps_one(make_source):
    matrices = random_matrices(3, (2, 6))
    merged = merge(TsvCompress(), make_source(vectors_of(matrices), matrices=["w"]))
    left, values, right = np.linalg.svd(matrices[1], full_matrices=False)
    assert np.allclose(merged.own("task1", "w").numpy(), left[:, :1] * values[:1] @ right[:1], atol=1e-5)


def test_compression_without_loss_gives_the_experts_back(make_source, random_vectors):
    method = TsvCompress(TsvCompressOptions(rank_share=1.0))
    merged = merge(method, make_source(random_vectors, matrices=["a"]))
    for task, named in random_vectors.items():
        assert all(np.allclose(merged.own(task, name), value, atol=1e-6) for name, value in named.items())


def test_compression_of_a_convolution(make_source):
    kernels = np.random.default_rng(2).standard_normal((2, 4, 3, 2, 2)).astype(np.float32)
    merged = merge(TsvCompress(), make_source(vectors_of(list(kernels)), matrices=["w"]))
    left, values, right = np.linalg.svd(kernels[0].reshape(4, 12), full_matrices=False)
    expected = (left[:, :2] * values[:2] @ right[:2]).reshape(4, 3, 2, 2)
    assert np.allclose(merged.own("task0", "w").numpy(), expected, atol=1e-5)


def test_matrices_of_one_shape_are_refused_in_one_line(make_source):
    wide, high = random_matrices(3, (5, 30)), random_matrices(3, (30, 2))
    vectors = {
        f"task{index}": {**{f"w{number}": wide[index] for number in range(4)}, "v": high[index]} for index in range(3)
    }
    with pytest.raises(PaveError) as told:
        merge(TsvMerge(), make_source(vectors, matrices=["v", "w0", "w1", "w2", "w3"]))
    assert [line.strip(" -").partition("; ")[0] for line in str(told.value).splitlines()[1:]] == [
        "v is 30 x 2: its 2 singular directions cannot be split among 3 tasks",
        "w0 is 5 x 30 (and 3 more, such as w1, w2): its 5 outputs are fewer than two for each of 3 tasks",
    ]
