"""Models of a configuration without their weights, and what is refused before one is built."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pave_lightning.errors import PaveError, foreign, shortened
from pave_lightning.system.files import file_facts, read_json
from pave_lightning.weights.quantised import quantisation_problem

if TYPE_CHECKING:  # to load the classes of models takes seconds
    from transformers import PretrainedConfig

MOST_LAYERS = 500
MOST_PARTS = 2_000
MOST_LABELS = 100_000
MOST_PARAMETERS = 20_000
LARGEST_SIZE = 2**31 - 1
# Keys that count what a model is built of, and keys of sizes that only look like them.
_LAYERS = re.compile(r"layer|depth(?!wise)|block|stage")
_PARTS = re.compile(r"expert|group|head")
_SIZES = re.compile(r"size|dim|_ids?$|length|position")

_TOO_LARGE: set[tuple[Path, tuple[int, ...]]] = set()


def empty_model(folder: Path, auto_model: str | None = None, device: str = "meta", **changes: Any) -> nn.Module:
    """A model of the folder's configuration, untrained; the meta device needs no memory.

    Args:
        folder: folder of a model.
        auto_model: name of the class of transformers that builds it, such as ``AutoModelForSequenceClassification``;
            where none is given, the class that the configuration names, or else the bare model.
        device: where it is made.
        changes: values of the configuration, such as ``num_labels``, in place of those of the file.

    Raises:
        PaveError: the configuration is missing, broken, or of an architecture that has no such form.
    """
    import transformers

    config = read_config(folder, **changes)
    named = next((name for name in config.architectures or () if hasattr(transformers, name)), None)
    what = f"{folder}: its config.json gives no {form_of(auto_model)}"
    with foreign(what), torch.device(device), _counted_parameters(folder):
        if auto_model is None and named is not None:
            model: nn.Module = auto_class(named)._from_config(config)
        else:
            model = auto_class(auto_model or "AutoModel").from_config(config, trust_remote_code=False)
    return model


def auto_class(auto_model: str) -> Any:
    """A class of transformers by its name."""
    import transformers

    return getattr(transformers, auto_model)


def form_of(auto_model: str | None) -> str:
    """What a class of transformers builds, in words: ``sequence-classification model``."""
    words = re.findall(r"[A-Z][a-z]*|[A-Z]+(?![a-z])", (auto_model or "").removeprefix("AutoModel").removeprefix("For"))
    return f"{'-'.join(words).lower()} model".lstrip()


def read_config(folder: Path, **changes: Any) -> PretrainedConfig:
    """The configuration of a model folder, which runs no code of the folder.

    Args:
        folder: the folder.
        changes: values to use in place of those of the file.

    Raises:
        PaveError: it is missing or broken, describes a model of impossible size, one that brings its own code, or one
            whose weights are quantised.
    """
    file = folder / "config.json"
    settings = read_json(file)
    for key, value in _numbers(settings):
        if value > _most(key):
            raise PaveError(f"{file}: {shortened(key)} is {value:,}, which no model has; is it broken?")
    named = settings.get("architectures") or []
    if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise PaveError(f"{file}: expected a list of names under architectures, found {shortened(str(named))}")
    quantised = quantisation_problem(folder, settings)
    if quantised is not None:
        raise PaveError(f"{folder}: {quantised}")
    from transformers import AutoConfig

    with foreign(f"{folder}: its config.json gives no model", _own_code(settings)):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)
        config.to_dict()
    return config


def _most(key: str) -> int:
    """The largest number that a key of a configuration may hold."""
    if key == "num_labels":
        return MOST_LABELS
    if _SIZES.search(key):
        return LARGEST_SIZE
    return MOST_LAYERS if _LAYERS.search(key) else MOST_PARTS if _PARTS.search(key) else LARGEST_SIZE


def _own_code(settings: Mapping[str, Any]) -> str:
    return "a model that brings code of its own (auto_map) is not supported" if settings.get("auto_map") else ""


def _numbers(settings: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration, and the key that it belongs to."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            # What belongs to a class is an index, whatever the class is called.
            yield from () if name in ("label2id", "id2label") else _numbers(value, name)
    elif isinstance(settings, list):
        for value in settings:
            yield from _numbers(value, key)
    elif isinstance(settings, int):
        yield key, settings


@contextmanager
def _counted_parameters(folder: Path) -> Iterator[None]:
    """Break off the building of a model with more parameters than any file that is read here can hold."""
    refusal = f"{folder}: its config.json asks for more than {MOST_PARAMETERS:,} weights; is it broken?"
    if (folder, configuration_stamp(folder)) in _TOO_LARGE:  # to count them again takes seconds
        raise PaveError(refusal)
    count = itertools.count(1)

    def noted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(count) > MOST_PARAMETERS:
            _TOO_LARGE.add((folder, configuration_stamp(folder)))
            raise PaveError(refusal)

    hook = register_module_parameter_registration_hook(noted)
    try:
        yield
    finally:
        hook.remove()


def configuration_stamp(folder: Path) -> tuple[int, ...]:
    """What changes when the configuration of a folder does; empty where there is none."""
    try:
        return file_facts(folder / "config.json")
    except OSError:
        return ()
