"""A model folder whose tensors are read one at a time."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pave_lightning.errors import PaveError, listed, reason, shortened
from pave_lightning.subspace import is_finite
from pave_lightning.system.files import check_header, file_sha256, read_failure, read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MOST_SHARDS = 10_000
# What `pave convert` reads: weights of models and adapters, in one file or in shards, as torch.save writes them.
CONVERTIBLE = re.compile(r"(pytorch_model|adapter_model)(-\d+-of-\d+)?\.bin")
# Names under which model folders hold weights, here and in other frameworks, whole, in shards, or in another precision.
_WEIGHTS = re.compile(
    r"(pytorch_model|model|tf_model|flax_model)(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.(bin|safetensors|h5|msgpack)"
)
PICKLED_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
IDENTIFYING = (".safetensors", ".json", ".txt", ".model", ".spm", ".tiktoken", ".tokenizer", ".codes")
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its name there, and what the file's header says of it.

    Attributes:
        file: the safetensors file.
        name: the tensor's name there.
        shape: its shape.
        dtype: its type, as safetensors calls it (``F32``).
        start: where its values begin, in bytes from the beginning of the file.
        changed: when the file was last changed before its header was read, in nanoseconds.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    changed: int

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating-point numbers (index buffers do not)."""
        return self.dtype in FLOATING

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Checkpoint:
    """The weights of a Hugging Face model folder, split into backbone and head, read lazily from safetensors.

    Only headers are read at construction, and later no more than what is asked for: many checkpoints can be walked
    through in little memory. Stored names may carry the architecture's prefix (``bert.``) or not; backbone tensors are
    known here by their name without it.

    Args:
        folder: folder with ``model.safetensors``, or with shards and their index.
        prefix: the architecture's backbone prefix, without the dot.
        tied: other names of backbone tensors that the architecture ties to each other -> the one that they go by.
        without: direct submodules of the backbone whose tensors are passed over.
        inner: where there is no prefix, the submodule whose name stored names may lack, all of them.
        outer: other direct submodules, whose names stand as they are.
        beside: where there is no prefix, direct submodules and parameters that are of the head.
        called: names that the file has for backbone tensors, without the prefix -> the names that they go by.
        copied: names of backbone tensors -> others whose values they have where the files lack them, or the reverse.

    Attributes:
        backbone: the backbone's tensors by name; of tied ones one, whatever the file calls it.
        head: all other tensors by their stored names.
        copies: further copies of tied tensors, by name.
        own_names: names of backbone tensors -> what the file calls them, without the prefix, where the two differ.

    Raises:
        PaveError: weights are missing, pickled, truncated or no safetensors; shards are missing.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        tied: Mapping[str, str] | None = None,
        without: Collection[str] = (),
        *,
        inner: str = "",
        outer: Collection[str] = (),
        beside: Collection[str] = (),
        copied: Mapping[str, str] | None = None,
        called: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.tied = dict(tied or {})
        self.files = weight_files(self.folder)
        stored = _stored_in(self.files)
        start = f"{prefix}."
        if inner and not any(name.startswith(f"{inner}.") for name in stored):
            stored = {
                name if name.partition(".")[0] in outer else f"{inner}.{name}": tensor
                for name, tensor in stored.items()
            }
        if any(name.startswith(start) for name in stored):
            self.backbone = {
                name.removeprefix(start): tensor for name, tensor in stored.items() if name.startswith(start)
            }
            self.head = {name: tensor for name, tensor in stored.items() if not name.startswith(start)}
        else:
            self.head = {name: tensor for name, tensor in stored.items() if name.partition(".")[0] in beside}
            self.backbone = {name: tensor for name, tensor in stored.items() if name not in self.head}
        for name in [name for name in self.backbone if name.partition(".")[0] in without]:
            del self.backbone[name]
        known = {own: name for own, name in (called or {}).items() if own in self.backbone}
        self.own_names = {name: own for own, name in known.items() if name not in self.backbone}
        for name, own in self.own_names.items():
            self.backbone[name] = self.backbone.pop(own)
        legacy = {".gamma": ".weight", ".beta": ".bias"}
        for name in list(self.backbone):
            for old, new in legacy.items():
                if name.endswith(f"LayerNorm{old}"):
                    self.backbone[name.removesuffix(old) + new] = self.backbone.pop(name)
        self.copies: dict[str, StoredTensor] = {}
        self._tie()
        for pair in (copied or {}).items():
            for name, other in (pair, pair[::-1]):
                if name not in self.backbone and other in self.backbone:
                    self.backbone[name] = self.backbone[other]

    def _tie(self) -> None:
        """Let tied tensors count once, by the name that they go by."""
        for name, own in self.tied.items():
            if name in self.backbone and own in self.backbone:
                self.copies[name] = self.backbone.pop(name)
            elif name in self.backbone:
                self.backbone[own] = self.backbone.pop(name)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A backbone tensor in its stored shape and dtype; with ``rows``, only these rows are read."""
        return self.read(self.backbone[name], rows)

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """Every tensor of the files by the name under which it is stored, sorted, backbone and head alike."""
        everything = [*self.backbone.values(), *self.copies.values(), *self.head.values()]
        found = {stored.name: stored for stored in everything}
        yield from sorted(found.items())

    def head_tensors(self) -> dict[str, Tensor]:
        """All tensors outside the backbone, by their stored names."""
        return {name: self.read(stored) for name, stored in self.head.items()}

    @staticmethod
    def read(stored: StoredTensor, rows: slice | None = None) -> Tensor:
        """A stored tensor in its shape and dtype, in memory of its own; with ``rows``, only these rows are read.

        Raises:
            PaveError: the file is no longer what it was when its header was read.
        """
        try:
            if stored.file.stat().st_mtime_ns != stored.changed:
                raise OSError("it was written to")
            if stored.is_floating:
                return _values(stored, rows)
            with safe_open(stored.file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(stored.name)
                return tensor if rows is None else tensor[rows]
        except (SafetensorError, OSError) as error:
            raise PaveError(
                f"{stored.file} changed while it was in use: {stored.name} can no longer be read ({error})"
            ) from error

    def has_backbone_of(self, other: Checkpoint) -> bool:
        """Whether every backbone tensor that both hold is the same; reads no further than the first difference.

        Of a table with more rows in one of the two, the rows are compared that both have: tokens may have been added.
        """
        shared = [name for name in self.backbone if name in other.backbone]
        # The smallest first, so that little is read where two models differ.
        shared.sort(key=lambda name: self.backbone[name].size)
        return bool(shared) and all(torch.equal(*_common_rows(self, other, name)) for name in shared)

    def non_finite(self, children: Collection[str] | None = None) -> list[str]:
        """Names of tensors that hold NaN, infinity, or values that are too large for float32.

        Args:
            children: direct submodules of the backbone that are looked at besides the head; the whole backbone where
                nothing is given, so that every weight is read once.
        """
        looked_at = {n: t for n, t in self.backbone.items() if children is None or n.partition(".")[0] in children}
        stored = [*looked_at.items(), *self.head.items()]
        return [name for name, found in stored if found.is_floating and not is_finite_in_float32(self.read(found))]

    def __iter__(self) -> Iterator[str]:
        return iter(self.backbone)


def is_finite_in_float32(tensor: Tensor) -> bool:
    """Whether all values of a floating-point tensor of any shape are finite, also in float32, in which we compute."""
    return is_finite(tensor.float() if tensor.dtype == torch.float64 else tensor)


def _common_rows(first: Checkpoint, second: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    shapes = first.backbone[name].shape, second.backbone[name].shape
    alike = len(shapes[0]) > 1 and shapes[0][1:] == shapes[1][1:] and shapes[0] != shapes[1]
    rows = slice(0, min(shapes[0][0], shapes[1][0])) if alike else None
    return first.tensor(name, rows), second.tensor(name, rows)


def stored_tensors(file: Path, again: str = "fetch or save the checkpoint again") -> dict[str, StoredTensor]:
    """What the header of a safetensors file says of its tensors, by their names there, sorted.

    Args:
        file: the file.
        again: what to do where it cannot be read.

    Raises:
        PaveError: it is missing, truncated or no safetensors file, or this user may not read it.
    """
    try:
        changed = file.stat().st_mtime_ns
        check_header(file)
        with safe_open(file, framework="pt") as opened:  # which checks the whole header
            names = sorted(opened.keys())
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        found = {}
        for name in names:
            told = header[name]
            start = 8 + length + told["data_offsets"][0]
            found[name] = StoredTensor(file, name, tuple(told["shape"]), told["dtype"], start, changed)
        return found
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        damaged = f"{file} is truncated or no safetensors file ({reason(error)}); {again}"
        raise PaveError(read_failure(file, damaged)) from error


def _stored_in(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """What the headers of all files of a checkpoint say, by the tensors' names.

    Raises:
        PaveError: a file cannot be read, two hold a tensor of the same name, or a shard lacks what the index has in it.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in stored_tensors(file).items():
            if name in found:
                raise PaveError(
                    f"{file.parent}: the shards {found[name].file.name} and {file.name} both hold {name}, so it is not "
                    "known which counts; fetch or save the checkpoint again"
                )
            found[name] = tensor
    if files and files[0].name != SINGLE_FILE:
        index = files[0].parent / INDEX_FILE
        placed = read_json(index, "save the checkpoint again")["weight_map"]
        lost = [name for name, file in placed.items() if name not in found or found[name].file.name != file]
        if lost:
            raise PaveError(
                f"{index} says that {placed[lost[0]]} holds {lost[0]}, which it does not; fetch or save the checkpoint "
                "again"
            )
    return found


def _values(stored: StoredTensor, rows: slice | None) -> Tensor:
    """The values of a floating-point tensor, copied: to map a file anew for every block costs more than its reading."""
    dtype, shape, start = FLOATING[stored.dtype], stored.shape, stored.start
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        start += first * math.prod(shape[1:]) * dtype.itemsize
        shape = (last - first, *shape[1:])
    found = torch.empty(math.prod(shape), dtype=dtype)
    place = found.view(torch.uint8).numpy().data
    with stored.file.open("rb") as stream:
        stream.seek(start)
        if stream.readinto(place) != place.nbytes:
            raise OSError("it has become shorter")
    return found.reshape(shape)


def model_digest(folder: Path) -> str:
    """What identifies a model folder: one sha256 over its weights, configuration, tokenizer and adapter files."""
    places = [folder, folder / "adapter"] if (folder / "adapter").is_dir() else [folder]
    files = sorted(
        file for place in places for file in place.iterdir() if file.is_file() and file.suffix in IDENTIFYING
    )
    return hashlib.sha256("".join(f"{file.name}:{file_sha256(file)};" for file in files).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the single one, or else the shards that its index names.

    Where both are there the single file counts, as it does for transformers, which leaves an old index behind.

    Raises:
        PaveError: there are none, only pickled ones, or shards of the index are missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return shard_files(folder / INDEX_FILE)
    if not folder.is_dir():
        raise PaveError(f"there is no folder {folder}")
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED_ENDINGS)
    if convertible := [name for name in pickled if CONVERTIBLE.fullmatch(name)]:
        raise PaveError(convert_advice(str(folder), convertible, str(folder)))
    if pickled:
        raise PaveError(
            f"{folder} holds its weights as {listed(pickled, 3)}; pickled weights can run code and are refused: "
            "load and save them once with save_pretrained to get safetensors"
        )
    raise PaveError(f"{folder} has no {SINGLE_FILE} (nor shards with an index)")


def passed_over(folder: Path) -> list[str]:
    """Names of files beside those of `weight_files` that hold weights of the model as well, sorted.

    Pickled ones, those of other frameworks, and safetensors files under a name that `transformers` reads, too.
    """
    read = {file.name for file in weight_files(folder)}
    return sorted(file.name for file in folder.iterdir() if file.name not in read and _WEIGHTS.fullmatch(file.name))


def shard_files(index: Path, ending: str = ".safetensors") -> list[Path]:
    """The shards that an index names, sorted.

    Args:
        index: the index, JSON with a ``weight_map`` of names of tensors to names of files.
        ending: what the names of shards end with.

    Raises:
        PaveError: the index is broken, names files elsewhere, or shards are missing.
    """
    placed = read_json(index, "save the checkpoint again").get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()) or not placed:
        raise PaveError(f"{index} is broken: expected JSON with a weight_map; save the checkpoint again")
    names = sorted(set(placed.values()))
    if len(names) > MOST_SHARDS:
        raise PaveError(f"{index} names {len(names):,} files, expected at most {MOST_SHARDS:,}; is it broken?")
    elsewhere = [name for name in names if Path(name).name != name or not name.endswith(ending)]
    if elsewhere:
        raise PaveError(
            f"{index} names {listed([repr(shortened(name)) for name in elsewhere])}; expected names of "
            f"{ending.removeprefix('.')} files in the same folder"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise PaveError(f"{index.parent}: the index names shards that are not there: {listed(missing)}")
    return [index.parent / name for name in names]


def convert_advice(what: str, pickled: Sequence[str], source: str) -> str:
    """What to say of a model whose weights are pickled.

    Args:
        what: the model.
        pickled: names of the files.
        source: how `pave convert` is told of it.
    """
    return (
        f"{what} holds its weights as {listed(pickled, 3)}; pickled weights can run code and are refused: run "
        f"`pave convert {source} FOLDER` once, and name FOLDER instead"
    )
