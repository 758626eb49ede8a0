"""What a model's configuration says about its weights, without loading any."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from pave_lightning.errors import PaveError
from pave_lightning.weights.parameters import Parameter, ParameterKind, kind_of


@dataclass(frozen=True)
class Architecture:
    """The backbone of a sequence or image classification model, built on the meta device: shapes and kinds, no weights.

    Attributes:
        prefix: name under which the whole model holds its backbone (``bert``, ``roberta``, ...).
        parameters: the backbone's parameters by name, in the order of the modules.
        stored_names: names under which checkpoints store parameters of the backbone -> names of these parameters, where
            the two differ (transformers renames the weights of ViT when it loads and saves them).
        head: names of the parameters outside the backbone.
        config: the configuration, as plain values and with its defaults.
        obsolete: patterns of tensors that older releases of transformers stored and the model no longer has.
    """

    prefix: str
    parameters: dict[str, Parameter]
    head: frozenset[str]
    config: dict[str, Any] = field(repr=False)
    obsolete: tuple[str, ...] = ()
    stored_names: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of_folder(cls, folder: Path) -> Architecture:
        """Read ``config.json`` of a model folder.

        Raises:
            PaveError: the configuration is missing, broken, or of an architecture that has no classification form.
        """
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
        return cls(
            prefix=str(model.base_model_prefix),
            parameters=parameters,
            head=frozenset(name for name, _ in model.named_parameters() if not name.startswith(prefix)),
            config=AutoConfig.from_pretrained(folder).to_dict(),
            obsolete=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
            stored_names={
                stored.removeprefix(prefix): name.removeprefix(prefix)
                for stored, name in stored_names(model).items()
                if name.startswith(prefix)
            },
        )

    @property
    def labels(self) -> dict[int, str]:
        """Names of the head's outputs by index."""
        named = self.config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
        return {int(index): str(name) for index, name in sorted(named.items(), key=lambda item: int(item[0]))}

    @property
    def outputs(self) -> int:
        """Number of the head's outputs."""
        return len(self.labels)

    @property
    def padding(self) -> int | None:
        """Index of the padding token; None where the configuration names none."""
        index = self.config.get("pad_token_id")
        return index if isinstance(index, int) else None

    @property
    def vocabulary(self) -> int | None:
        """Rows of the token embedding; None where the model reads no tokens."""
        rows = self.config.get("vocab_size")
        return rows if isinstance(rows, int) else None

    @property
    def positions(self) -> int | None:
        """Longest sequence in tokens; None where it is not limited by a table of positions."""
        table = self.parameters.get("embeddings.position_embeddings.weight")
        if table is None:
            known = self.config.get("max_position_embeddings") or self.config.get("n_positions")
            return int(known) if isinstance(known, int) else None
        # RoBERTa and its kin count positions from behind the padding index.
        offset = (self.padding or 0) + 1 if "roberta" in str(self.config.get("model_type", "")) else 0
        return table.shape[0] - offset

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
    try:
        config = AutoConfig.from_pretrained(folder, **changes)
        builder = AutoModelForSequenceClassification
        if (
            type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
            and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        ):
            kind, builder = "image-classification", AutoModelForImageClassification
        with torch.device(device):
            model: nn.Module = builder.from_config(config)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PaveError(f"{folder}: its config.json gives no {kind} model: {reason}") from error
    return model


def stored_names(model: nn.Module) -> dict[str, str]:
    """Name in a checkpoint -> name in the model, for parameters that transformers renames when it loads and saves."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
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
