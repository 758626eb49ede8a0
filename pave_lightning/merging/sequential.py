"""Methods that can take in one more expert later on, from the merged model instead of from all experts again."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from pave_lightning.errors import PaveError, Problems
from pave_lightning.merging.base import OptionsT_co, StaticMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.states import Preparation
from pave_lightning.subspace import is_finite
from pave_lightning.weights import Checkpoint, Parameter, TaskVectors


class SequentialState(BaseModel):
    """What must be kept beside a merged model so that experts can be added to it; plain values, fit for JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    method: str
    """Name of the method that merged it."""
    merged: int = Field(ge=1)
    """How many experts have been merged."""
    divisor: float
    """What the method's running total was divided by to give the difference of the merged model to the base (lambda in
    OPCM); the scale counts in."""
    norms: float = Field(default=0.0, ge=0)
    """Sum of the norms of the merged experts' task vectors; 0 for methods that do not look at them."""


class SequentialMethod(StaticMethod[OptionsT_co]):
    """A method whose result follows from a running total over the tasks, which the merged model holds up to a factor.

    After a merge, :meth:`state` tells what is to be kept beside the merged model. To add experts to it, make the method
    anew with the same options, hand that over with :meth:`start_from`, and merge a source whose base is the original
    base, whose first task is the merged model, and whose other tasks are the new experts. The result is what merging
    all experts in that order gives, to the rounding with which the merged model is stored.

    Subclasses read the task vectors through :meth:`running` and say in :meth:`divisor` how their result follows from
    the total. Those that must know more of the merged experts name it in ``keeps``, give it in :meth:`kept` and read it
    with :meth:`kept_before`. Of the data of experts that are merged already nothing is asked.

    Attributes:
        keeps: names of the tensors that are kept for each parameter, of its shape, beside the merged model.

    Example::

        method = Opcm()
        result = merge(method, task_vectors(base, {"movie": "experts/movie", "news": "experts/news"}))
        facts = method.state()
        later = Opcm()
        later.start_from(facts)
        result = merge(later, task_vectors(base, {"merged": "merged/opcm", "tweets": "experts/tweets"}))
    """

    keeps: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: OptionsT_co | None = None) -> None:
        super().__init__(options)
        self._start: SequentialState | None = None
        self._kept: Mapping[str, Checkpoint] = {}
        self._tasks = 0

    @abstractmethod
    def divisor(self) -> float:
        """What the running total is divided by to give the merged task vector, once all parameters are merged."""

    def norms(self) -> float:
        """Sum of the norms of all merged experts' task vectors, for methods that need it."""
        return 0.0

    def kept(self, parameter: Parameter, vectors: TaskVectors) -> dict[str, Tensor]:
        """What ``keeps`` names of one parameter, float32, of its shape, of all experts; known once a merge began."""
        return {}

    def kept_before(self, name: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """What was kept of the experts inside the merged model that this merge starts from, of the parameter's shape.

        Raises:
            PaveError: it holds NaN or infinity.
        """
        found = self._kept[name].tensor(parameter.name, rows)
        if not is_finite(found):
            raise PaveError(
                f"{self._kept[name].folder}: what was kept of {parameter.name} holds NaN or infinity; merge all again"
            )
        return found

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """What keeps the method from merging these; of a merged model nothing is asked but what was kept of it."""
        new = vectors
        if self._start is not None:
            new = copy.copy(vectors)
            new.tasks = vectors.tasks[1:]
        yield from super().problems(new, evidence)
        for name, kept in self._kept.items():
            found = {key: stored.shape for key, stored in kept.backbone.items() if stored.is_floating}
            wrong = [parameter.name for parameter in vectors.parameters if found.get(parameter.name) != parameter.shape]
            if wrong:
                yield (
                    f"{kept.folder}: the '{name}' of {len(wrong)} parameters, such as {wrong[0]}, is missing or of "
                    "another shape; merge all experts again"
                )

    def prepare(self, vectors: TaskVectors) -> Preparation:
        """Note how many tasks there are."""
        self._tasks = len(vectors.tasks)
        return None

    @property
    def has_merged(self) -> bool:
        """Whether there is a state yet."""
        return self._tasks > 0

    def merged(self) -> int:
        """How many experts have been merged, those inside of a merged model counted."""
        return self._counted(self._tasks)

    def _counted(self, tasks: int) -> int:
        return tasks if self._start is None else self._start.merged + tasks - 1

    def running(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task vectors, where the first is that of a merged model turned back into the running total."""
        found = dict(vectors)
        if self._start is not None:
            first = next(iter(found))
            found[first] = found[first] * self._start.divisor
        return found

    def start_from(self, state: Mapping[str, Any], kept: Mapping[str, Checkpoint] | None = None) -> None:
        """Take the first task of the next merge for a merged model.

        Args:
            state: what :meth:`state` gave after the merge that made it.
            kept: for each name in ``keeps`` a checkpoint of what :meth:`kept` gave, by names of parameters.

        Raises:
            PaveError: that is no such state, or another method's, or something that the method needs was not kept.
        """
        self._start = _checked(state, self.name)
        given = kept or {}
        lacking = [name for name in self.keeps if name not in given]
        if lacking:
            raise PaveError(
                f"to add experts, merge method '{self.name}' needs what was kept beside the merged model, but this was "
                f"not given: {', '.join(lacking)}; merge all experts again"
            )
        self._kept = {name: given[name] for name in self.keeps}

    def state(self, scale: float | None = None) -> dict[str, Any]:
        """What must be kept beside the merged model; ask for it once every parameter has been merged.

        Args:
            scale: what the merged task vector is multiplied with; None for methods without a scale.

        Raises:
            PaveError: the scale is 0, so that the merged model holds nothing of the experts.
        """
        factor = 1.0 if scale is None else scale
        if factor == 0:
            raise PaveError(
                f"merge method '{self.name}' with scale 0 leaves nothing of the experts in the merged model, so none "
                "can be added to it later; expected another scale"
            )
        if not self._tasks:
            raise RuntimeError("the state of a method is known only after it has merged")
        kept = SequentialState(
            method=self.name, merged=self.merged(), divisor=self.divisor() / factor, norms=self.norms()
        )
        return kept.model_dump()


class RunningSum(SequentialMethod):
    """The sum of the task vectors."""

    def divisor(self) -> float:
        """The total is the result."""
        return 1.0

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of all task vectors merged so far."""
        return summed(list(self.running(vectors).values()))


class RunningMean(SequentialMethod):
    """The mean of the task vectors."""

    def divisor(self) -> float:
        """The number of experts."""
        return float(self.merged())

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The mean of all task vectors merged so far."""
        return summed(list(self.running(vectors).values())) / self._counted(len(vectors))


def summed(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, one after the other: a stack of all would take as much memory as they do."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total


def _checked(state: Mapping[str, Any], method: str) -> SequentialState:
    problems = Problems("no expert can be added to this merged model:")
    try:
        found = SequentialState.model_validate(dict(state))
    except ValidationError as error:
        for wrong in error.errors():
            key = ".".join(str(part) for part in wrong["loc"])
            problems.add(f"what was kept beside it is not readable: {key}: {wrong['msg']}; merge all experts again")
        problems.raise_if_any()
        raise
    if found.method != method:
        problems.add(f"it was merged by '{found.method}', expected '{method}'; use that method, or merge all again")
    if found.divisor == 0:
        problems.add("what was kept beside it holds the divisor 0, expected another; merge all experts again")
    problems.raise_if_any()
    return found
