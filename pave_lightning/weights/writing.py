"""Writing weights in shards, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from pave_lightning.system.files import write_tensors

# What a writer holds in memory; checkpoints of many small shards load as those of few large ones do.
SHARD_BYTES = 256_000_000
# For writers of which many are open at once, one a task.
SMALL_SHARD_BYTES = 32_000_000


class ShardWriter:
    """Collects tensors and writes them as a Hugging Face checkpoint: one file, or shards with an index.

    Memory is bounded by one shard. Call :meth:`close` after the last tensor; until then no file has its final name.
    Equal tensors in equal order give equal bytes.

    Args:
        folder: an existing folder.
        shard_bytes: largest size of one file, and what is held in memory; a larger tensor has a file of its own.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor of any shape and dtype; it is held, not copied, until its shard is full: do not change it."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number}.tmp"

    def _flush(self) -> None:
        write_tensors(self._temporary(len(self._shards)), self._pending, {"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is pending, give the files their final names and write the index where there are several."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._temporary(0).replace(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).replace(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
