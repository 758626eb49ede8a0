"""From what a recipe says about a model to a folder on this machine."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pave_lightning.errors import PaveError, near, nearest, reason, shortened, system_problem, visible
from pave_lightning.system.files import SCHEME, local_path
from pave_lightning.system.hub import hub_or_cache, unreached
from pave_lightning.weights.adapters import ADAPTER_CONFIG

MOST_LOOKED_AT = 1000
# What peft calls an adapter that it saves in the folder itself.
DEFAULT_ADAPTER = "default"

# What tokenizers keep their vocabulary and settings in; `*.json` and `*.txt` files that may be others' are named.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json"),
    *("vocab*.txt", "merges.txt", "dict.txt", "bpe.codes", "tekken.json", "byte_maps.json", "entity_vocab.json"),
    *("*.model", "*.spm", "*.tiktoken", "*.tokenizer"),
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds files of a tokenizer; ``model.save_pretrained`` alone leaves none."""
    return any(next(folder.glob(pattern), None) is not None for pattern in TOKENIZER_FILES)


def locate_model(reference: str, *, role: str = "model") -> Path:
    """The local folder of a model, downloading it from the hub when it is named by its hub id.

    Args:
        reference: a folder; ``package:NAME/FOLDER`` for a model that an installed Python package carries
            (the package is found, not imported); or a hub id such as ``FacebookAI/roberta-base``.
        role: what the model is, for messages.

    Raises:
        PaveError: nothing is found under that name; the message says where was looked.
    """
    if not reference.strip() or not reference.isprintable():
        raise PaveError(f"{role}: {reference!r} names no model; expected a folder or a hub id")
    folder = local_path(reference)
    if folder.is_dir():
        if not _is_model(folder) and not named_adapters(folder):
            raise PaveError(f"{role}: the folder {folder} has no config.json, so it is no Hugging Face model folder")
        return folder
    if folder.exists():
        raise PaveError(
            f"{role}: {folder} is a file; a model is named by its folder (with config.json and safetensors)"
        )
    if reference.startswith((".", "/", "~", SCHEME)) or reference.count("/") > 1:
        raise PaveError(f"{role}: there is no folder {visible(str(folder))}{_beside(folder)}")
    if "/" in reference and folder.parent.is_dir() and not _was_fetched(reference):
        raise PaveError(
            f"{role}: there is no folder {folder}{_beside(folder)} ({folder.parent} is a folder here, so it was not "
            f"looked for on the hub; where it is a hub id, run: hf download {reference})"
        )
    return _from_hub(reference, role)


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
    """The model folder beside a missing one whose name is most like it."""
    try:
        there = [child.name for child in islice(folder.parent.iterdir(), MOST_LOOKED_AT) if child.is_dir()]
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


def _from_hub(reference: str, role: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.safetensors", "*.txt", *TOKENIZER_FILES]
        with hub_or_cache():
            return Path(snapshot_download(reference, allow_patterns=wanted))
    except HFValidationError as error:
        raise PaveError(f"{role}: '{shortened(reference)}' is neither a folder here nor a valid hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if system_problem(error) is not None:
            raise
        raise PaveError(
            f"{role}: '{reference}' is no folder here{_beside(Path(reference))} and could not be fetched from the hub "
            f"({unreached() or reason(error)}); check the name, the network and HF_HUB_OFFLINE"
        ) from error
