"""From what a recipe says about a model to a folder on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pave_lightning.errors import PaveError, naming, near, nearest, shortened, visible
from pave_lightning.system.files import SCHEME, local_path
from pave_lightning.system.references import GGUF_ENDING, HUB_SCHEME, HubModel, ModelReference, hub_model
from pave_lightning.weights.adapters import ADAPTER_CONFIG
from pave_lightning.weights.gguf import gguf_folder
from pave_lightning.weights.hub_models import fetched

MOST_LOOKED_AT = 1000
# What peft calls an adapter that it saves in the folder itself.
DEFAULT_ADAPTER = "default"


def locate_model(reference: ModelReference, *, role: str = "model", also: Sequence[str] = ()) -> Path:
    """The local folder of a model, downloading it from the hub when it is named by its hub id.

    Args:
        reference: a folder; a GGUF file, whose weights are written once as a folder, see `gguf_folder`;
            ``package:NAME/PATH`` for one of the two that an installed Python package carries (the package is found, not
            imported); a hub id such as ``FacebookAI/roberta-base``; or a part of a repository as `HubModel` or
            ``hf://OWNER/NAME@REVISION/FOLDER``.
        role: what the model is, for messages.
        also: patterns of files that are fetched from the hub besides those that are used here.

    Raises:
        PaveError: nothing is found under that name, or files of it are missing; the message says where was looked.
    """
    if isinstance(reference, HubModel):
        return _usable(fetched(reference, role, also=also), role)
    if not reference.strip() or not reference.isprintable():
        raise PaveError(f"{role}: {reference!r} names no model; expected a folder or a hub id")
    if reference.startswith(HUB_SCHEME):
        return locate_model(hub_model(reference), role=role, also=also)
    folder = local_path(reference)
    if folder.exists():
        return _usable(folder, role)
    if reference.startswith((".", "/", "~", SCHEME)) or reference.count("/") > 1 or _is_gguf(folder):
        what = "file" if _is_gguf(folder) else "folder"
        raise PaveError(f"{role}: there is no {what} {visible(str(folder))}{_beside(folder)}")
    if "/" in reference and folder.parent.is_dir() and not _was_fetched(reference):
        raise PaveError(
            f"{role}: there is no folder {folder}{_beside(folder)} ({folder.parent} is a folder here, so it was not "
            f"looked for on the hub; where it is a hub id, run: hf download {reference})"
        )
    try:
        model = HubModel(hub=reference)
    except ValueError as error:
        raise PaveError(f"{role}: '{shortened(reference)}' is neither a folder here nor a valid hub id") from error
    return fetched(model, role, _beside(folder), also=also)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF_ENDING


def _usable(place: Path, role: str) -> Path:
    """The folder of a model that is there; of a GGUF file the folder that is made of it.

    Raises:
        PaveError: it is neither a model folder nor a GGUF file.
    """
    if place.is_dir():
        if _is_model(place) or named_adapters(place):
            return place
        kept = sorted(file.name for file in place.iterdir() if _is_gguf(file))
        advice = f"; name one of its GGUF files instead: {place / kept[0]}" if kept else ""
        raise PaveError(f"{role}: the folder {place} has no config.json, so it is no Hugging Face model folder{advice}")
    if not _is_gguf(place):
        raise PaveError(
            f"{role}: {place} is a file; a model is named by its folder (with config.json and safetensors), or by its "
            "GGUF file"
        )
    with naming(role):
        return gguf_folder(place)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def named_adapters(folder: Path) -> dict[str, Path]:
    """Adapters in folders of their own below another one, by name, as peft saves several of one model."""
    found = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    return {place.name: place for place in found}


def named_adapter(folder: Path, name: str | None = None, *, role: str = "expert") -> Path:
    """The folder of the adapter that is meant, where peft has saved several of one model in folders of their own.

    Args:
        folder: folder of a model, of an adapter, or of several named ones.
        name: which of them; ``default`` is the one in the folder itself. Where none is named, the folder counts as what
            it holds itself, and if that is nothing, as the only adapter below it.
        role: what it is, for messages.

    Raises:
        PaveError: there is no such adapter, or there are several and none is named.
    """
    below = named_adapters(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        below.setdefault(DEFAULT_ADAPTER, folder)
    if name is not None:
        if name not in below:
            known = nearest(name, sorted(below)) if below else "it holds no adapters"
            raise PaveError(f"{role}: {folder} has no adapter '{name}'; {known}")
        return below[name]
    if _is_model(folder) or not below:
        return folder
    if len(below) > 1:
        raise PaveError(f"{role}: {folder} holds several adapters; name one of {', '.join(sorted(below))}")
    return next(iter(below.values()))


def _beside(folder: Path) -> str:
    """The model folder or GGUF file beside a missing one whose name is most like it."""
    try:
        beside = islice(folder.parent.iterdir(), MOST_LOOKED_AT)
        there = [child.name for child in beside if (_is_gguf(child) if _is_gguf(folder) else child.is_dir())]
    except OSError:
        return ""
    found = near(folder.name, there, 0.6)
    return f"; did you mean {folder.parent / found}?" if found else ""


def _was_fetched(reference: str) -> bool:
    """Whether the hub's cache holds a model of that name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(reference, "config.json"), str)
    except HFValidationError:
        return False
