"""What a merge method may know of the tasks besides the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.merging.passes import ForwardPasses
from pave_lightning.statistics import TaskStatistics
from pave_lightning.statistics.gradients import GradientKind, TaskGradients
from pave_lightning.weights import Parameter, ParameterKind, TaskVectors


class Need(StrEnum):
    """What a method needs besides the weights."""

    MOMENTS = "second moments"
    INPUT_MOMENTS = "input moments"
    LOW_RANK = "low-rank adapters"
    NORM_MOMENTS = "norm moments"
    UNLABELLED_EXAMPLES = "unlabelled examples"
    ANCHOR = "an anchor"
    FISHER = "Fisher information"
    GRADIENTS = "labelled gradients"


# What each kind of gradients is to methods.
KINDS: dict[GradientKind, Need] = {"fisher": Need.FISHER, "absolute": Need.GRADIENTS}


@dataclass(frozen=True)
class Evidence:
    """What is known of the tasks' data; empty for methods that look at weights alone.

    Attributes:
        statistics: what each task's expert saw, from `PaveCallback`; layers by their names inside the backbone.
        passes: what is needed to run models on the tasks' examples.
        anchor: the task vector of a model that was merged before, scaled, by names of parameters.
        fisher: each task's Fisher information at its expert's weights.
        gradients: each task's mean absolute gradients at the base's weights.
        further: what the providers of all other needs gave, by the need.
    """

    statistics: Mapping[str, TaskStatistics] = field(default_factory=dict)
    passes: ForwardPasses | None = None
    anchor: Mapping[str, Tensor] | None = None
    fisher: Mapping[str, TaskGradients] = field(default_factory=dict)
    gradients: Mapping[str, TaskGradients] = field(default_factory=dict)
    further: Mapping[Need, object] = field(default_factory=dict)

    @property
    def forward_passes(self) -> ForwardPasses:
        """What is needed to run models.

        Raises:
            PaveError: nothing was given.
        """
        if self.passes is None:
            raise PaveError("this method runs the models on unlabelled examples, but none were given")
        return self.passes

    def anchor_vector(self, parameter: Parameter) -> Tensor:
        """The anchor's task vector of a parameter, float32, of its shape.

        Raises:
            PaveError: there is no anchor, or it lacks the parameter.
        """
        if self.anchor is not None and parameter.of_stack is not None and parameter.of_stack[0] in self.anchor:
            stack, number = parameter.of_stack
            return self.anchor[stack][number]
        if self.anchor is None or parameter.name not in self.anchor:
            raise PaveError(f"the anchor, a model that was merged before, has no {parameter.name}")
        return self.anchor[parameter.name]

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

    def input_moments(self, tasks: Collection[str], parameter: Parameter) -> Iterator[tuple[str, Tensor]]:
        """Tasks whose examples reached the layer of a matrix weight, each with its `input_moment`, one at a time.

        Args:
            tasks: which tasks to ask.
            parameter: a matrix weight with axes ``d_out x d_in``, however it is stored.

        Yields:
            A task, and its moment: shape ``(d_in, d_in)``, float64.
        """
        for task in tasks:
            moment = self.input_moment(task, parameter)
            if moment is not None:
                yield task, moment

    def norm_moment(self, task: str, parameter: Parameter) -> Tensor | None:
        """The mean square of what a norm's scale multiplies, channel by channel, inside the task's expert.

        Args:
            task: the task.
            parameter: the scale of a norm.

        Returns:
            Shape ``(d,)``, float64; None where no example reached the norm, or its form is not one that is captured.

        Raises:
            PaveError: what was captured has another width.
        """
        norms = self.statistics[task].norms
        if parameter.layer not in norms:
            return None
        squares = norms[parameter.layer].squares
        if tuple(squares.shape) != parameter.shape:
            raise PaveError(
                f"task '{task}': the norm moment of {parameter.layer} is {list(squares.shape)}, expected "
                f"{list(parameter.shape)}; capture the statistics of this very expert again"
            )
        return squares.double()

    def fisher_information(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The diagonal of a task's Fisher information at its expert's weights, float32, of the parameter's shape.

        Args:
            task: the task.
            parameter: any parameter.
            rows: rows of its first axis; all of them where none are named.
        """
        return self.fisher[task].read(parameter.name, rows)

    def absolute_gradient(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The mean magnitude of a task's gradient at the base's weights; arguments as in `fisher_information`."""
        return self.gradients[task].read(parameter.name, rows)

    def lacking(self, needs: Collection[Need], vectors: TaskVectors) -> Iterator[str]:
        """What of the needs is not there, one line a task, with what to do about it; see `LACKING`."""
        for need, lacking in LACKING.items():
            if need in needs:
                yield from lacking(self, vectors)
        for need in sorted(set(needs) - set(LACKING) - set(self.further)):
            yield f"{need} are needed, but none were given; from Python give them as Evidence(further={{...}})"

    def block_problems(self) -> Iterator[str]:
        """Why the backbone cannot be walked through block by block; here nothing, as `ForwardPasses.stack` tells it."""
        return iter(())


@dataclass(frozen=True)
class PlannedEvidence(Evidence):
    """Evidence that is yet to be taken: nothing counts as lacking, so that only the request itself can be wrong.

    Attributes:
        block_problem: tells why the backbone cannot be walked through block by block; None where it can.
    """

    block_problem: Callable[[], str | None] = lambda: None

    def lacking(self, needs: Collection[Need], vectors: TaskVectors) -> Iterator[str]:
        """Nothing."""
        return iter(())

    def block_problems(self) -> Iterator[str]:
        """Why the backbone cannot be walked through."""
        problem = self.block_problem()
        if problem is not None:
            yield problem


def _lacking_moments(evidence: Evidence, vectors: TaskVectors) -> Iterator[str]:
    matrices = [parameter for parameter in vectors.parameters if parameter.is_matrix]
    for task in vectors.tasks:
        if task not in evidence.statistics:
            yield f"task '{task}' has no captured statistics; run `pave capture`"
            continue
        statistics = evidence.statistics[task]
        reduced = [p.layer for p in matrices if p.layer in statistics and not _whole(statistics, p.layer)]
        if reduced:
            yield (
                f"task '{task}': the second moments of the inputs of {len(reduced)} layers are needed, such as "
                f"{reduced[0]}, but reduced ones were captured; set capture.moments: input"
            )


def _lacking_norms(evidence: Evidence, vectors: TaskVectors) -> Iterator[str]:
    scales = [parameter.layer for parameter in vectors.parameters if parameter.kind is ParameterKind.NORM_SCALE]
    for task in vectors.tasks if scales else ():
        if task not in evidence.statistics:
            yield f"task '{task}' has no captured statistics; run `pave capture`"
        elif not evidence.statistics[task].norms:
            yield (
                f"task '{task}': the moments of what {len(scales)} norms scale are needed, such as {scales[0]}, "
                "but none were captured; set capture.norms: true"
            )


def _whole(statistics: TaskStatistics, layer: str) -> bool:
    return statistics.kind(layer) in ("input", "rows")


def _lacking_adapters(evidence: Evidence, vectors: TaskVectors) -> Iterator[str]:
    for task in vectors.tasks:
        reason = vectors.without_factors(task)
        if reason is not None:
            yield f"task '{task}' has no low-rank adapters: {reason}"


def _lacking_examples(evidence: Evidence, vectors: TaskVectors) -> Iterator[str]:
    batches = {} if evidence.passes is None else evidence.passes.batches
    for task in vectors.tasks:
        if not batches.get(task):
            yield f"task '{task}': unlabelled examples are needed, but none were given"


def _lacking_anchor(evidence: Evidence, vectors: TaskVectors) -> Iterator[str]:
    if evidence.anchor is None:
        yield (
            "it starts from a model that another method has merged, its anchor, but none was given; in a recipe name "
            "that method's merge step with the key 'anchor', from Python give the vectors as Evidence(anchor=...)"
        )


def _lacking_fisher(evidence: Evidence, vectors: TaskVectors) -> Iterator[str]:
    return _lacking_gradients(evidence.fisher, "fisher", vectors)


def _lacking_labelled_gradients(evidence: Evidence, vectors: TaskVectors) -> Iterator[str]:
    return _lacking_gradients(evidence.gradients, "absolute", vectors)


def _lacking_gradients(given: Mapping[str, TaskGradients], kind: GradientKind, vectors: TaskVectors) -> Iterator[str]:
    need = KINDS[kind]
    shapes = {parameter.name: parameter.shape for parameter in vectors.parameters}
    for task in vectors.tasks:
        if task not in given:
            yield f"task '{task}' has no {need}; `pave merge` takes it as part of a recipe"
        elif given[task].kind != kind:
            yield (
                f"task '{task}': expected {need} (in a run folder gradients/{kind}-TASK), found "
                f"{KINDS[given[task].kind]} (gradients/{given[task].kind}-TASK); give the file of the other kind"
            )
        else:
            for misfit in given[task].misfits(shapes):
                yield f"task '{task}': the {need}: {misfit}; take it anew for these experts"


# Tells what of each need is not there. Second moments in any form are looked at layer by layer, where they are read.
# What is not named here is one of the further needs.
LACKING: dict[Need, Callable[[Evidence, TaskVectors], Iterator[str]]] = {
    Need.MOMENTS: lambda evidence, vectors: iter(()),
    Need.INPUT_MOMENTS: _lacking_moments,
    Need.LOW_RANK: _lacking_adapters,
    Need.NORM_MOMENTS: _lacking_norms,
    Need.UNLABELLED_EXAMPLES: _lacking_examples,
    Need.ANCHOR: _lacking_anchor,
    Need.FISHER: _lacking_fisher,
    Need.GRADIENTS: _lacking_labelled_gradients,
}
