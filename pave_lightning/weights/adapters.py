"""The low-rank factors of a peft adapter: what a LoRA layer adds to its weight, as an exact product."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pave_lightning.errors import PaveError, shortened
from pave_lightning.system.files import read_json
from pave_lightning.system.patterns import fits_pattern, pattern_problem
from pave_lightning.weights.checkpoint import (
    Checkpoint,
    StoredTensor,
    convert_advice,
    is_finite_in_float32,
    stored_tensors,
)
from pave_lightning.weights.parameters import Parameter

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_ADAPTER = "adapter_model.bin"
ADAPTER_FOLDER = "adapter"

LARGEST_RANK = 2**31 - 1
LARGEST_ALPHA = 1e6

# What peft calls the model that it wraps.
WRAPPED = "base_model.model."
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
# Low-rank updates of tables that are looked up, and biases beside a factor: the expert's own weights hold both.
_ELSEWHERE = re.compile(r".+\.(lora_embedding_[AB]|lora_B\.bias)")
# Initialisations that take their starting product out of the base's weights.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq")
# Settings with which a layer adds something else than B A to its weight, or not always.
_OTHER_UPDATES = {
    "use_dora": "DoRA rescales the updated weight",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "BD-LoRA has factors of blocks",
    "kasa_config": "KaSA cuts the base's weight",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow chooses among adapters for each token",
    "alora_invocation_tokens": "activated LoRA adds its update to some tokens only",
    "layer_replication": "layers of the base are repeated",
    "target_parameters": "parameters are adapted instead of layers",
}


def adapter_folder(expert: Path) -> Path | None:
    """Where an expert's adapter lies: in its folder ``adapter``, or in the expert's folder itself; None if nowhere."""
    return next((f for f in (expert / ADAPTER_FOLDER, expert) if (f / ADAPTER_CONFIG).is_file()), None)


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer of an adapter.

    Attributes:
        left: where B is stored, ``(d_out, r)``; with trailing ones for convolutions.
        right: where A is stored, ``(r, d_in)``; with the kernel's axes for convolutions.
        scaling: what the update is multiplied with, alpha / r, or alpha / sqrt(r) with rank-stabilised scaling.
    """

    left: StoredTensor
    right: StoredTensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rank of the update, at most."""
        return self.right.shape[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the update."""
        return self.left.shape[0], math.prod(self.right.shape[1:])


class Adapter:
    """The low-rank updates of a peft adapter's layers; headers are read at once, factors when they are asked for.

    peft keeps A as ``(r, d_in)`` and B as ``(d_out, r)`` whatever the layer, and transposes their product where a layer
    stores its weight as ``d_in x d_out`` (the Conv1D of GPT-2). So B A is the task vector as ``(d_out, d_in)``.

    Only LoRA whose update is the product of its two factors is read. Other kinds of adapters have no such factors; the
    reason is kept, and nothing else speaks against using the expert's weights.

    Args:
        folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        prefix: the architecture's backbone prefix, without the dot.

    Attributes:
        layers: adapted layers of the backbone by their names inside it; none where ``refusal`` says why.
        refusal: why this adapter has no low-rank factors; None where it has.

    Raises:
        PaveError: the adapter cannot be read, or its factors do not fit each other or its configuration.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        settings = adapter_settings(folder)
        stored = _header(folder / ADAPTER_WEIGHTS)
        self.refusal = _refusal(settings, stored)
        self.layers = {} if self.refusal else _of_backbone(dict(self._read_layers(settings, stored)), prefix)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """B with the scaling in it, ``(d_out, r)``, and A, ``(r, d_in)``, both float64.

        Raises:
            PaveError: a factor holds NaN or infinity.
        """
        found = self.layers[layer]
        left, right = (Checkpoint.read(stored).double() for stored in (found.left, found.right))
        if not (is_finite_in_float32(left) and is_finite_in_float32(right)):
            raise PaveError(f"{self.folder}: the adapter of {layer} holds NaN or infinity")
        return left.reshape(-1, found.rank) * found.scaling, right.reshape(found.rank, -1)

    def _read_layers(
        self, settings: Mapping[str, Any], stored: Mapping[str, StoredTensor]
    ) -> Iterator[tuple[str, AdaptedLayer]]:
        sides: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in stored.items():
            match = _FACTOR.fullmatch(name.removeprefix(WRAPPED))
            if match:
                sides.setdefault(match["layer"].replace(".base_layer", ""), {})[match["side"]] = tensor
        for layer, pair in sorted(sides.items()):
            if set(pair) != {"A", "B"}:
                raise PaveError(f"{self.folder}: the adapter of {layer} has only one of its two factors; save it again")
            rank, scaling = _scaling(settings, layer)
            left, right = pair["B"], pair["A"]
            if len(left.shape) < 2 or len(right.shape) < 2 or not (left.is_floating and right.is_floating):
                raise PaveError(f"{self.folder}: the factors of {layer} are no matrices of numbers; save it again")
            if left.shape[1] != rank or right.shape[0] != rank:
                raise PaveError(
                    f"{self.folder}: the factors of {layer} are {list(left.shape)} and {list(right.shape)}, but its "
                    f"{ADAPTER_CONFIG} gives them rank {rank}"
                )
            yield layer, AdaptedLayer(left, right, scaling)


def misfit(layer: AdaptedLayer, parameter: Parameter) -> str | None:
    """Why an adapted layer cannot be that of a matrix weight; None if it can."""
    if layer.matrix_shape == parameter.matrix_shape:
        return None
    return (
        f"the adapter of {parameter.layer} is for a weight of {list(layer.matrix_shape)}, but {parameter.name} is "
        f"{list(parameter.matrix_shape)}"
    )


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What peft has written down of an adapter.

    Raises:
        PaveError: ``adapter_config.json`` is missing or broken.
    """
    return read_json(folder / ADAPTER_CONFIG, "save the adapter again")


