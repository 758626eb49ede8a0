from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pave_lightning.subspace import UnreachableBudgetError, allocate_ranks, averaged_ranks, even_ranks

VALUE = st.floats(0.01, 100.0)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Tensor]:
    same = draw(st.integers(1, 5))
    lengths = draw(st.sampled_from([[same] * 3, [same] * 2, [same], [1, same, 3], [same, 4]]))
    rows = [sorted(draw(st.lists(VALUE, min_size=d, max_size=d)), reverse=True) for d in lengths]
    return {f"task{index}": torch.tensor(row, dtype=torch.float64) for index, row in enumerate(rows)}


def lost_sum(spectra: dict[str, Tensor], ranks: dict[str, int], power: float) -> float:
    return sum(float(((values / values[0])[ranks[task] :] ** power).sum()) for task, values in spectra.items())


@settings(max_examples=150, deadline=None)
@given(layers(), st.floats(0.05, 1.0), st.sampled_from([0.5, 1.0, 1.5, 2.0]), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_no_other_allocation_loses_less(
    spectra: dict[str, Tensor], rho: float, stopping_share: float, power: float
) -> None:
    lengths = {task: len(values) for task, values in spectra.items()}
    total = sum(lengths.values())
    ranks = allocate_ranks(spectra, rho, stopping_share, nearest_budget=True)

    caps = {task: min(d - 1, round(stopping_share * (d - round(rho * d)))) for task, d in lengths.items()}
    choices = list(product(*(range(cap + 1) for cap in caps.values())))
    removals = min({sum(losses) for losses in choices}, key=lambda count: abs(count - (total - round(rho * total))))
    assert all(lengths[task] - caps[task] <= rank <= lengths[task] for task, rank in ranks.items())
    assert total - sum(ranks.values()) == removals

    rivals = [
        {task: lengths[task] - loss for task, loss in zip(spectra, losses, strict=True)}
        for losses in choices
        if sum(losses) == removals
    ]
    assert ranks in rivals
    best = min(lost_sum(spectra, rival, power) for rival in rivals)
    assert lost_sum(spectra, ranks, power) <= best + 1e-9 * max(1.0, best)


@settings(max_examples=50, deadline=None)
@given(layers(), st.floats(0.05, 1.0), st.randoms())
def test_the_order_of_tasks_does_not_matter(spectra: dict[str, Tensor], rho: float, random: object) -> None:
    names = list(spectra)
    random.shuffle(names)  # type: ignore[attr-defined]
    shuffled = {name: spectra[name] for name in names}
    ranks = allocate_ranks(shuffled, rho, nearest_budget=True)
    assert ranks == allocate_ranks(spectra, rho, nearest_budget=True)
    assert list(ranks) == names


def test_follows_the_greedy_search_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(3)
    spectra = {
        name: (torch.rand(64, generator=generator, dtype=torch.float64) ** power).sort(descending=True).values * scale
        for name, power, scale in [("a", 1, 5.0), ("b", 2, 0.1), ("c", 6, 70.0)]
    }
    rho, length = 0.875, 64
    kept = dict.fromkeys(spectra, length)
    floor = length - round(1.5 * (length - round(rho * length)))
    while sum(kept.values()) > round(rho * 3 * length):
        open_tasks = [task for task in spectra if kept[task] > floor]
        weakest = min(open_tasks, key=lambda task: float(spectra[task][kept[task] - 1] / spectra[task][0]))
        kept[weakest] -= 1
    assert allocate_ranks(spectra, rho) == kept


def test_equal_spectra_share_evenly() -> None:
    spectra = {task: torch.linspace(8, 1, 8) for task in "abcd"}
    assert set(allocate_ranks(spectra, 0.75).values()) == {6}


def test_keeping_everything() -> None:
    spectra = {"a": torch.tensor([3.0, 2.0, 0.0]), "b": torch.tensor([1.0, 1.0, 1.0])}
    assert allocate_ranks(spectra, 1.0) == {"a": 3, "b": 3}


def test_a_budget_out_of_reach_is_refused_unless_the_nearest_is_asked_for() -> None:
    spectra = {"a": torch.linspace(8, 1, 8), "b": torch.linspace(80, 1, 8)}
    with pytest.raises(UnreachableBudgetError, match=r"remove 8 of 16 .* only 4 may go.* keeps 0\.75 ") as caught:
        allocate_ranks(spectra, 0.5, stopping_share=0.5)
    assert caught.value.nearest == 0.75
    assert allocate_ranks(spectra, 0.5, stopping_share=0.5, nearest_budget=True) == {"a": 6, "b": 6}


def test_a_ratio_that_leaves_nothing_is_refused() -> None:
    spectra = {"a": torch.linspace(8, 1, 8), "b": torch.linspace(80, 1, 8)}
    with pytest.raises(UnreachableBudgetError, match=r"leaves 1 of 16 .* keeps 0\.125 "):
        allocate_ranks(spectra, 0.06)
    assert allocate_ranks(spectra, 0.06, nearest_budget=True) == {"a": 1, "b": 1}


def test_one_budget_over_layers_of_different_widths() -> None:
    spectra = {
        ("movie", "wide"): torch.tensor([10.0, 9.0, 0.3, 0.2, 0.1, 0.05]),
        ("movie", "narrow"): torch.tensor([1.0, 0.9, 0.8]),
        ("topic", "wide"): torch.tensor([1.0, 0.9, 0.9, 0.9, 0.9, 0.9]),
    }
    # 15 components, 9 stay: six go, and no more than round(1.5 * 2) of the wide and round(1.5 * 1) of the narrow ones
    assert list(allocate_ranks(spectra, 0.6).values()) == [3, 1, 5]


def test_averaged_ranks_give_a_task_one_share() -> None:
    ranks = {("a", "wide"): 8, ("a", "narrow"): 2, ("b", "wide"): 10, ("b", "narrow"): 4}
    lengths = {("a", "wide"): 10, ("a", "narrow"): 4, ("b", "wide"): 10, ("b", "narrow"): 4}
    # task a keeps 10 of 14 in all
    assert averaged_ranks(ranks, lengths) == {
        ("a", "wide"): 7,
        ("a", "narrow"): 3,
        ("b", "wide"): 10,
        ("b", "narrow"): 4,
    }


def test_averaged_ranks_weigh_layers_by_their_width() -> None:
    # The published scripts: (8 + 1000) / (16 + 1000) of each, not the mean of 1/2 and 1.
    ranks, lengths = {("a", "key"): 8, ("a", "up"): 1000}, {("a", "key"): 16, ("a", "up"): 1000}
    assert averaged_ranks(ranks, lengths) == {("a", "key"): 16, ("a", "up"): 992}
    assert averaged_ranks(lengths, lengths) == lengths


def test_even_ranks() -> None:
    assert even_ranks({"b": torch.ones(768), "a": torch.zeros(768)}, 0.984375) == {"b": 756, "a": 756}


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.01, float("nan")])
def test_refuses_a_share_out_of_range(rho: float) -> None:
    with pytest.raises(ValueError, match="rho"):
        allocate_ranks({"a": torch.ones(3)}, rho)
    with pytest.raises(ValueError, match="rho"):
        even_ranks({"a": torch.ones(3)}, rho)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 0.0], "all zeros"),
        ([float("nan"), 1.0], "NaN"),
        ([float("inf"), 1.0], "infinite"),
        ([1.0, 2.0], "descending"),
        ([1.0, -1.0], "non-negative"),
    ],
)
def test_refuses_a_spectrum_that_is_none(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"'bad'.*{message}"):
        allocate_ranks({"good": torch.tensor([2.0, 1.0]), "bad": torch.tensor(values)}, 0.5)


def test_refuses_malformed_or_missing_spectra() -> None:
    with pytest.raises(ValueError, match="shape"):
        allocate_ranks({"a": torch.ones(3, 2)}, 0.5)
    with pytest.raises(ValueError, match="at least one spectrum"):
        allocate_ranks({}, 0.5)
    with pytest.raises(ValueError, match="stopping_share"):
        allocate_ranks({"a": torch.ones(3)}, 0.5, stopping_share=-1.0)
