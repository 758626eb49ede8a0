"""Pickled checkpoints as safetensors: the only place where pickled weights are read, with ``weights_only=True``."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pave_lightning.errors import PaveError, foreign, listed, shortened
from pave_lightning.system.files import let_others_read, making_folder, naming_file, write_tensors
from pave_lightning.system.references import ModelReference
from pave_lightning.weights.adapters import ADAPTER_FOLDER, ADAPTER_WEIGHTS, PICKLED_ADAPTER
from pave_lightning.weights.checkpoint import CONVERTIBLE, PICKLED_ENDINGS, shard_files
from pave_lightning.weights.empty_models import empty_model
from pave_lightning.weights.gguf import ORIGIN_FILE
from pave_lightning.weights.hub_models import PICKLED
from pave_lightning.weights.locate import locate_model
from pave_lightning.weights.writing import ShardWriter

log = logging.getLogger("pave_lightning")

BIN_FILE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def convert_checkpoint(source: ModelReference, output: Path) -> None:
    """Write a model folder whose weights are pickled (``pytorch_model.bin``) as one with safetensors.

    Values, dtypes and names stay. Names that the architecture ties to one tensor are written once; others that share
    memory in the pickle are written each. Other files of the folder are copied, but for those that are pickled
    themselves (optimiser states, training arguments). An adapter, in the folder or beside the weights in ``adapter``,
    is converted as well. Of a GGUF file the folder is copied that `gguf_folder` makes of it.

    Args:
        source: a folder, a GGUF file, a hub id, or a part of a hub repository.
        output: the folder to be made; nothing is there until all of it is.

    Raises:
        PaveError: the source is missing or holds no pickled weights, a file of it holds anything but tensors, shards
            are missing or hold one tensor twice, or there is something at the output already.
    """
    if output.exists():
        raise PaveError(f"{output} exists already; name another folder")
    folder = locate_model(source, role="source", also=PICKLED)
    places = [place for place in (folder, folder / ADAPTER_FOLDER) if _pickled(place)]
    if not places and not (folder / ORIGIN_FILE).is_file():
        raise PaveError(f"{folder} holds no pickled weights, so there is nothing to convert; use it as it is")
    with naming_file(output), making_folder(output) as unfinished:
        for place in (folder, folder / ADAPTER_FOLDER):
            if place.is_dir():
                target = unfinished / place.relative_to(folder)
                target.mkdir(exist_ok=True)
                _carry(place, target)
                if place in places:
                    _convert(place, target)


def _pickled(folder: Path) -> list[Path]:
    """The files with pickled weights that a folder has and safetensors do not stand beside."""
    if not folder.is_dir() or next(folder.glob("*.safetensors"), None) is not None:
        return []
    return sorted(file for file in folder.iterdir() if CONVERTIBLE.fullmatch(file.name) and file.is_file())


def _carry(folder: Path, target: Path) -> None:
    """Copy what is neither pickled nor the index of pickled shards; links are followed, folders left out."""
    left = []
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLED_ENDINGS:
            left += [file.name] * (CONVERTIBLE.fullmatch(file.name) is None)
        elif file.is_file() and file.name != BIN_INDEX:
            shutil.copyfile(file, target / file.name)
    if left:
        log.info("%s: left out, since they are pickled and no weights: %s", folder, listed(left, 3))


def _convert(folder: Path, target: Path) -> None:
    if (folder / PICKLED_ADAPTER).is_file():
        write_tensors(target / ADAPTER_WEIGHTS, _independent(_read(folder / PICKLED_ADAPTER), ()), {"format": "pt"})
        return
    aliases = _aliases(folder)
    writer, written = ShardWriter(target), dict[str, Path]()
    for file in _bin_files(folder):
        tensors = _read(file)
        for name in tensors:
            if name in written:
                raise PaveError(f"{file} holds {name}, which {written[name].name} holds as well; fetch them again")
            written[name] = file
        for name, tensor in _independent(tensors, aliases).items():
            writer.add(name, tensor)
    writer.close()
    for file in target.glob("*.safetensors"):
        let_others_read(file)


def _bin_files(folder: Path) -> list[Path]:
    """The single file, or the shards that the index names.

    Raises:
        PaveError: the index is broken, or shards are missing.
    """
    if (folder / BIN_FILE).is_file():
        return [folder / BIN_FILE]
    if not (folder / BIN_INDEX).is_file():
        raise PaveError(f"{folder} has shards of a {BIN_FILE}, but no {BIN_INDEX}, which names them all; fetch it")
    return shard_files(folder / BIN_INDEX, ".bin")


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file; torch refuses whatever else a pickle could hold.

    Raises:
        PaveError: it cannot be read, or holds other things than tensors by name.
    """
    advice = "fetch it again; a file that holds more than weights is not read, since it could run code"
    with foreign(f"{file} could not be read", advice):
        found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not found:
        raise PaveError(f"{file} holds {type(found).__name__}, expected the tensors of a model by name (state_dict())")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise PaveError(
                f"{file} holds {type(tensor).__name__} under {shortened(repr(name))}, expected tensors by name; save "
                "model.state_dict() of the inner model"
            )
    return found


def _aliases(folder: Path) -> list[list[str]]:
    """The names of each tensor of the model, in the order of its modules; none where config.json gives no model."""
    try:
        model = empty_model(folder)
    except PaveError:
        return []
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _independent(tensors: dict[str, Tensor], aliases: Iterable[list[str]]) -> dict[str, Tensor]:
    """Tensors that share no memory; of names that are one tensor in the model and in the file, the first alone."""
    kept = dict(tensors)
    for names in aliases:
        first, *others = [name for name in names if name in tensors] or [""]
        for name in others:
            if _place(tensors[name]) == _place(tensors[first]):
                del kept[name]
    storages: set[int] = set()
    for name, tensor in kept.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.numel() * tensor.element_size():
            kept[name] = tensor.clone()
        storages.add(storage.data_ptr())
    return {name: tensor.contiguous() for name, tensor in kept.items()}


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
