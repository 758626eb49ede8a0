"""What a method gathers over parameters, declared with how the values of several parts become one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, cast

import torch
from torch import Tensor
from typing_extensions import TypeVar

from pave_lightning.subspace.selection import RankSearch
from pave_lightning.system.totals import Total, parts_of

Reduction = Literal["sum", "max", "min", "concatenate"]
# What a state may hold. Mappings become one key by key; a key that one part lacks is what the other parts have there.
Value: TypeAlias = "Tensor | float | Sequence[float] | Mapping[str, Value]"
ValueT = TypeVar("ValueT", bound=Value)
ResultT = TypeVar("ResultT")

# What `MergeMethod.prepare` may be: plain, or with a `yield` wherever the states of all parts must be reduced.
Preparation = Iterator[None] | None
# The same of functions that methods share: `found = yield from function(...)`.
Steps = Generator[None, None, ResultT]


@dataclass
class State(Generic[ValueT]):
    """What a method gathers over parameters, of all or of a share of them.

    Attributes:
        value: what has been gathered.
        reduction: how the values of several parts become one.
    """

    value: ValueT
    reduction: Reduction


class States:
    """The states of one object of a method, from their declaration to their reduction."""

    def __init__(self) -> None:
        self._open: dict[str, State[Any]] = {}

    def add(self, name: str, initial: ValueT, reduction: Reduction) -> State[ValueT]:
        """Declare a state.

        Numbers that are summed become a `Total`, exact whatever is added to them in whichever order, so that the sum
        does not depend on how the parameters are divided. Sums of tensors round, unless they are of integers: gather
        those under the names of parameters, each of which one part alone has.

        Raises:
            ValueError: a state of that name has not been reduced yet.
        """
        if name in self._open:
            raise ValueError(f"two states are named '{name}'")
        state = State(_exact(initial) if reduction == "sum" else initial, reduction)
        self._open[name] = state
        return state

    def gathered(self) -> dict[str, Value]:
        """The values of all states that have not been reduced yet, by name."""
        return {name: state.value for name, state in self._open.items()}

    def reduce(self, parts: Sequence[Mapping[str, Value]]) -> None:
        """Replace each value by that of all parts together; what is declared later is reduced the next time.

        Args:
            parts: what :meth:`gathered` gives in every part, this one among them, in an order that all parts share.

        Raises:
            ValueError: the parts have gathered different things, so they are not at the same point of one method.
        """
        if any(part.keys() != self._open.keys() for part in parts):
            told = "; ".join(", ".join(part) or "nothing" for part in parts)
            raise ValueError(f"the parts of a merge have not gathered the same states: {told}")
        for name, state in self._open.items():
            # Each part has its own, to do with as it likes.
            state.value = copy.deepcopy(joined([part[name] for part in parts], state.reduction))
        self._open = {}


def total_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """The sum of tensors that were gathered under the names of parameters, in the order of the names.

    Raises:
        ValueError: there are none.
    """
    first, *others = (tensors[name] for name in sorted(tensors))
    total = first.clone()
    for tensor in others:
        total += tensor
    return total


def _exact(value: ValueT) -> ValueT:
    """The value with numbers that can be added to without rounding; a mapping stays the same object."""
    if isinstance(value, float):
        return cast(ValueT, Total(value))
    if isinstance(value, MutableMapping):
        value.update({name: _exact(one) for name, one in value.items()})
    return value


def joined(values: Sequence[ValueT], reduction: Reduction) -> ValueT:
    """One value of those of several parts.

    Sums of numbers are rounded once, so they do not depend on the order of the parts; those of tensors may.

    Raises:
        ValueError: a number or a list of numbers cannot be reduced so.
    """
    first: Value = values[0]
    found: Value
    if isinstance(first, Mapping):
        mappings = cast(Sequence[Mapping[str, Value]], values)
        names = dict.fromkeys(name for mapping in mappings for name in mapping)
        found = {name: joined([part[name] for part in mappings if name in part], reduction) for name in names}
    elif isinstance(first, Tensor):
        found = _joined_tensors(cast(Sequence[Tensor], values), reduction)
    elif isinstance(first, float | int):
        found = _joined_numbers(cast(Sequence[float], values), reduction)
    elif reduction == "concatenate":
        found = [number for numbers in cast(Sequence[Sequence[float]], values) for number in numbers]
    else:
        raise ValueError(f"lists of numbers can only be concatenated, found the reduction '{reduction}'")
    return cast(ValueT, found)


def _joined_tensors(values: Sequence[Tensor], reduction: Reduction) -> Tensor:
    if reduction == "concatenate":
        return torch.cat(list(values))
    stacked = torch.stack(list(values))
    if reduction == "sum":
        return stacked.sum(dim=0)
    return stacked.amax(dim=0) if reduction == "max" else stacked.amin(dim=0)


def _joined_numbers(values: Sequence[float], reduction: Reduction) -> float:
    if reduction == "concatenate":
        raise ValueError("single numbers cannot be concatenated; gather them in a list")
    if reduction == "sum":
        return Total(part for value in values for part in parts_of(value))
    return max(values) if reduction == "max" else min(values)


def order_statistics(
    states: States,
    name: str,
    vectors: Sequence[str],
    blocks: Callable[[], Iterator[tuple[str, Tensor]]],
    ranks: Callable[[int], Sequence[int]],
    *,
    magnitudes: bool = False,
) -> Steps[dict[str, list[float]]]:
    """The k-th largest values of vectors whose elements are spread over the parts, exact to the element.

    Args:
        states: those of the method.
        name: what its states are called.
        vectors: names of the vectors.
        blocks: called twice; each call yields the same float32 blocks of this part, each with the name of its vector.
        ranks: gives, for how many elements a vector has over all parts, the ranks from the top, starting at 1.
        magnitudes: whether absolute values are ranked.

    Returns:
        For each vector the value at each rank, in the order of the ranks.

    Raises:
        ValueError: a rank is not between 1 and the number of elements of a vector.
    """
    search = RankSearch(vectors, blocks, magnitudes=magnitudes)
    upper = states.add(f"{name}, upper bits", search.upper(), "sum")
    yield
    search.choose(upper.value, ranks)
    lower = states.add(f"{name}, lower bits", search.lower(), "sum")
    yield
    return search.values(lower.value)
