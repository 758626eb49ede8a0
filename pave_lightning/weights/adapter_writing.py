"""Writing changes of a base as one LoRA adapter, by truncated singular value decompositions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pave_lightning.errors import listed
from pave_lightning.subspace.factorisation import leading_triplets
from pave_lightning.system.files import write_tensors
from pave_lightning.weights.adapters import ADAPTER_WEIGHTS, WRAPPED
from pave_lightning.weights.backbones import lies_in
from pave_lightning.weights.parameters import Parameter, ParameterKind

MOST_TOLD = 40


@dataclass(frozen=True)
class AdapterFit:
    """How near an adapter comes to the weights that it was made of.

    Attributes:
        rank: the largest rank of a layer that was allowed.
        layers: for each layer with factors, by its name in the model, the norm of what is missing of its update,
            divided by the norm of the update (Frobenius).
        left_out: parameters whose update is in the adapter at no rank (norms, biases, embeddings), by name, each with
            the norm of its update divided by that of the whole update.
        error: the norm of all that is missing, divided by that of the whole update.
        kept_whole: parameters that are in the adapter as they are in the merged model.
    """

    rank: int
    layers: dict[str, float]
    left_out: dict[str, float]
    error: float
    kept_whole: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """What was lost, in words, one line each."""
        worst = max(self.layers, key=lambda name: self.layers[name], default=None)
        yield f"relative error of the whole update: {self.error:.2%} (Frobenius norm)"
        if worst is not None:
            middle = sorted(self.layers.values())[len(self.layers) // 2]
            yield (
                f"of the {len(self.layers)} layers with factors of rank {self.rank} at most: median {middle:.2%}, "
                f"largest {self.layers[worst]:.2%} ({worst})"
            )
        if self.kept_whole:
            yield f"kept whole: {listed(self.kept_whole, MOST_TOLD)}"
        if self.left_out:
            share = math.sqrt(sum(one**2 for one in self.left_out.values()))
            names = sorted(self.left_out, key=lambda name: -self.left_out[name])
            yield (
                f"left out, since low-rank factors cannot hold it, {share:.2%} of the update's norm: "
                f"{listed(names, MOST_TOLD)}"
            )


class AdapterWriter:
    """Collects what an adapter holds of the updates of a model's parameters, and writes it as peft reads it.

    Memory is that of the adapter and of one parameter.

    Args:
        rank: the largest rank of a layer.
        keep_whole: whether norms, embeddings and biases, which have no low-rank factors, are kept as they are.
    """

    def __init__(self, rank: int, *, keep_whole: bool = False) -> None:
        self.rank, self.keep_whole = rank, keep_whole
        self._tensors: dict[str, Tensor] = {}
        self._ranks: dict[str, int] = {}
        self._saved: list[str] = []
        self._unchanged: dict[str, list[tuple[Parameter, Tensor]]] = {}
        self._biases: dict[str, Tensor] = {}
        self._transposed = False
        self._kept_whole: list[str] = []
        self._errors: dict[str, float] = {}
        self._left_out: dict[str, float] = {}
        self._squares = self._missing = 0.0

    @property
    def has_update(self) -> bool:
        """Whether anything differs from the base."""
        return self._squares > 0

    @property
    def has_factors(self) -> bool:
        """Whether some layer has factors, without which there is no adapter."""
        return bool(self._ranks)

    def add(self, parameter: Parameter, merged: Tensor, base: Tensor) -> None:
        """Add a parameter.

        Args:
            parameter: which one, by its name in the model that the adapter is for.
            merged: its new value, of its shape, any float dtype.
            base: that of the base.
        """
        name, update = parameter.name, merged.double() - base.double()
        square = float(update.square().sum())
        self._squares += square
        if square and parameter.is_matrix and name.endswith(".weight"):
            missing = self._add_factors(parameter, update)
            self._errors[parameter.layer] = math.sqrt(missing / square)
            self._missing += missing
        elif self.keep_whole and parameter.kind is ParameterKind.BIAS:
            if square:
                self._kept_whole.append(name)
                self._biases[parameter.layer] = merged.float().contiguous()
        elif self.keep_whole and parameter.kind is not ParameterKind.OTHER and not parameter.is_matrix:
            module = parameter.layer  # of which peft wants all parameters
            self._unchanged.setdefault(module, []).append((parameter, merged.float().contiguous()))
            if square:
                self._kept_whole.append(name)
                self._saved.append(module)
        elif square:
            self._left_out[name] = math.sqrt(square)
            self._missing += square

    def add_module(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Add a module whole, such as a head.

        Args:
            name: its name in the model that the adapter is for.
            tensors: its parameters, by their names in that model.
        """
        self._saved.append(name)
        self._tensors |= {f"{WRAPPED}{own}": tensor.float().contiguous() for own, tensor in tensors.items()}

    def fit(self) -> AdapterFit:
        """How near what has been added comes to the weights that it was made of."""
        whole = math.sqrt(self._squares)
        left_out = {name: norm / whole for name, norm in self._left_out.items()}
        error = math.sqrt(self._missing) / whole if whole else 0.0
        return AdapterFit(self.rank, self._errors, left_out, error, tuple(self._kept_whole))

    def write(self, folder: Path, base: str, task_type: str | None, modules: Iterable[str]) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

        Args:
            folder: an existing folder.
            base: how the base is named.
            task_type: what peft calls what the model is for; None for nothing in particular.
            modules: names of all modules of the model.
        """
        from peft import LoraConfig, TaskType

        names, tensors = list(modules), dict(self._tensors)
        for layer, bias in self._biases.items():
            inner = f"{layer}.base_layer" if layer in self._ranks else layer
            tensors[f"{WRAPPED}{inner}.bias"] = bias
        for module, parameters in self._unchanged.items():
            if any(module.endswith(saved) for saved in self._saved):  # as peft looks for them
                for parameter, value in parameters:
                    tensors[f"{WRAPPED}{module}.{parameter.name.rpartition('.')[2]}"] = value
        # Names count as endings, which here must mean no other module.
        ambiguous = any(m.endswith(f".{name}") for name in self._ranks for m in names if m not in self._ranks)
        exact = "|".join(re.escape(name) for name in sorted(self._ranks))
        other = {name: found for name, found in sorted(self._ranks.items()) if found != self.rank}
        saved = [one for one in sorted(set(self._saved)) if not lies_in(one, set(self._saved) - {one})]
        LoraConfig(
            task_type=None if task_type is None else TaskType(task_type),
            base_model_name_or_path=base,
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=exact if ambiguous else sorted(self._ranks),
            rank_pattern=other,
            alpha_pattern=dict(other),
            modules_to_save=[name for name in saved if not lies_in(name, [one for one in saved if one != name])]
            or None,
            bias="all" if self._biases else "none",
            fan_in_fan_out=self._transposed,
            inference_mode=True,
        ).save_pretrained(str(folder))
        write_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})

    def _add_factors(self, parameter: Parameter, update: Tensor) -> float:
        """Add the factors of a layer; gives the square of the norm of what they miss."""
        matrix = parameter.as_matrix(update)
        triplets = leading_triplets(matrix, self.rank)
        roots = triplets.values.sqrt()
        left, right = (triplets.left * roots).float(), (roots[:, None] * triplets.right).float()
        if len(roots):
            layer = parameter.layer
            kernel = parameter.shape[2:] if parameter.kind is ParameterKind.CONVOLUTION else ()
            shape = (len(roots), -1, *kernel) if kernel else right.shape
            self._ranks[layer] = len(roots)
            self._transposed |= parameter.input_axis == 0
            self._tensors[f"{WRAPPED}{layer}.lora_A.weight"] = right.reshape(shape).contiguous()
            ones = (1,) * len(kernel)
            self._tensors[f"{WRAPPED}{layer}.lora_B.weight"] = left.reshape(*left.shape, *ones).contiguous()
        return float((matrix - left.double() @ right.double()).square().sum())
