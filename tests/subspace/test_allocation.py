from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pave_lightning.subspace import allocate_ranks, even_ranks

VALUE = st.floats(0.01, 100.0)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Tensor]:
    length = draw(st.integers(1, 5))
    tasks = draw(st.integers(1, 3))
    rows = [sorted(draw(st.lists(VALUE, min_size=length, max_size=length)), reverse=True) for _ in range(tasks)]
    return {f"task{index}": torch.tensor(row, dtype=torch.float64) for index, row in enumerate(rows)}


def lost_sum(spectra: dict[str, Tensor], ranks: dict[str, int], power: float) -> float:
    return sum(float(((values / values[0])[ranks[task] :] ** power).sum()) for task, values in spectra.items())


@settings(max_examples=150, deadline=None)
@given(layers(), st.floats(0.05, 1.0), st.sampled_from([0.5, 1.0, 1.5, 2.0]), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_no_other_allocation_loses_less(
    spectra: dict[str, Tensor], rho: float, stopping_share: float, power: float
) -> None:
    length, tasks = len(next(iter(spectra.values()))), len(spectra)
    ranks = allocate_ranks(spectra, rho, stopping_share)

    cap = min(length, round(stopping_share * (length - round(rho * length))))
    reachable = {sum(losses) for losses in product(range(cap + 1), repeat=tasks)}
    removals = min(reachable, key=lambda count: abs(count - (tasks * length - round(rho * tasks * length))))
    assert all(length - cap <= rank <= length for rank in ranks.values())
    assert sum(length - rank for rank in ranks.values()) == removals

    rivals = [
        dict(zip(spectra, (length - loss for loss in losses), strict=True))
        for losses in product(range(cap + 1), repeat=tasks)
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
    assert allocate_ranks(shuffled, rho) == allocate_ranks(spectra, rho)
    assert list(allocate_ranks(shuffled, rho)) == names


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


def test_a_budget_out_of_reach_takes_what_the_caps_allow() -> None:
    spectra = {"a": torch.linspace(8, 1, 8), "b": torch.linspace(80, 1, 8)}
    assert allocate_ranks(spectra, 0.5, stopping_share=0.5) == {"a": 6, "b": 6}


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


def test_refuses_unlike_or_missing_spectra() -> None:
    with pytest.raises(ValueError, match="one shape"):
        allocate_ranks({"a": torch.ones(3), "b": torch.ones(4)}, 0.5)
    with pytest.raises(ValueError, match="at least one task"):
        allocate_ranks({}, 0.5)
    with pytest.raises(ValueError, match="stopping_share"):
        allocate_ranks({"a": torch.ones(3)}, 0.5, stopping_share=-1.0)
