"""What the gradients of one task say of each weight, as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pave_lightning.errors import PaveError, nearest, reason
from pave_lightning.statistics.files import read_described, write_whole

GradientKind = Literal["fisher", "absolute"]

# One metadata entry, because safetensors writes several in random order: equal content gives equal files.
HEADER_KEY = "pave_lightning.gradients"
# Key of the metadata under which recipes keep the digest of the expert's files.
EXPERT_DIGEST = "expert_files"
FORMAT_VERSION = 1


class TaskGradients(Mapping[str, Tensor]):
    """Name of a backbone parameter -> a mean over one task's examples for each of its elements, float32, not negative.

    There are two kinds: ``fisher``, the mean square of the gradient of the log-likelihood (the diagonal of the Fisher
    information), and ``absolute``, the mean magnitude of the gradient of the loss. What was loaded from a file is read
    anew each time it is asked for, and nothing of it is kept; :meth:`read` takes single rows.

    Args:
        kind: what was averaged.
        values: name of a parameter inside the backbone -> the mean, float32, of the parameter's shape.
        examples: how many examples the mean was taken over.
        metadata: free-form strings to be kept with it.

    Attributes:
        kind: what was averaged.
        examples: how many examples the mean was taken over.
        metadata: the free-form strings.

    Raises:
        PaveError: the kind is unknown, there were no examples, or values are not float32, not finite or negative.

    Example:
        >>> fisher = TaskGradients("fisher", {"layer.weight": torch.ones(3, 2)}, examples=8)
        >>> fisher.read("layer.weight", rows=slice(0, 1))
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        kind: GradientKind,
        values: Mapping[str, Tensor],
        *,
        examples: int,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if kind not in get_args(GradientKind):
            raise PaveError(f"expected gradients of kind {' or '.join(get_args(GradientKind))}, found '{kind}'")
        if examples < 1:
            raise PaveError(f"gradients must be averaged over at least one example, found {examples}")
        self.kind: GradientKind = kind
        self.examples = examples
        self.metadata = dict(metadata or {})
        self._file: Path | None = None
        self._values = {name: values[name] for name in sorted(values)}
        for name, value in self._values.items():
            if value.dtype != torch.float32:
                raise PaveError(f"the gradients of '{name}': expected float32, found {value.dtype}")
            _check(value, f"the gradients of '{name}'")
        self._shapes = {name: tuple(value.shape) for name, value in self._values.items()}

    @classmethod
    def load(cls, path: Path | str) -> TaskGradients:
        """Open a file written by `save`. Only its header is read.

        Args:
            path: the file.

        Raises:
            PaveError: the file is missing, truncated, no safetensors file, none of ours, or of a newer format.
        """
        file = Path(path)
        header, shapes = _read_header(file)
        found = cls(header["kind"], {}, examples=header["examples"], metadata=header["metadata"])
        found._file, found._shapes = file, shapes
        return found

    def save(self, path: Path | str) -> None:
        """Write everything to one safetensors file.

        The file appears whole or not at all: it is written under a temporary name in the same folder, then renamed.
        Equal content gives equal bytes.

        Args:
            path: the file; its folder is created when it does not exist.

        Raises:
            PaveError: values, read from an earlier file, are broken.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "examples": self.examples,
            "metadata": self.metadata,
        }
        tensors = {name: value.contiguous() for name, value in self.items()}
        write_whole(Path(path), tensors, HEADER_KEY, header)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading its values."""
        self._known(name)
        return self._shapes[name]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values of a parameter, float32, of its shape; with ``rows``, only these rows of its first axis are read.

        Raises:
            KeyError: there is nothing of a parameter of that name.
            PaveError: the file can no longer be read, or holds what cannot be.
        """
        self._known(name)
        if self._file is None:
            value = self._values[name]
            return value if rows is None else value[rows]
        try:
            with safe_open(self._file, framework="pt") as opened:
                found: Tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise PaveError(
                f"cannot read the gradients of '{name}' from {self._file} ({error}): take the gradients again"
            ) from error
        _check(found, f"the gradients of '{name}' in {self._file}")
        return found

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """What keeps these from being the gradients of parameters of those names and shapes, from the header alone."""
        missing = [name for name in shapes if name not in self._shapes]
        if missing:
            yield f"there are none of {len(missing)} of {len(shapes)} parameters, such as {missing[0]}"
        for name, shape in shapes.items():
            found = self._shapes.get(name, shape)
            if found != shape:
                yield f"those of {name} are {list(found)}, expected {list(shape)}"

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        # The inherited test would read the values.
        return name in self._shapes

    def __repr__(self) -> str:
        where = "" if self._file is None else f", file='{self._file}'"
        return f"{type(self).__name__}(kind='{self.kind}', parameters={len(self)}, examples={self.examples}{where})"

    def _known(self, name: str) -> None:
        if name not in self._shapes:
            raise KeyError(f"no gradients of parameter '{name}': {nearest(name, list(self._shapes))}")


def _check(value: Tensor, what: str) -> None:
    """Raise where a mean of magnitudes or squares is none; needs no memory of its size."""
    if not value.numel():
        return
    # Both ends are NaN where any element is.
    lowest, highest = torch.aminmax(value)
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise PaveError(f"{what} hold NaN or infinite values: take the gradients again")
    if lowest < 0:
        raise PaveError(f"{what} hold negative values, which no mean of magnitudes or squares has: take them again")


def _read_header(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The header's JSON and the shapes of the stored tensors, all of it checked."""
    found = read_described(file, HEADER_KEY, "gradients", "take them first", "take the gradients again")
    try:
        header = json.loads(found.text)
        version, examples = header["format_version"], header["examples"]
        if version > FORMAT_VERSION:
            raise PaveError(f"{file} has gradients format {version}, known is up to {FORMAT_VERSION}: upgrade")
        well_formed = header["kind"] in get_args(GradientKind) and isinstance(header["metadata"], dict)
        well_formed = well_formed and isinstance(examples, int) and examples > 0 and found.all_float32
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PaveError(f"{file} has a damaged gradients header ({reason(error)}): take the gradients again") from error
    if not well_formed:
        raise PaveError(f"{file} has a damaged gradients header: take the gradients again")
    return header, found.shapes
