"""The statistics of one task as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pave_lightning.errors import PaveError, nearest, reason
from pave_lightning.statistics.files import read_described, write_whole
from pave_lightning.statistics.norm_moment import NormMoment
from pave_lightning.statistics.second_moment import LayerMoment
from pave_lightning.subspace import MomentKind, is_finite

# One metadata entry, because safetensors writes several in random order: equal statistics give equal files.
HEADER_KEY = "pave_lightning.statistics"
# 2 adds kinds 'rows' and 'output', and how many rows there were.
FORMAT_VERSION = 2
# The usual reason for which a layer has no moment.
NOT_REACHED = "no example reached it"
# Norms are stored beside the layers' matrices under their own names with this before them.
NORM_PREFIX = "norm:"


@dataclass(frozen=True)
class _Entry:
    """What is known of a layer without reading its matrix."""

    owner: str
    kind: MomentKind
    rows: int
    seen: int
    shape: tuple[int, int]


class TaskStatistics(Mapping[str, LayerMoment]):
    """Layer name -> moment, over the data of one task.

    Layers that read the same input (query, key and value) share one moment, in memory and on disk. Statistics that were
    loaded read a layer's matrix anew each time it is asked for and keep nothing of it. As a mapping the statistics are
    those of the matrix layers alone; those of norms, which not every capture takes, are in ``norms``.

    Args:
        moments: layer name -> moment. Layers whose ``matrix`` is the same tensor object share it.
        examples: how many examples (sequences, images) were seen.
        metadata: free-form strings to be kept with the statistics.
        norms: name of a norm -> mean squares of what its scale multiplies.
        unreached: matrix layers that were watched in vain; with reasons, where one is another than that no example
            reached it.

    Attributes:
        examples: how many examples were seen.
        metadata: the free-form strings.
        file: what they are read from; None where they are in memory.
        unreached: the layers that were watched in vain, sorted; None where that is not known, as in older files.
        norms: the mean squares by name of the norm, in alphabetical order; empty where none were captured.

    Raises:
        PaveError: a moment is not a float32 matrix, or that of a norm not a float32 vector; its kind and shape do not
            fit, or it counts more rows than it saw.
    """

    norms: Mapping[str, NormMoment]

    def __init__(
        self,
        moments: Mapping[str, LayerMoment],
        *,
        examples: int,
        metadata: Mapping[str, str] | None = None,
        norms: Mapping[str, NormMoment] | None = None,
        unreached: Iterable[str] | Mapping[str, str] | None = None,
    ) -> None:
        self.examples = examples
        self.metadata = dict(metadata or {})
        self.file: Path | None = None
        self.unreached = None if unreached is None else tuple(sorted(unreached))
        self._reasons = dict(unreached) if isinstance(unreached, Mapping) else {}
        self._finite: set[str] = set()  # owners whose stored matrix was looked through
        self._moments = {name: moments[name] for name in sorted(moments)}
        self._entries: dict[str, _Entry] = {}
        owners: dict[int, str] = {}
        for name, moment in self._moments.items():
            _check_moment(name, moment)
            owner = owners.setdefault(id(moment.matrix), name)
            height, width = moment.matrix.shape
            self._entries[name] = _Entry(owner, moment.kind, moment.rows, _seen(moment), (height, width))
            if self._entries[name] != self._entries[owner]:
                raise PaveError(f"layers '{owner}' and '{name}' share a matrix but differ in kind or number of tokens")
        self.norms = {name: norms[name] for name in sorted(norms)} if norms else {}
        for name, norm in self.norms.items():
            _check_norm(name, norm)

    @classmethod
    def load(cls, path: Path | str, *, of: Mapping[str, str] | None = None) -> TaskStatistics:
        """Open a file written by `save`. Only its header is read.

        Args:
            path: the file.
            of: entries of its metadata as they must be, such as what identifies the expert; an entry that the file
                does not have is not compared.

        Returns:
            Statistics that read a layer's matrix from the file when it is asked for.

        Raises:
            PaveError: the file is missing, truncated, no safetensors file, none of ours, or of a newer format; its
                metadata are not as they must be.
        """
        file = Path(path)
        header, shapes = _read_header(file)
        statistics = cls(
            {}, examples=header["examples"], metadata=header["metadata"], unreached=header.get("unreached")
        )
        statistics._reasons = header.get("reasons", {})
        statistics.file = file
        for key, expected in (of or {}).items():
            found = statistics.metadata.get(key, expected)
            if found != expected:
                raise PaveError(
                    f"{file} was captured of another expert: expected {key} {expected}, found {found}: {again(file)}"
                )
        for name, entry in header["layers"].items():
            seen = entry.get("seen", entry["rows"])  # format 1 counted all rows
            shape = shapes[entry["owner"]]
            statistics._entries[name] = _Entry(entry["owner"], entry["kind"], entry["rows"], seen, shape)
        statistics.norms = _StoredNorms(file, header.get("norms", {}))
        return statistics

    def save(self, path: Path | str) -> None:
        """Write everything to one safetensors file, each shared matrix once.

        The file appears whole or not at all: it is written under a temporary name in the same folder, then renamed.
        Equal statistics give equal bytes.

        Args:
            path: the file; its folder is created when it does not exist.

        Raises:
            PaveError: a matrix, read from an earlier file, is broken.
        """
        layers = {
            name: {"owner": entry.owner, "kind": entry.kind, "rows": entry.rows, "seen": entry.seen}
            for name, entry in sorted(self._entries.items())
        }
        header = {
            "format_version": FORMAT_VERSION,
            "examples": self.examples,
            "layers": layers,
            "metadata": self.metadata,
        }
        norms = dict(self.norms)
        if self.unreached is not None:
            header["unreached"] = list(self.unreached)
            reasons = {name: reason for name, reason in sorted(self._reasons.items()) if reason != NOT_REACHED}
            if reasons:  # files without keep their bytes
                header["reasons"] = reasons
        if norms:  # files without norms keep their bytes
            header["norms"] = {name: {"rows": norm.rows, "seen": _seen(norm)} for name, norm in norms.items()}
        owners = sorted({entry.owner for entry in self._entries.values()})
        tensors = {owner: self[owner].matrix.contiguous() for owner in owners}
        tensors |= {NORM_PREFIX + name: norm.squares.clone().contiguous() for name, norm in norms.items()}
        write_whole(Path(path), tensors, HEADER_KEY, header)

    def why_unreached(self, layer: str) -> str:
        """Why there is no moment of a layer."""
        found: str = self._reasons.get(layer, NOT_REACHED)
        return found

    def layers(self) -> list[str]:
        """Names of all layers, sorted."""
        return sorted(self._entries)

    def shape(self, layer: str) -> tuple[int, int]:
        """Shape of a layer's matrix, without reading it; what it is for each kind says `LayerMoment`."""
        return self._entry(layer).shape

    def kind(self, layer: str) -> MomentKind:
        """Which moment a layer has, without reading it."""
        return self._entry(layer).kind

    def rows(self, layer: str) -> int:
        """How many rows of a layer's input (tokens) were counted for its moment, without reading its matrix."""
        return self._entry(layer).rows

    def seen(self, layer: str) -> int:
        """How many rows of its input (tokens) reached a layer, whether or not they were counted."""
        return self._entry(layer).seen

    def owner(self, layer: str) -> str:
        """The layer under whose name the matrix is stored: itself, or one that reads the same input."""
        return self._entry(layer).owner

    def __getitem__(self, layer: str) -> LayerMoment:
        entry = self._entry(layer)
        if self.file is None:
            return self._moments[layer]
        matrix = _read_matrix(self.file, entry.owner)
        if entry.owner not in self._finite:
            _check_finite(self.file, entry.owner, matrix)
            self._finite.add(entry.owner)
        return LayerMoment(entry.kind, matrix, entry.rows, entry.seen)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, layer: object) -> bool:
        # The inherited test would read the matrix.
        return layer in self._entries

    def __repr__(self) -> str:
        where = "" if self.file is None else f", file='{self.file}'"
        return f"{type(self).__name__}(layers={len(self)}, examples={self.examples}{where})"

    def _entry(self, layer: str) -> _Entry:
        try:
            return self._entries[layer]
        except KeyError:
            raise KeyError(f"no statistics for layer '{layer}': {nearest(layer, self.layers())}") from None


