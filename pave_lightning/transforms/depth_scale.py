"""Scaling by depth, by kind of parameter and by name: less of the task vectors in shallow blocks, or in embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pave_lightning.config import Section, unless_wrong
from pave_lightning.merging import Evidence
from pave_lightning.merging.selection import pattern_problems
from pave_lightning.purification.options import Compute
from pave_lightning.transforms.base import Transform, vector_transform
from pave_lightning.transforms.scaled import ScaledTaskVectors
from pave_lightning.weights import Parameter, TaskVectors

# Path and number of the outermost block that a parameter lies in.
BLOCK = re.compile(r"(.*?)(?:^|\.)(\d+)\.")


Kind = Annotated[
    Literal["linear", "convolution", "embedding", "norm scale", "norm shift", "bias", "other"],
    BeforeValidator(lambda name: name.replace("_", " ") if isinstance(name, str) else name),
]


class DepthScaleOptions(Section):
    """Options of depth scaling."""

    first: float = 1.0
    """Factor of the first block, and of everything that lies in no block."""
    last: float = 1.0
    """Factor of the last block; those between them lie on a straight line."""
    kinds: dict[Kind, float] = Field(default={}, exclude_if=lambda value: not value)
    """Factors of kinds of parameters, besides that of the depth: linear, convolution, embedding, norm scale, norm
    shift, bias and other, such as {embedding: 0.5, norm scale: 0}."""
    layers: dict[str, float] = Field(default={}, exclude_if=lambda value: not value)
    """Factors of parameters whose whole names match a pattern, besides the others; of several patterns the first one
    that matches counts. * stands for any characters: {"*.attention.*": 0.7, "*.mlp.*": 0.3}."""

    @property
    def by_depth(self) -> bool:
        """Whether blocks have factors of their own."""
        return (self.first, self.last) != (1, 1)

    @model_validator(mode="after")
    def _scales_something(self) -> DepthScaleOptions:
        idle = not (self.by_depth or self.kinds or self.layers)
        return unless_wrong(self, ["it scales nothing; give factors, such as {first: 0.5}"] if idle else [])


@vector_transform("depth_scale")
class DepthScale(Transform[DepthScaleOptions]):
    r"""Multiply the task vectors of block :math:`l` of :math:`L` with :math:`a + (b - a) \, l / (L - 1)`, from 0 on.

    :math:`a` is the option ``first``, :math:`b` is ``last``. Blocks are the numbered modules that enclose a parameter,
    the outermost ones, where there are two or more beside each other; an encoder and a decoder are counted each for
    itself. Parameters in no block (embeddings, poolers) are multiplied with ``first``, as in the published code.
    Kinds of parameters and names may have factors of their own, which are multiplied with that of the depth.

    Source: Wang et al., *LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging*, ICLR 2025
    (arXiv 2410.17146). Departure: there what was merged is scaled; here the task vectors are, before they are merged,
    which is the same for methods that are linear in each parameter. The published default for one expert leaves the
    last block as it is, as ``last: 1`` does.
    """

    summary = "scale task vectors linearly in the depth of the block, by kind of parameter and by name"
    source = "Wang et al. 2025, arXiv 2410.17146"
    keeps_factors = True
    Options = DepthScaleOptions

    def problems(self, vectors: TaskVectors) -> Iterator[str]:
        """The model has no blocks, or no parameters of a kind or name."""
        names = [parameter.name for parameter in vectors.parameters]
        if names:
            yield from (f"layers: {problem}" for problem in pattern_problems(self.options.layers, names))
            there = {str(parameter.kind) for parameter in vectors.parameters}
            yield from (
                f"kinds: the model has no parameter of kind '{kind}'" for kind in self._kinds if kind not in there
            )
        if self.options.by_depth and names and not relative_depths(vectors.parameters):
            yield "the model has no numbered blocks, two or more beside each other, whose depth could be told"

    def apply(self, vectors: TaskVectors, evidence: Evidence, compute: Compute) -> ScaledTaskVectors:
        """The task vectors, scaled by depth."""
        depths = relative_depths(vectors.parameters)
        factors = {p.name: self._factor(p, depths.get(p.name, 0.0)) for p in vectors.parameters}
        return ScaledTaskVectors(vectors, lambda task, parameter: factors[parameter.name])

    @property
    def _kinds(self) -> dict[str, float]:
        return {str(kind): factor for kind, factor in self.options.kinds.items()}

    def _factor(self, parameter: Parameter, depth: float) -> float:
        by_depth = self.options.first + (self.options.last - self.options.first) * depth
        of_layer = next((f for p, f in self.options.layers.items() if fnmatchcase(parameter.name, p)), 1.0)
        return by_depth * self._kinds.get(str(parameter.kind), 1.0) * of_layer


def relative_depths(parameters: Iterable[Parameter]) -> dict[str, float]:
    """Depth of the block that each parameter lies in, from 0 (the first) to 1 (the last), by the parameter's name.

    Parameters that lie in no block, or in one that stands alone, are left out.

    Example:
        >>> from pave_lightning.weights import ParameterKind
        >>> names = ["h.0.w", "h.1.w", "h.2.w", "wte.weight"]
        >>> relative_depths([Parameter(name, ParameterKind.OTHER, (2,)) for name in names])
        {'h.0.w': 0.0, 'h.1.w': 0.5, 'h.2.w': 1.0}
    """
    found = {parameter.name: match for parameter in parameters if (match := BLOCK.match(parameter.name))}
    last: dict[str, int] = {}
    for match in found.values():
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return {name: int(match[2]) / last[match[1]] for name, match in found.items() if last[match[1]] > 0}
