"""What a model's configuration says about its weights, without loading any."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from pave_lightning.errors import PaveError, foreign, shortened
from pave_lightning.system.files import file_facts, read_json
from pave_lightning.weights.buffers import BufferKind, buffer_kinds
from pave_lightning.weights.checkpoint import Checkpoint
from pave_lightning.weights.embeddings import token_embeddings
from pave_lightning.weights.parameters import Parameter, ParameterKind, kind_of
from pave_lightning.weights.positions import longest_sequence
from pave_lightning.weights.ties import tied_names

MOST_LAYERS = 500
MOST_PARTS = 2_000
MOST_LABELS = 100_000
MOST_PARAMETERS = 20_000
LARGEST_SIZE = 2**31 - 1
# Keys that count what a model is built of, and keys of sizes that only look like them.
_LAYERS = re.compile(r"layer|depth|block|stage")
_PARTS = re.compile(r"expert|group|head")
_SIZES = re.compile(r"size|dim|_ids?$|length|position")


_TOO_LARGE: set[tuple[Path, tuple[int, ...]]] = set()


@dataclass(frozen=True)
class Architecture:
    """The backbone of a sequence or image classification model, built on the meta device: shapes and kinds, no weights.

    Attributes:
        prefix: name under which the whole model holds its backbone (``bert``, ``roberta``, ...).
        parameters: the backbone's parameters by name, in the order of the modules.
        stored_names: names under which checkpoints store parameters of the backbone -> names of these parameters, where
            the two differ (transformers renames the weights of ViT when it loads and saves them).
        token_embeddings: names of the weight that has one row a token; several where it is shared, none where there is
            no such table.
        head: names of the parameters outside the backbone.
        config: the configuration, as plain values and with its defaults.
        obsolete: patterns of tensors that older releases of transformers stored and the model no longer has.
        tied: other names under which checkpoints may store a backbone tensor -> the name that it goes by here.
        buffers: kinds of the backbone's buffers, by the names under which checkpoints store them.
        positions: longest sequence in tokens; None where no table of positions limits it.
    """

    prefix: str
    parameters: dict[str, Parameter]
    head: frozenset[str]
    config: dict[str, Any] = field(repr=False)
    obsolete: tuple[str, ...] = ()
    stored_names: Mapping[str, str] = field(default_factory=dict, repr=False)
    tied: Mapping[str, str] = field(default_factory=dict, repr=False)
    buffers: Mapping[str, BufferKind] = field(default_factory=dict, repr=False)
    token_embeddings: tuple[str, ...] = ()
    positions: int | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> Architecture:
        """Read ``config.json`` of a model folder; remembered until the file changes.

        Raises:
            PaveError: the configuration is missing, broken, or of an architecture that has no classification form.
        """
        return _architecture(folder, _stamp(folder))

    @classmethod
    def _of_folder(cls, folder: Path) -> Architecture:
        model = empty_classifier(folder)
        backbone = backbone_of(model)
        prefix = f"{model.base_model_prefix}."
        kinds: dict[str, tuple[ParameterKind, int | None]] = {}
        for module_name, module in backbone.named_modules():
            for attribute, _ in module.named_parameters(recurse=False):
                name = f"{module_name}.{attribute}" if module_name else attribute
                kinds[name] = kind_of(module, attribute)
        parameters = {
            name: Parameter(name, kinds[name][0], tuple(tensor.shape), kinds[name][1])
            for name, tensor in backbone.named_parameters()
        }
        renamed = {
            stored.removeprefix(prefix): name.removeprefix(prefix)
            for stored, name in stored_names(model).items()
            if name.startswith(prefix)
        }
        files_call = {name: stored for stored, name in renamed.items()}
        config = read_config(folder).to_dict()
        return cls(
            prefix=str(model.base_model_prefix),
            parameters=parameters,
            head=frozenset(name for name, _ in model.named_parameters() if not name.startswith(prefix)),
            config=config,
            obsolete=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
            stored_names=renamed,
            tied={files_call.get(name, name): files_call.get(own, own) for name, own in tied_names(backbone).items()},
            buffers={files_call.get(name, name): kind for name, kind in buffer_kinds(backbone).items()},
            token_embeddings=tuple(token_embeddings(backbone)),
            positions=longest_sequence(backbone, config),
        )

    @property
    def vocabulary(self) -> int | None:
        """Rows of the token embedding; None where the model reads no tokens."""
        found = [self.parameters[name] for name in self.token_embeddings if name in self.parameters]
        rows = found[0].shape[0] if found else self.config.get("vocab_size")
        return rows if isinstance(rows, int) else None

    @property
    def intended_positions(self) -> int | None:
        """The longest sequence that the configuration speaks of; None where it names none.

        Only worth a remark: models without a table of positions read longer ones as well.
        """
        known = self.config.get("max_position_embeddings")
        return known if isinstance(known, int) and known > 0 else None

    def describe(self, name: str, shape: tuple[int, ...]) -> Parameter:
        """The parameter of that name; a stored tensor that the model class does not know is of kind other."""
        known = self.parameters.get(name)
        if known is not None:
            return known
        renamed = self.parameters.get(self.stored_names.get(name, ""))
        if renamed is not None:
            return replace(renamed, name=name, module=renamed.layer)
        return Parameter(name, ParameterKind.OTHER, shape)

    def ignores(self, name: str) -> bool:
        """Whether a stored tensor of that name means nothing to the model (the causal masks of old GPT-2 files)."""
        return name not in self.parameters and any(re.search(pattern, name) for pattern in self.obsolete)

    def averages(self, name: str) -> bool:
        """Whether a stored tensor of that name is a running statistic."""
        return self.buffers.get(name) is BufferKind.STATISTICS

    def merges(self, name: str) -> bool:
        """Whether a stored floating-point tensor of that name is a weight, and no buffer."""
        return name not in self.buffers and not self.ignores(name)

    def compares(self, name: str) -> bool:
        """Whether base and experts must both store a floating-point tensor of that name, in one shape."""
        return self.merges(name) or self.averages(name)

    def checkpoint(self, folder: Path) -> Checkpoint:
        """The weights of a model folder of this architecture, in which tied tensors count once."""
        return Checkpoint(folder, self.prefix, self.tied)


@lru_cache(maxsize=16)
def _architecture(folder: Path, stamp: tuple[int, ...]) -> Architecture:
    return Architecture._of_folder(folder)


def _stamp(folder: Path) -> tuple[int, ...]:
    """What changes when the configuration of a folder does; empty where there is none."""
    try:
        return file_facts(folder / "config.json")
    except OSError:
        return ()


def lies_in(name: str, modules: Iterable[str]) -> bool:
    """Whether a module, by its dotted name, is one of these modules or lies inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def empty_classifier(folder: Path, device: str = "meta", **changes: Any) -> nn.Module:
    """A classification model of the folder's configuration, untrained; the meta device needs no memory.

    Other values of the configuration, such as ``num_labels``, may be given instead of the folder's own.

    Configurations of text models, and of models that read several things, give a sequence classifier; those of models
    that classify images only, such as ViT, an image classifier.

    Raises:
        PaveError: the configuration is missing, broken, or of an architecture that has neither form.
    """
    kind = "sequence-classification"
    config = read_config(folder, **changes)
    builder = AutoModelForSequenceClassification
    if (
        type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    ):
        kind, builder = "image-classification", AutoModelForImageClassification
    with foreign(f"{folder}: its config.json gives no {kind} model"), torch.device(device), _counted_parameters(folder):
        model: nn.Module = builder.from_config(config, trust_remote_code=False)
    return model


