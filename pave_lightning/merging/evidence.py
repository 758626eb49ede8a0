"""What a merge rule may know of the tasks besides the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.statistics import TaskStatistics
from pave_lightning.weights import Parameter, TaskVectors


class Need(StrEnum):
    """What a rule needs besides the weights."""

    INPUT_MOMENTS = "input moments"


@dataclass(frozen=True)
class Evidence:
    """What is known of the tasks' data; empty for rules that look at weights alone.

    Attributes:
        statistics: what each task's expert saw, from `PaveCallback`; layers by their names inside the backbone.
    """

    statistics: Mapping[str, TaskStatistics] = field(default_factory=dict)

    def input_moment(self, task: str, parameter: Parameter) -> Tensor | None:
        """The second moment ``C = X^T X / n`` of a matrix weight's input inside the task's expert.

        Args:
            task: the task.
            parameter: a matrix weight with axes ``d_out x d_in``, however it is stored.

        Returns:
            Shape ``(d_in, d_in)``, float64; None where no example reached the layer.

        Raises:
            PaveError: what was captured of the layer does not determine its input moment, or has another width.
        """
        statistics = self.statistics[task]
        if parameter.layer not in statistics:
            return None
        moment = statistics[parameter.layer].covariance()
        width = parameter.matrix_shape[1]
        if moment.shape != (width, width):
            raise PaveError(
                f"task '{task}': the input moment of {parameter.layer} is {list(moment.shape)}, expected "
                f"{[width, width]}; capture the statistics of this very expert again"
            )
        return moment.double()

    def lacking(self, needs: Collection[Need], vectors: TaskVectors) -> Iterator[str]:
        """What of the needs is not there, one line a task, with what to do about it."""
        if Need.INPUT_MOMENTS in needs:
            yield from self._lacking_moments(vectors)

    def _lacking_moments(self, vectors: TaskVectors) -> Iterator[str]:
        matrices = [parameter for parameter in vectors.parameters if parameter.is_matrix]
        for task in vectors.tasks:
            if task not in self.statistics:
                yield f"task '{task}' has no captured statistics; run `pave capture`"
                continue
            statistics = self.statistics[task]
            reduced = [p.layer for p in matrices if p.layer in statistics and not _whole(statistics, p.layer)]
            if reduced:
                yield (
                    f"task '{task}': the second moments of the inputs of {len(reduced)} layers are needed, such as "
                    f"{reduced[0]}, but reduced ones were captured; set capture.moments: input"
                )


def _whole(statistics: TaskStatistics, layer: str) -> bool:
    return statistics.kind(layer) in ("input", "rows")
