"""The ways in which peft itself combines adapters, for comparison."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import Cost
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.low_rank import LowRankMethod
from pave_lightning.merging.matrices import MatrixOptions
from pave_lightning.merging.methods.robust_merge import unequal_ranks
from pave_lightning.merging.registry import merge_method
from pave_lightning.weights import Parameter, TaskVectors

SVD = "_svd"


class PeftCombinationOptions(MatrixOptions):
    """Options of peft's combinations."""

    combination: Literal[
        "linear",
        "cat",
        "svd",
        "ties",
        "ties_svd",
        "dare_linear",
        "dare_linear_svd",
        "dare_ties",
        "dare_ties_svd",
        "magnitude_prune",
        "magnitude_prune_svd",
    ] = "svd"
    """The combination, by peft's name; those that end in svd merge the products, the others the factors."""
    density: float = Field(default=0.2, gt=0, le=1)
    """Share of elements that survive in the combinations that prune or drop; peft has no default."""
    majority_sign: Literal["total", "frequency"] = "total"
    """Whether the combinations with ties elect signs by the sum of the values or by their count."""
    svd_rank: int | None = Field(default=None, ge=1)
    """Rank of the result of the combinations that end in svd; the largest among the adapters where nothing is said."""
    seed: int | None = None
    """Seed of what is dropped at random; 0 where nothing is said."""


@merge_method("peft")
class PeftCombination(LowRankMethod[PeftCombinationOptions]):
    r"""What ``add_weighted_adapter`` of the library peft makes of the adapters, with weight 1 for each; its own code.

    For a layer with factors :math:`B_t, A_t` and scalings :math:`s_t = \alpha_t / r_t`, rule being peft's function:

    * ``linear``, ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``:
      :math:`B = \mathrm{rule}(\sqrt{s_t}, B_t)` and :math:`A = \mathrm{rule}(\sqrt{s_t}, A_t)`, each for itself, and
      :math:`\Delta = B A`. Faults: the product holds terms :math:`B_t A_u` of different tasks, so that even ``linear``
      is far from the sum of the updates, and it depends on the factors instead of their products. Equal ranks only.
    * ``svd``, ``ties_svd`` and so on: the method on the products :math:`s_t B_t A_t`, cut to ``svd_rank`` singular
      triplets. Fault: what does not fit into that rank is lost.
    * ``cat``: the exact sum of the updates.

    In all of them signs and prunings look at one tensor at a time, not at the model, ties count a sum of zero as
    positive, and linear ones add up: T tasks want a scale of about 1 / T. Tasks that do not adapt a layer are left out
    there. Cost: that of the method on the factors, or one SVD a layer.

    Source: Mangrulkar et al., the library peft, ``add_weighted_adapter`` and ``merge_utils``, called as installed.
    Departures: peft draws from torch's global generator, here the seed and the layer give each layer its own draws, and
    tasks take part in the order of their names; the result is used with scaling 1 even where the first adapter has
    rank-stabilised scaling, with which peft multiplies it by the root of the rank; the SVD is done in float64.
    """

    summary = "the combinations of adapters that peft offers, for comparison"
    source = "Mangrulkar et al. 2022, github.com/huggingface/peft"
    needs = frozenset({Need.LOW_RANK})
    cost = Cost.DECOMPOSITION
    Options = PeftCombinationOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Layers in which the ranks differ, for the combinations that merge factors."""
        yield from super().problems(vectors, evidence)
        if self._rule is not None and not self._of_products:
            yield from unequal_ranks(vectors, every_task=False)

    @property
    def _of_products(self) -> bool:
        combination: str = self.options.combination
        return combination.endswith("svd")

    @property
    def _rule(self) -> str | None:
        """Name of peft's function; None for the combination that needs none."""
        combination: str = self.options.combination
        if combination == "cat":
            return None
        plain = combination.removesuffix(SVD)
        return "task_arithmetic" if plain in ("linear", "svd") else plain

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The product of what peft makes of the factors."""
        pairs = sorted(self.factors(parameter).items())
        products = [left @ right for _, (left, right) in pairs]
        rule = self._rule
        if rule is None:
            return torch.stack(products).sum(dim=0)
        if self._of_products:
            merged = self._combined(rule, products, [1.0] * len(pairs), parameter, "product")
            rank = self.options.svd_rank or max(len(right) for _, (_, right) in pairs)
            left, values, right = torch.linalg.svd(merged, full_matrices=False)
            cut: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
            return cut
        scalings = [self.source_vectors.scaling(task, parameter) for task, _ in pairs]
        # The scaling is part of B here, while peft gives its root to either factor.
        roots = [math.sqrt(abs(scaling)) for scaling in scalings]
        lefts = [left / scaling if scaling else left for (_, (left, _)), scaling in zip(pairs, scalings, strict=True)]
        signed = [math.copysign(root, scaling) for root, scaling in zip(roots, scalings, strict=True)]
        left = self._combined(rule, lefts, roots, parameter, "B")
        product: Tensor = left @ self._combined(rule, [right for _, (_, right) in pairs], signed, parameter, "A")
        return product

    def _combined(
        self, rule: str, tensors: list[Tensor], weights: Sequence[float], parameter: Parameter, what: str
    ) -> Tensor:
        """One call of peft's function."""
        from peft.utils import merge_utils

        arguments: list[Any] = [] if rule == "task_arithmetic" else [self.options.density]
        if rule in ("ties", "dare_ties"):
            arguments.append(self.options.majority_sign)
        name = json.dumps([self.options.seed or 0, parameter.name, what])
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)
            # It warns of a density of 1, which prunes nothing as it should.
            warnings.simplefilter("ignore")
            merged: Tensor = getattr(merge_utils, rule)(tensors, tensors[0].new_tensor(weights), *arguments)
        return merged