def read_config(folder: Path, **changes: Any) -> PretrainedConfig:
    """The configuration of a model folder, which runs no code of the folder.

    Args:
        folder: the folder.
        changes: values to use in place of those of the file.

    Raises:
        PaveError: it is missing or broken, describes a model of impossible size, or one that brings its own code.
    """
    file = folder / "config.json"
    settings = read_json(file)
    for key, value in _numbers(settings):
        if value > _most(key):
            raise PaveError(f"{file}: {shortened(key)} is {value:,}, which no model has; is it broken?")
    with foreign(f"{folder}: its config.json gives no sequence-classification model", _own_code(settings)):
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
    if (folder, _stamp(folder)) in _TOO_LARGE:  # to count them again takes seconds
        raise PaveError(refusal)
    count = itertools.count(1)

    def noted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(count) > MOST_PARAMETERS:
            _TOO_LARGE.add((folder, _stamp(folder)))
            raise PaveError(refusal)

    hook = register_module_parameter_registration_hook(noted)
    try:
        yield
    finally:
        hook.remove()


def stored_names(model: nn.Module) -> dict[str, str]:
    """Name in a checkpoint -> name in the model, for tensors that transformers renames when it loads and saves."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    weights = {name: tensor.detach() for name, tensor in tensors}
    names = {id(tensor): name for name, tensor in weights.items()}
    # Tensors that are merged or split on the way are other tensors afterwards, and have no single name.
    stored = {name: names.get(id(tensor)) for name, tensor in revert_weight_conversion(model, dict(weights)).items()}
    return {name: own for name, own in stored.items() if own is not None and own != name}


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a Hugging Face model below its head."""
    backbone = getattr(model, str(model.base_model_prefix), None)
    if not isinstance(backbone, nn.Module):
        raise PaveError(f"{type(model).__name__} has no backbone named '{model.base_model_prefix}'")
    return backbone
