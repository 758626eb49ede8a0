import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pave_lightning.subspace.selection import RankSearch


def ranked(names, blocks, ranks, **options):
    """The values at those ranks, found by one search that sees everything."""
    search = RankSearch(names, blocks, **options)
    search.choose(search.upper(), lambda elements: ranks)
    return search.values(search.lower())


def kth_largest_magnitude(blocks, k):
    """Of one vector, beside another one that must not matter."""

    def of_two():
        yield "other", torch.full((500,), 7.0)
        for block in blocks():
            yield "own", block
        yield "other", torch.full((500,), 0.5)

    return ranked(["own", "other"], of_two, [k], magnitudes=True)["own"][0]


# Few distinct values (ties, both zeros), neighbours that share their upper 16 bits, denormals, the largest number.
AWKWARD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 3.4e38, float(np.float32(1) + np.float32(2**-23))]
VALUE = st.one_of(st.sampled_from(AWKWARD), st.floats(width=32, allow_nan=False, allow_infinity=False))


@st.composite
def split_vectors(draw):
    values = np.array(draw(st.lists(VALUE, min_size=1, max_size=60)), dtype=np.float32)
    cuts = sorted(draw(st.lists(st.integers(0, len(values)), max_size=5)))
    return values, [torch.from_numpy(part.copy()) for part in np.split(values, cuts)]


@settings(max_examples=80, deadline=None)
@given(split_vectors(), st.data())
def test_exact_against_a_sort_whatever_the_blocks(vector, data):
    values, blocks = vector
    k = data.draw(st.integers(1, len(values)))
    expected = np.sort(np.abs(values))[::-1][k - 1]
    found = kth_largest_magnitude(lambda: iter(blocks), k)
    assert np.float32(found) == expected
    assert found == float(expected)


def test_every_k_of_a_long_vector():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 1e-3
    ordered = values.abs().sort(descending=True).values.tolist()
    blocks = [values[:100].reshape(10, 10), values[100:].reshape(2, 2, 100)]
    assert [kth_largest_magnitude(lambda: blocks, k) for k in range(1, 501, 7)] == ordered[::7]


def test_transposed_blocks():
    block = torch.arange(6.0).reshape(2, 3).T
    assert kth_largest_magnitude(lambda: [block], 2) == 4.0


def test_half_precision_blocks():
    assert kth_largest_magnitude(lambda: [torch.tensor([1.0, -3.0, 2.0]).half()], 1) == 3.0


def test_at_least_k_elements_reach_the_threshold():
    values = torch.tensor([2.0, -2.0, 2.0, 1.0])
    assert kth_largest_magnitude(lambda: [values], 1) == 2.0
    assert int((values.abs() >= kth_largest_magnitude(lambda: [values], 2)).sum()) == 3


@pytest.mark.parametrize("k", [-1, 0, 4])
def test_a_rank_that_is_not_there(k):
    with pytest.raises(ValueError, match=f"k must be between 1 and 3, the number of elements; found {k}"):
        kth_largest_magnitude(lambda: [torch.ones(2), torch.ones(1)], k)


def test_no_elements():
    with pytest.raises(ValueError, match="between 1 and 0"):
        kth_largest_magnitude(lambda: [], 1)


@settings(max_examples=80, deadline=None)
@given(split_vectors(), st.data())
def test_signed_values_at_several_ranks_against_a_sort(vector, data):
    values, blocks = vector
    ranks = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=4))
    descending = np.sort(values)[::-1]

    def of_two():
        yield "other", torch.full((70,), -7.0)
        for block in blocks:
            yield "own", block

    found = ranked(["own", "other"], of_two, ranks)
    assert found["own"] == [float(descending[k - 1]) for k in ranks]
    assert found["other"] == [-7.0] * len(ranks)


@settings(max_examples=80, deadline=None)
@given(split_vectors(), st.data())
def test_elements_may_be_spread_over_several_searches(vector, data):
    values, blocks = vector
    k = data.draw(st.integers(1, len(values)))
    searches = [RankSearch(["own"], lambda block=block: [("own", block)]) for block in blocks]
    totals = []

    def ranks(elements):
        totals.append(elements)
        return [k, elements]

    upper = {"own": sum(search.upper()["own"] for search in searches)}
    for search in searches:
        search.choose(upper, ranks)
    lower = {"own": sum(search.lower()["own"] for search in searches)}
    descending = np.sort(values)[::-1]
    for search in searches:
        assert search.values(lower)["own"] == [float(descending[k - 1]), float(descending[-1])]
    assert totals == [len(values)] * len(searches)


def test_no_rank_is_wanted():
    walks = []

    def blocks():
        walks.append(1)
        yield "own", torch.ones(3)

    assert ranked(["own"], blocks, []) == {"own": []}
    assert len(walks) == 1


def test_every_rank_of_signed_neighbours():
    step = np.float32(2**-149)
    values = torch.tensor([step, -step, 0.0, -1.0, float(np.nextafter(np.float32(-1), np.float32(-2))), 2.0, -3e38])
    assert (
        ranked(["own"], lambda: [("own", values)], range(1, 8))["own"] == values.sort(descending=True).values.tolist()
    )


def test_several_ranks_take_no_more_walks():
    walks = []

    def blocks():
        walks.append(1)
        yield "own", torch.tensor([3.0, -5.0, 4.0])

    assert ranked(["own"], blocks, [1, 2, 3], magnitudes=True)["own"] == [5.0, 4.0, 3.0]
    assert len(walks) == 2


@pytest.mark.parametrize("ranks", [[1, 4], [0, 1]])
def test_one_of_several_ranks_that_is_not_there(ranks):
    with pytest.raises(ValueError, match=r"k must be between 1 and 3, the number of elements; found [04]"):
        ranked(["own"], lambda: [("own", torch.ones(3))], ranks)