def again(file: Path | None, what: str = "the statistics") -> str:
    """What to do about statistics that cannot be used; a file that is merely left there counts as up to date."""
    capture = f"capture {what} again"
    return capture if file is None else f"delete {file}, then {capture} (pave capture RECIPE)"


class _StoredNorms(Mapping[str, NormMoment]):
    """The norms of a file, each read when it is asked for."""

    def __init__(self, file: Path, entries: Mapping[str, Mapping[str, int]]) -> None:
        self._file, self._entries = file, {name: entries[name] for name in sorted(entries)}

    def __getitem__(self, name: str) -> NormMoment:
        entry = self._entries[name]
        squares = _read_matrix(self._file, NORM_PREFIX + name)
        _check_finite(self._file, NORM_PREFIX + name, squares)
        return NormMoment(squares, entry["rows"], entry["seen"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def _seen(moment: LayerMoment | NormMoment) -> int:
    return moment.rows if moment.seen is None else moment.seen


def _check_moment(name: str, moment: LayerMoment) -> None:
    matrix = moment.matrix
    if matrix.dtype != torch.float32 or matrix.ndim != 2 or moment.kind not in get_args(MomentKind):
        raise PaveError(
            f"layer '{name}': expected a float32 matrix of a known kind ({', '.join(get_args(MomentKind))}), found "
            f"{matrix.dtype} of shape {tuple(matrix.shape)} with kind '{moment.kind}'"
        )
    problem = _misfit(moment.kind, (matrix.shape[0], matrix.shape[1]), moment.rows, _seen(moment))
    if problem:
        raise PaveError(f"layer '{name}': {problem}")


def _check_norm(name: str, norm: NormMoment) -> None:
    if norm.squares.dtype != torch.float32 or norm.squares.ndim != 1:
        found = f"{norm.squares.dtype} of shape {tuple(norm.squares.shape)}"
        raise PaveError(f"norm '{name}': expected a float32 vector, found {found}")
    problem = _miscounted(norm.rows, _seen(norm))
    if problem:
        raise PaveError(f"norm '{name}': {problem}")


def _misfit(kind: MomentKind, shape: tuple[int, ...], rows: int, seen: int) -> str | None:
    """What is wrong with the shape of a moment, or with its numbers of rows."""
    if kind in ("input", "output") and shape[0] != shape[1]:
        return f"expected a square matrix for kind '{kind}', found shape {shape}"
    if kind == "rows" and shape[0] != rows:
        return f"expected {rows} rows for kind 'rows', found shape {shape}"
    return _miscounted(rows, seen)


def _miscounted(rows: int, seen: int) -> str | None:
    if not 0 < rows <= seen:
        return (
            f"expected at least one row of a layer's input (token), and no more than were seen, found {rows} of {seen}"
        )
    return None


def _read_header(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The header's JSON and the shapes of the stored matrices, all of it checked."""
    found = read_described(file, HEADER_KEY, "statistics", "capture them first", again(file))
    shapes = found.shapes
    try:
        header = json.loads(found.text)
        version = header["format_version"]
        if version > FORMAT_VERSION:
            raise PaveError(f"{file} has statistics format {version}, known is up to {FORMAT_VERSION}: upgrade")
        well_formed = found.all_float32 and isinstance(header["examples"], int) and isinstance(header["metadata"], dict)
        unreached = header.get("unreached", [])
        well_formed = well_formed and isinstance(unreached, list) and all(isinstance(name, str) for name in unreached)
        reasons = header.get("reasons", {})
        well_formed = well_formed and isinstance(reasons, dict)
        well_formed = well_formed and all(isinstance(reason, str) for reason in reasons.values())
        for entry in header["layers"].values():
            kind, rows, shape = entry["kind"], entry["rows"], shapes[entry["owner"]]
            known = kind in get_args(MomentKind) and len(shape) == 2
            well_formed = well_formed and known and not _misfit(kind, shape, rows, entry.get("seen", rows))
        for name, entry in header.get("norms", {}).items():
            one_axis = len(shapes[NORM_PREFIX + name]) == 1
            well_formed = well_formed and one_axis and not _miscounted(entry["rows"], entry["seen"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise PaveError(f"{file} has a damaged statistics header ({reason(error)}): {again(file)}") from error
    if not well_formed:
        raise PaveError(f"{file} has a damaged statistics header: {again(file)}")
    return header, cast(dict[str, tuple[int, int]], shapes)


def _read_matrix(file: Path, owner: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            matrix: Tensor = opened.get_tensor(owner)
    except (SafetensorError, OSError) as error:
        raise PaveError(f"cannot read layer '{owner}' from {file} ({error}): {again(file)}") from error
    return matrix


def _check_finite(file: Path, owner: str, matrix: Tensor) -> None:
    if not is_finite(matrix):
        raise PaveError(f"layer '{owner}' in {file} holds NaN or infinite values: {again(file)}")
