"""Models of the Hugging Face hub as folders on this machine: fetched, or from the hub's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pave_lightning.errors import PaveError, listed, reason, shortened, system_problem
from pave_lightning.system.files import read_json
from pave_lightning.system.hub import hub_answers, hub_or_cache, unreached
from pave_lightning.system.references import GGUF_ENDING, HubModel
from pave_lightning.weights.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pave_lightning.weights.checkpoint import INDEX_FILE, SINGLE_FILE, convert_advice
from pave_lightning.weights.tokenizer_files import TOKENIZER_FILES

# Weights by their beginning, since a pattern's star reaches into folders, where other checkpoints may lie.
WANTED = (
    "*.json",
    "*.txt",
    "*.jinja",
    "README.md",
    *TOKENIZER_FILES,
    "model*.safetensors",
    "*adapter_model.safetensors",
)
PICKLED = ("pytorch_model*.bin", "adapter_model*.bin", "pytorch_model.bin.index.json")


def fetched(model: HubModel, role: str, hint: str = "", *, also: Sequence[str] = ()) -> Path:
    """The folder, or the GGUF file, of a model of the hub; nothing is fetched where the hub does not answer.

    Args:
        model: the model.
        role: what it is, for messages.
        hint: what else may have been meant, for messages.
        also: patterns of files that are wanted besides; where there are any, no others are missed.

    Raises:
        PaveError: there is no such model, or files of it are neither on this machine nor can be fetched; names them.
    """
    where = _snapshot(model, role, hint, [*WANTED, *also] if model.file is None else [model.file])
    place = where if model.folder is None else where / model.folder
    if model.file is not None:
        if not (place / model.file).is_file():
            raise PaveError(f"{role}: '{model}' is not {_there()}{_beside(place, GGUF_ENDING)}{_advice(model)}")
        return place / model.file
    missing = list(_missing(place))
    if not missing or any(next(place.glob(pattern), None) for pattern in also):
        return place
    pickled = _pickled(model, place)
    if pickled:
        told = convert_advice(f"'{model}'", pickled, model.flags)
        raise PaveError(f"{role}: {told}")
    raise PaveError(f"{role}: of '{model}' {listed(missing)} {_are(missing)} not {_there()}{_advice(model)}")


def _snapshot(model: HubModel, role: str, hint: str, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    below = "" if model.folder is None else f"{model.folder}/"
    try:
        with hub_or_cache():
            patterns = [f"{below}{pattern}" for pattern in wanted]
            return Path(snapshot_download(model.hub, revision=model.revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise PaveError(f"{role}: '{shortened(model.hub)}' is neither a folder here nor a valid hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if system_problem(error) is not None:
            raise
        is_plain = model == HubModel(hub=model.hub)
        what = f"'{model}' is no folder here{hint} and" if is_plain else f"'{model}'"
        raise PaveError(
            f"{role}: {what} could not be fetched from the hub ({unreached() or reason(error)}); check the name, the "
            "network and HF_HUB_OFFLINE"
        ) from error


def _missing(folder: Path) -> Iterator[str]:
    """The files that a model folder lacks, as far as those that are there name them."""
    if (folder / ADAPTER_CONFIG).is_file():
        yield from [ADAPTER_WEIGHTS] * (not (folder / ADAPTER_WEIGHTS).is_file())
        return
    if not (folder / "config.json").is_file():
        if next(folder.glob(f"*/{ADAPTER_CONFIG}"), None) is not None:  # several adapters by name
            return
        yield "config.json"
    if (folder / SINGLE_FILE).is_file():
        return
    placed = read_json(folder / INDEX_FILE).get("weight_map") if (folder / INDEX_FILE).is_file() else None
    if not isinstance(placed, dict):
        yield SINGLE_FILE
        return
    yield from sorted({str(name) for name in placed.values() if not (folder / str(name)).is_file()})


def _pickled(model: HubModel, folder: Path) -> list[str]:
    """Pickled weights of a model, in the cache or on the hub."""
    found = [file.name for pattern in PICKLED[:2] for file in folder.glob(pattern)]
    if found or not hub_answers():
        return sorted(found)
    from huggingface_hub import HfApi

    names: list[str] = []
    with suppress(Exception):  # of the kinds of whichever HTTP client the hub's library uses; it only adds advice
        names = HfApi().list_repo_files(model.hub, revision=model.revision)
    below = "" if model.folder is None else f"{model.folder}/"
    own = [name.removeprefix(below) for name in names if name.startswith(below)]
    return sorted(name for name in own if name.startswith(("pytorch_model", "adapter_model")) and name.endswith(".bin"))


def _beside(folder: Path, ending: str) -> str:
    there = sorted(file.name for file in folder.glob(f"*{ending}")) if folder.is_dir() else []
    return f"; beside it there are {listed(there)}" if there else ""


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _there() -> str:
    """Where something is missing."""
    return "in the hub's cache" if unreached() else "in the repository"


def _advice(model: HubModel) -> str:
    if not (why := unreached()):
        return "; check the name, the folder and the revision"
    revision = "" if model.revision is None else f" --revision {model.revision}"
    return f" ({why}); where there is a network, run: hf download {model.hub}{revision}"
