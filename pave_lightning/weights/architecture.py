"""What a model's configuration says about its weights, without loading any."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from pave_lightning.errors import PaveError
from pave_lightning.weights.parameters import Parameter, ParameterKind, kind_of


@dataclass(frozen=True)
class Architecture:
    """The backbone of a sequence-classification model, built on the meta device: shapes and kinds, no weights.

    Attributes:
        prefix: name under which the whole model holds its backbone (``bert``, ``roberta``, ...).
        parameters: the backbone's parameters by name, in the order of the modules.
        head: names of the parameters outside the backbone.
        config: the configuration, as plain values and with its defaults.
        obsolete: patterns of tensors that older releases of transformers stored and the model no longer has.
    """

    prefix: str
    parameters: dict[str, Parameter]
    head: frozenset[str]
    config: dict[str, Any] = field(repr=False)
    obsolete: tuple[str, ...] = ()

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
    def vocabulary(self) -> int:
        """Rows of the token embedding."""
        return int(self.config["vocab_size"])

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
        return known if known is not None else Parameter(name, ParameterKind.OTHER, shape)

    def ignores(self, name: str) -> bool:
        """Whether a stored tensor of that name means nothing to the model (the causal masks of old GPT-2 files)."""
        return name not in self.parameters and any(re.search(pattern, name) for pattern in self.obsolete)


def empty_classifier(folder: Path, device: str = "meta") -> nn.Module:
    """A sequence-classification model of the folder's configuration, untrained; the meta device needs no memory."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device(device):
            model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PaveError(f"{folder}: its config.json gives no sequence-classification model: {reason}") from error
    return model


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a Hugging Face model below its head."""
    backbone = getattr(model, str(model.base_model_prefix))
    if not isinstance(backbone, nn.Module):
        raise PaveError(f"{type(model).__name__} has no backbone named '{model.base_model_prefix}'")
    return backbone
