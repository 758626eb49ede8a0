"""What methods share that walk through a model block by block."""

from __future__ import annotations

from collections.abc import Iterator

from pave_lightning.merging.base import Cost, OptionsT_co, StaticMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.weights import TaskVectors


class BlockwiseMethod(StaticMethod[OptionsT_co]):
    """A method that runs the blocks of the backbone one after the other, each with weights of its own making.

    It works on every model whose blocks follow each other, and refuses the others; see `BlockStack`.
    """

    cost = Cost.FORWARD_PASSES
    whole_model_pass = True
    parallel = False
    serial_because = "each block of the model is solved on what the merged blocks before it hand on"

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Besides what is generally lacking: why the backbone cannot be walked through."""
        yield from super().problems(vectors, evidence)
        yield from evidence.block_problems()