def _header(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise PaveError(absent_adapter(file.parent))
    return stored_tensors(file, "save the adapter again")


def absent_adapter(folder: Path) -> str:
    """What to say of an adapter without safetensors."""
    if (folder / PICKLED_ADAPTER).is_file():
        return convert_advice(str(folder), [PICKLED_ADAPTER], str(folder))
    return f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter again"


def _refusal(settings: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> str | None:
    """Why the updates of an adapter are no products of stored factors; None if they are."""
    kind = str(settings.get("peft_type", "unknown")).upper()
    if kind != "LORA":
        return f"its adapter is of kind {kind}, and only LORA has low-rank factors; peft's save_as_lora may convert it"
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGE_THE_BASE):
        return (
            f"its adapter was initialised with {start}, which changes the base's weights; save it once more with "
            "path_initial_model_for_weight_conversion"
        )
    for key, why in _OTHER_UPDATES.items():
        if settings.get(key):
            return f"its adapter has the setting {key}: {why}, so the update is not the product of two factors"
    for name in stored:
        own = name.removeprefix(WRAPPED)
        if ".lora_" in own and not _FACTOR.fullmatch(own) and not _ELSEWHERE.fullmatch(own):
            return f"its adapter holds {own}, of which nothing is known here"
    if not any(_FACTOR.fullmatch(name.removeprefix(WRAPPED)) for name in stored):
        return "its adapter has no low-rank factors of any layer"
    return None


def _scaling(settings: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """Rank and scaling of a layer, by the patterns of the configuration; the first that matches counts, as in peft."""
    rank = by_pattern(settings.get("rank_pattern"), layer, settings.get("r", 8))
    alpha = by_pattern(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", 8))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= LARGEST_RANK:
        raise PaveError(f"{ADAPTER_CONFIG} gives {layer} the rank {shortened(repr(rank))}; save the adapter again")
    if not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST_ALPHA:
        raise PaveError(f"{ADAPTER_CONFIG} gives {layer} the alpha {shortened(repr(alpha))}; save the adapter again")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    """What a pattern of a configuration says of a layer, as peft reads it: the first that fits the name's end counts.

    Args:
        patterns: a mapping of regular expressions, or None.
        layer: name of the layer in the whole model.
        default: for layers that none fits.

    Raises:
        PaveError: it is no such mapping.
    """
    if patterns and not isinstance(patterns, dict):
        raise PaveError(f"{ADAPTER_CONFIG} holds a pattern that is no mapping of layers; save the adapter again")
    for key in patterns or ():
        if problem := pattern_problem(key):
            raise PaveError(f"{ADAPTER_CONFIG} holds a pattern of layers that {problem}")
    return next((value for key, value in (patterns or {}).items() if fits_pattern(key, layer)), default)


def _of_backbone(layers: Mapping[str, AdaptedLayer], prefix: str) -> dict[str, AdaptedLayer]:
    """The layers by their names inside the backbone; those of the head are left out."""
    start = f"{prefix}."
    # Adapters that were trained on the bare backbone know no prefix.
    if not any(name.startswith(start) for name in layers):
        return dict(layers)
    return {name.removeprefix(start): layer for name, layer in layers.items() if name.startswith(start)}
