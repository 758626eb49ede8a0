"""Layers that are given the same tensors share one second moment for as long as that holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from pave_lightning.callbacks.sampling import Calls
from pave_lightning.statistics import SecondMoment


@dataclass(frozen=True)
class Given:
    """What a layer is given in one call.

    Attributes:
        inputs: the tensor.
        cut: how it is cut into rows; layers share a moment only where they agree in it.
        add: adds its rows to the moment of a group.
    """

    inputs: Tensor
    cut: Hashable
    add: Callable[[InputGroup], None]

    def is_same(self, other: Given) -> bool:
        """Whether another call was given the same tensor object, cut in the same way."""
        return self.inputs is other.inputs and self.cut == other.cut


@dataclass
class InputGroup:
    """Layers that have been given the same tensors so far, call by call, and the moment that they share.

    A tensor is counted once every member has been given it. As soon as a member is given another one, the members that
    have had the tensor part from those that have not, which take a copy of the sums with them: each layer's moment is
    that of its own inputs, whenever the two begin to differ.

    Attributes:
        make: makes an empty moment on a device.
        members: names of the layers, in the order in which they came.
        moment: the sums; None until something was counted.
        calls: what part of a batch's allowance each call gets.
        counted: how many calls of each member were counted.
    """

    make: Callable[[torch.device], SecondMoment]
    members: list[str]
    moment: SecondMoment | None = None
    calls: Calls = field(default_factory=Calls)
    counted: int = 0
    # What some members were given that others still wait for, and which.
    _ahead: tuple[Given, set[str]] | None = None

    def ensure_moment(self, device: torch.device) -> SecondMoment:
        """The sums, begun on a device where there are none yet."""
        if self.moment is None:
            self.moment = self.make(device)
        return self.moment

    @property
    def is_fresh(self) -> bool:
        """Whether the members have been called once each and no more, so that others may still join."""
        return self.counted == 1 and self._ahead is None

    def copy(self, members: Sequence[str]) -> InputGroup:
        """A group of other members with the same history and sums of its own."""
        moment = None if self.moment is None else self.moment.copy()
        return InputGroup(self.make, list(members), moment, self.calls.copy(), self.counted)

    def take(self, name: str, given: Given) -> bool:
        """Note what a member is given; False where the group must part first."""
        if self._ahead is None:
            self._ahead = given, {name}
        elif name in self._ahead[1] or not self._ahead[0].is_same(given):
            return False
        else:
            self._ahead[1].add(name)
        if len(self._ahead[1]) == len(self.members):
            self._count()
        return True

    def part(self) -> InputGroup | None:
        """Count what some members have been given; the others, which have not, go on as the group that is returned."""
        if self._ahead is None:
            return None
        behind = self.copy([name for name in self.members if name not in self._ahead[1]])
        self.members = [name for name in self.members if name in self._ahead[1]]
        self._count()
        return behind

    def _count(self) -> None:
        if self._ahead is not None:
            given, self._ahead = self._ahead[0], None
            given.add(self)
            self.counted += 1


class InputGroups:
    """The groups of all layers that have been called.

    Args:
        makes: name of each layer -> makes an empty moment of its kind and shape on a device.
        alone: layers whose moment is that of their own weight too, which no other layer shares.
        share: whether layers may share a moment at all.
    """

    def __init__(
        self,
        makes: Mapping[str, Callable[[torch.device], SecondMoment]],
        *,
        alone: Collection[str] = (),
        share: bool = True,
    ) -> None:
        self._makes, self._alone = dict(makes), set(makes) if not share else set(alone)
        self._of: dict[str, InputGroup] = {}
        # What was given to layers on their first call, in this batch: id and cut -> the tensor and their group.
        self._first: dict[tuple[int, Hashable], tuple[weakref.ref[Tensor], InputGroup]] = {}

    def take(self, name: str, given: Given) -> None:
        """Count what a layer is given in a call, once for all layers that are given the same."""
        if name not in self._of and self._joins(name, given):
            return
        group = self._of[name]
        while not group.take(name, given):
            self._part(group)
            group = self._of[name]

    def has(self, name: str) -> bool:
        """Whether a layer's group has counted a row; to be asked while the sums are there."""
        group = self._of.get(name)
        return group is not None and group.moment is not None and group.moment.rows > 0

    def end_batch(self) -> None:
        """Count what only some members of a group have been given, and forget the batch's tensors."""
        self._first.clear()
        for group in self._distinct():
            self._part(group)

    def reduce(self, device: torch.device) -> None:
        """Add up what all processes have counted; between batches, by all processes.

        Layers go on to share a moment where they did so in every process.

        Args:
            device: where a process holds the sums of layers that only other processes have reached.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        everywhere: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everywhere, {name: group.members[0] for name, group in self._of.items()})
        together: dict[tuple[str | None, ...], list[str]] = {}
        for name in self._makes:
            where = tuple(first.get(name) for first in everywhere)
            if any(first is not None for first in where):
                together.setdefault(where, []).append(name)
        held: set[int] = set()
        parted: list[InputGroup] = []
        for members in together.values():
            group = self._of.get(members[0]) or InputGroup(self._makes[members[0]], members)
            # Of a group that other processes have parted, all but the first members take copies.
            parted.append(group.copy(members) if id(group) in held else group)
            held.add(id(group))
        for members, group in zip(together.values(), parted, strict=True):
            group.members = members
            group.ensure_moment(device).all_reduce()
            self._of.update(dict.fromkeys(members, group))

    def moments(self) -> Iterator[tuple[list[str], SecondMoment]]:
        """Layers that share a moment, and the moment, where it has a row; each is given away, and is here no more."""
        for group in self._distinct():
            moment, group.moment = group.moment, None  # or else sums and means of all layers would be there at once
            if moment is not None and moment.rows:
                yield group.members, moment

    def _distinct(self) -> list[InputGroup]:
        return list({id(group): group for group in self._of.values()}.values())

    def _part(self, group: InputGroup) -> None:
        behind = group.part()
        if behind is not None:
            self._of.update(dict.fromkeys(behind.members, behind))

    def _joins(self, name: str, given: Given) -> bool:
        """Whether a layer's first call makes it a member of a group that was given the same tensor and nothing else."""
        key = id(given.inputs), given.cut
        reference, group = self._first.get(key, (None, None))
        is_same = group is not None and group.is_fresh and reference is not None and reference() is given.inputs
        if group is not None and is_same and name not in self._alone:
            group.members.append(name)
            self._of[name] = group
            return True
        self._of[name] = InputGroup(self._makes[name], [name])
        if name not in self._alone:
            self._first[key] = weakref.ref(given.inputs), self._of[name]
        return False
