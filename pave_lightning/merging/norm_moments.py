"""What methods share that look at what the scales of norms multiply, unless an option says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from typing_extensions import TypeVar

from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.weights import TaskVectors


class NormMomentOptions(MatrixOptions):
    """Options of every method that may look at the moments of norms; each says which other values there are."""

    norms: str


NormMomentOptionsT_co = TypeVar("NormMomentOptionsT_co", bound=NormMomentOptions, covariant=True)


class NormMomentMethod(MatrixMethod[NormMomentOptionsT_co]):
    """A method with an option ``norms`` that is ``moments`` or a value with which moments of norms are not needed.

    Attributes:
        without_moments: that other value.
    """

    needs = frozenset({Need.INPUT_MOMENTS, Need.NORM_MOMENTS})
    without_moments: ClassVar[str]

    @property
    def wanted(self) -> frozenset[Need]:
        """Moments of norms only where they are used."""
        return self.needs if self.options.norms == "moments" else self.needs - {Need.NORM_MOMENTS}

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """What is missing, and how to do without the moments of norms."""
        yield from super().problems(vectors, evidence)
        if any(evidence.lacking(self.wanted & {Need.NORM_MOMENTS}, vectors)):
            yield f"the moments of norms are not needed with the option norms: {self.without_moments}"
