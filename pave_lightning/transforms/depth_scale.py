"""Depth scaling: less of the task vectors in shallow blocks, more in deep ones, or the other way round."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from pydantic import Field

from pave_lightning.config import Section
from pave_lightning.merging import Evidence
from pave_lightning.purification.options import Compute
from pave_lightning.transforms.base import Transform, vector_transform
from pave_lightning.transforms.scaled import ScaledTaskVectors
from pave_lightning.weights import Parameter, TaskVectors

# Path and number of the outermost block that a parameter lies in.
BLOCK = re.compile(r"(.*?)(?:^|\.)(\d+)\.")


class DepthScaleOptions(Section):
    """Options of depth scaling."""

    first: float = Field(...)
    """Factor of the first block, and of everything that lies in no block."""
    last: float = 1.0
    """Factor of the last block; those between them lie on a straight line."""


@vector_transform("depth_scale")
class DepthScale(Transform[DepthScaleOptions]):
    r"""Multiply the task vectors of block :math:`l` of :math:`L` with :math:`a + (b - a) \, l / (L - 1)`, from 0 on.

    :math:`a` is the option ``first``, :math:`b` is ``last``. Blocks are the numbered modules that enclose a parameter,
    the outermost ones, where there are two or more beside each other; an encoder and a decoder are counted each for
    itself. Parameters in no block (embeddings, poolers) are multiplied with ``first``, as in the published code.

    Source: Wang et al., *LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging*, ICLR 2025
    (arXiv 2410.17146). Departure: there what was merged is scaled; here the task vectors are, before they are merged,
    which is the same for methods that are linear in each parameter. The published default for one expert leaves the
    last block as it is, as ``last: 1`` does.
    """

    summary = "scale task vectors by a factor that is linear in the depth of the block"
    source = "Wang et al. 2025, arXiv 2410.17146"
    keeps_factors = True
    Options = DepthScaleOptions

    def problems(self, vectors: TaskVectors) -> Iterator[str]:
        """The model has no blocks."""
        if vectors.parameters and not relative_depths(vectors.parameters):
            yield "the model has no numbered blocks, two or more beside each other, whose depth could be told"

    def apply(self, vectors: TaskVectors, evidence: Evidence, compute: Compute) -> ScaledTaskVectors:
        """The task vectors, scaled by depth."""
        first, last = self.options.first, self.options.last
        depths = relative_depths(vectors.parameters)
        return ScaledTaskVectors(
            vectors, lambda task, parameter: first + (last - first) * depths.get(parameter.name, 0.0)
        )


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
