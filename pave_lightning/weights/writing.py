"""Writing weights in shards, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pave_lightning.system.files import let_others_read, write_tensors
from pave_lightning.system.process_groups import ALONE, ProcessGroup

# What a writer holds in memory; checkpoints of many small shards load as those of few large ones do.
SHARD_BYTES = 256_000_000
# For writers of which many are open at once, one a task.
SMALL_SHARD_BYTES = 32_000_000
# Values of every type begin at a multiple of its size, so what is written early must leave the next place at one.
ALIGNMENT = 8
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class ShardWriter:
    """Collects tensors and writes them as a Hugging Face checkpoint: one file, or shards with an index.

    Memory is bounded by ``held_bytes`` and one tensor, however large a shard is. Call :meth:`close` after the last
    tensor; until then no file has its final name. Equal tensors in equal order give equal bytes.

    Args:
        folder: an existing folder.
        shard_bytes: largest size of the tensors in one file; a larger tensor has a file of its own.
        held_bytes: how much is held in memory at most; what a shard has beyond is written before it is full.
        group: the processes that write one checkpoint, each its own tensors into files of its own.

    Attributes:
        elements: how many values of each floating-point type were added; once closed, by all processes.
    """

    def __init__(
        self,
        folder: Path,
        shard_bytes: int = SHARD_BYTES,
        held_bytes: int = SHARD_BYTES,
        group: ProcessGroup = ALONE,
    ) -> None:
        self.folder, self._group = folder, group
        self.shard_bytes, self.held_bytes = shard_bytes, held_bytes
        self.elements: dict[torch.dtype, int] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._begun: _GrowingShard | None = None
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor of any shape and dtype; it is held, not copied, until it is written: do not change it."""
        size = tensor.numel() * tensor.element_size()
        begun = 0 if self._begun is None else self._begun.bytes
        if (self._pending or begun) and self._pending_bytes + begun + size > self.shard_bytes:
            self._flush()
        elif self._pending and self._pending_bytes + size > self.held_bytes:
            self._spill()
        self._pending[name] = tensor.detach().contiguous()
        self._pending_bytes += size
        self._total_bytes += size
        if tensor.is_floating_point():
            self.elements[tensor.dtype] = self.elements.get(tensor.dtype, 0) + tensor.numel()

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{self._group.rank}-{number}.tmp"

    def _spill(self) -> None:
        """Write what is held into the shard that is not full yet."""
        if self._begun is None:
            # As many tensors again and again as fit in, with names of any length; a header that is full ends the shard.
            share = math.ceil(self.shard_bytes / max(1, self._pending_bytes))
            room = 2 * share * sum(_GrowingShard.entry_bytes(name) for name in self._pending)
            self._begun = _GrowingShard(self._temporary(len(self._shards)), room)
        if not self._begun.has_room(self._pending):
            self._flush()
            return
        early = {name: tensor for name, tensor in self._pending.items() if tensor.nbytes % ALIGNMENT == 0}
        self._begun.write(early)
        for name, tensor in early.items():
            del self._pending[name]
            self._pending_bytes -= tensor.nbytes

    def _flush(self) -> None:
        if self._begun is not None and self._begun.has_room(self._pending):
            self._begun.write(self._pending)
            self._pending, self._pending_bytes = {}, 0
        if self._begun is not None:
            self._begun.finish()
            self._shards.append(list(self._begun.entries))
            self._begun = None
        if self._pending:
            write_tensors(self._temporary(len(self._shards)), self._pending, {"format": "pt"})
            self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is pending, give the files their final names and write the index where there are several.

        Of several processes the first does so for all, once each has written its files.
        """
        self._flush()
        shards = [(self._temporary(number).name, names) for number, names in enumerate(self._shards)]
        own: dict[str, Any] = {"shards": shards, "bytes": self._total_bytes, "elements": self._told_elements()}
        told = self._group.gather(own)
        self.elements = _added_up(one["elements"] for one in told)
        if self._group.is_first:
            self._name([shard for one in told for shard in one["shards"]], sum(one["bytes"] for one in told))
        self._group.wait()

    def _name(self, shards: Sequence[tuple[str, Sequence[str]]], total_bytes: int) -> None:
        """Give files their final names; each is told with the names of its tensors."""
        if not shards:
            write_tensors(self.folder / "model.safetensors", {}, {"format": "pt"})
        if len(shards) == 1:
            (self.folder / shards[0][0]).replace(self.folder / "model.safetensors")
        if len(shards) < 2:
            return
        weight_map = {}
        for number, (temporary, names) in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            (self.folder / temporary).replace(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _told_elements(self) -> dict[str, int]:
        return {_CODES[dtype]: count for dtype, count in self.elements.items()}


def _added_up(counts: Iterable[Mapping[str, int]]) -> dict[torch.dtype, int]:
    types, total = {code: dtype for dtype, code in _CODES.items()}, Counter[str]()
    for one in counts:
        total.update(one)
    return {types[code]: count for code, count in total.items()}


class _GrowingShard:
    """A safetensors file that is written tensor by tensor: its header comes last, into room that was left for it.

    Args:
        path: the file.
        room: bytes of the header; safetensors headers may end in spaces.
    """

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self.bytes = 0
        self._room = math.ceil((room + 64) / ALIGNMENT) * ALIGNMENT
        self._used = 64
        self._stream: BinaryIO = path.open("wb")
        self._stream.write(bytes(8 + self._room))

    @staticmethod
    def entry_bytes(name: str) -> int:
        """At most so much of a header tells of one tensor."""
        return len(json.dumps(name)) + 200

    def has_room(self, tensors: dict[str, Tensor]) -> bool:
        """Whether the header can tell of these tensors too."""
        return self._used + sum(map(self.entry_bytes, tensors)) <= self._room

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Add tensors, contiguous; those of wide types first, as each must begin at a multiple of its size."""
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
            stop = self.bytes + tensor.nbytes
            self.entries[name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self.bytes, stop],
            }
            self._stream.write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
            self.bytes, self._used = stop, self._used + self.entry_bytes(name)

    def finish(self) -> None:
        """Write the header and close the file."""
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")).encode()
        self._stream.seek(0)
        self._stream.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._stream.close()
        let_others_read(self.path)
