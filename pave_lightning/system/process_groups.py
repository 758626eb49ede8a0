"""Processes that share one piece of work, and what they tell each other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pave_lightning.errors import PaveError
from pave_lightning.system.totals import Total

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# RANK/SIZE/FOLDER: what a launcher tells each process of a group.
GROUP = "PAVE_GROUP"
# Longer than any process works before it has something to tell; whoever started a group ends it when one is lost.
PATIENCE = timedelta(days=7)
# How long a process that has lost another waits to be ended.
ENDED_SECONDS = 25.0
# Under which keys of JSON stand what it does not know.
_TENSOR, _TOTAL = "$tensor", "$total"


class ProcessGroup:
    """The processes that share a piece of work: here this one alone.

    All of them run the same program and come to the same calls of :meth:`gather`, :meth:`from_first` and :meth:`wait`
    in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        folder: a folder that all of them see, for what is too large to be told; none where this process is alone.
    """

    rank: int = 0
    size: int = 1
    folder: Path

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what there is one of."""
        return self.rank == 0

    def gather(self, own: T) -> list[T]:
        """What every process has, in the order of their numbers; each is given all of it.

        Args:
            own: small: nested mappings with names for keys and sequences, of numbers, texts, None and CPU tensors.
        """
        return [own]

    def from_first(self, own: T) -> T:
        """What the first process has."""
        return self.gather(own if self.is_first else cast(T, None))[0]

    def wait(self) -> None:
        """Wait until all have come here."""
        self.gather(None)


ALONE = ProcessGroup()


class GlooGroup(ProcessGroup):
    """Processes of one machine that a launcher has started, see `pave_lightning.pipeline.launching`.

    They talk through gloo, but not as the default group of torch.distributed: metrics and trainers inside of a process
    would take it for one of several that score together.

    Args:
        rank: the number of this process.
        size: how many there are.
        folder: a folder that all of them see, where they find each other.
    """

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        from torch import distributed

        self.rank, self.size, self.folder = rank, size, folder
        store = distributed.FileStore(str(folder / "meeting"), size)  # type: ignore[attr-defined]
        self._gloo: Any = distributed.ProcessGroupGloo(store, rank, size, PATIENCE)

    def gather(self, own: T) -> list[T]:
        """What every process has, see `ProcessGroup.gather`.

        Raises:
            PaveError: another process was lost, and nobody has ended this one.
        """
        import torch

        packed = _packed(own)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._all_gather(sizes, torch.tensor([len(packed)]))
        room = max(int(size) for size in sizes)
        mine = torch.zeros(room, dtype=torch.uint8)
        mine[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        found = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.size)]
        self._all_gather(found, mine)
        return [cast(T, _unpacked(one[: int(size)].numpy().tobytes())) for one, size in zip(found, sizes, strict=True)]

    def _all_gather(self, places: list[Tensor], own: Tensor) -> None:
        try:
            self._gloo.allgather([places], [own]).wait()
        except RuntimeError as error:
            # Whoever started the processes sees which one was lost, tells it and ends the others.
            time.sleep(ENDED_SECONDS)
            raise PaveError("another process of this stage was lost; run the same command again") from error


@dataclass(frozen=True)
class Place:
    """The place of a process in a group.

    Attributes:
        rank: its number.
        size: how many there are.
        folder: where they meet.
    """

    rank: int
    size: int
    folder: Path

    def environment(self) -> dict[str, str]:
        """What tells a process that it is this one."""
        return {GROUP: f"{self.rank}/{self.size}/{self.folder}"}


def place() -> Place | None:
    """The place of this process in the group that it was started in; None where it was not."""
    told = os.environ.get(GROUP)
    if told is None:
        return None
    rank, size, folder = told.split("/", 2)
    return Place(int(rank), int(size), Path(folder))


def process_group() -> ProcessGroup:
    """The group that this process was started in, which it enters; alone where it was not. Call it once."""
    found = place()
    return ALONE if found is None else GlooGroup(found.rank, found.size, found.folder)


def dealt(things: Sequence[T], shares: int, work: Callable[[T], float]) -> list[list[T]]:
    """Things divided into shares that take about the same work: the largest first, each to whoever has least to do.

    Args:
        things: what is dealt out.
        shares: how many shares there are; some are empty where there are fewer things.
        work: what each thing takes, in any unit.

    Returns:
        The shares, each in the order of the things.

    Example:
        >>> dealt([5, 1, 1, 4, 2], 2, float)
        [[5, 1, 1], [4, 2]]
    """
    totals, owner = [0.0] * shares, dict[int, int]()
    for index in sorted(range(len(things)), key=lambda index: -work(things[index])):
        least = totals.index(min(totals))
        owner[index] = least
        totals[least] += work(things[index])
    return [[thing for index, thing in enumerate(things) if owner[index] == share] for share in range(shares)]


def _packed(value: Any) -> bytes:
    """A value as bytes: JSON with numbers for tensors, and the tensors as safetensors. Nothing that can run code."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    return len(text).to_bytes(8, "little") + text + save(tensors)


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    import torch
    from torch import Tensor

    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy, because safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, Total):
        return {_TOTAL: value.parts}
    if isinstance(value, Mapping):
        return {key: _plain(one, tensors) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one, tensors) for one in value]
    return value


def _unpacked(packed: bytes) -> Any:
    from safetensors.torch import load

    size = int.from_bytes(packed[:8], "little")
    tensors = load(packed[8 + size :])

    def whole(found: dict[str, Any]) -> Any:
        if found.keys() == {_TENSOR}:
            return tensors[found[_TENSOR]]
        return Total(found[_TOTAL]) if found.keys() == {_TOTAL} else found

    return json.loads(packed[8 : 8 + size], object_hook=whole)
