"""What every merge method looks like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Generic, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from typing_extensions import TypeVar

from pave_lightning.errors import Problems
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.modulators import LowRank
from pave_lightning.merging.states import Preparation, States
from pave_lightning.weights import Parameter, TaskVectors


class Cost(StrEnum):
    """What dominates the time of a method."""

    ELEMENTWISE = "elementwise"
    DECOMPOSITION = "decompositions"
    ITERATIONS = "iterations"
    FORWARD_PASSES = "forward passes"
    TRAINING = "training"


class MethodOptions(BaseModel):
    """Options of a merge method: typed, frozen, with the source's defaults; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


# What a method's options are: of the method, or of those that it is a special case of.
OptionsT_co = TypeVar("OptionsT_co", bound=MethodOptions, default=MethodOptions, covariant=True)


class MergeMethod(ABC, Generic[OptionsT_co]):
    """A merge method.

    A method is fed one parameter at a time, and elementwise methods one block of rows at a time. It may look at all
    task vectors beforehand, in :meth:`prepare`, and at what is known of the tasks' data, in :attr:`evidence`.

    Several objects of a method may share a merge, each with a part of the parameters, as processes do: what is gathered
    over parameters is declared as a state with its reduction, ``self.states.add(name, initial, reduction)``, and filled
    in :meth:`prepare` or from one ``merge`` to the next. States are reduced over all parts wherever :meth:`prepare`
    yields, and those that are still open when all parameters have been merged.

    Attributes:
        name: how recipes call it; set by :func:`~pave_lightning.merging.registry.merge_method`.
        summary: the idea in one line.
        source: paper and year.
        needs: what it needs besides the weights.
        form: ``static`` when one set of weights serves all tasks, ``per-task`` when something is kept for each task.
        cost: what dominates its time.
        elementwise: whether blocks of rows may be merged apart from each other; :meth:`in_blocks` may differ.
        ordered: whether the order of the tasks matters.
        batched: whether it matters which examples share a batch, beyond rounding.
        held_models: how many models' worth of weights it holds in memory while it works, besides one parameter of all
            tasks.
        each_expert: whether the experts of a mixture, a stack of matrices in one parameter, are given to it one by one.
        whole_model_pass: whether :meth:`prepare` reads every task vector.
        single_precision: whether float32 is all that it computes in, so that a device without float64 is enough.
        parallel: whether parts of the parameters may be merged apart from each other.
        serial_because: why not, where they may not.
        default_scale: what its merged task vector is multiplied with unless a recipe says otherwise; None for a method
            that has no such scale.
        device: where it is given task vectors, and computes; the CPU unless something else is set.
        evidence: what is known of the tasks' data; nothing until the method is run.
        states: what is gathered over parameters.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    form: ClassVar[Literal["static", "per-task"]]
    cost: ClassVar[Cost] = Cost.ELEMENTWISE
    elementwise: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    batched: ClassVar[bool] = False
    held_models: ClassVar[int] = 0
    each_expert: ClassVar[bool] = False
    whole_model_pass: ClassVar[bool] = False
    single_precision: ClassVar[bool] = False
    parallel: ClassVar[bool] = True
    serial_because: ClassVar[str] = ""
    default_scale: ClassVar[float | None] = None
    Options: ClassVar[type[MethodOptions]] = MethodOptions

    def __init__(self, options: OptionsT_co | None = None) -> None:
        self.options = options if options is not None else cast(OptionsT_co, self.Options())
        self.device = torch.device("cpu")
        self.evidence = Evidence()
        self.states = States()

    @classmethod
    def cpu_because(cls, device_type: str) -> str:
        """Why it computes on the CPU where a device of that type is asked for; empty where it computes there."""
        if device_type == "cpu":
            return ""
        if cls.needs:
            return "what it needs besides the weights is there"
        return f"{device_type} has no float64" if device_type == "mps" and not cls.single_precision else ""

    def begin(self, vectors: TaskVectors, evidence: Evidence) -> None:
        """Check the request, take in the evidence, and prepare.

        Raises:
            PaveError: lists everything that keeps this method from merging these task vectors.
        """
        self._check(vectors, evidence)
        self.evidence = evidence
        self.prepare_alone(vectors)

    def begin_part(self, vectors: TaskVectors, evidence: Evidence, whole: TaskVectors | None = None) -> Iterator[None]:
        """As :meth:`begin`, of a part of the parameters; stops wherever the states of all parts must be reduced.

        Args:
            vectors: those of the part.
            evidence: what is known of the tasks' data.
            whole: those of all parameters, which are checked instead of the part's where they are given.
        """
        self._check(vectors if whole is None else whole, evidence)
        self.evidence, self.states = evidence, States()
        yield from self.prepare(vectors) or ()

    def prepare_alone(self, vectors: TaskVectors) -> None:
        """Run :meth:`prepare` to its end, without checks, as the only part."""
        self.states = States()
        for _ in self.prepare(vectors) or ():
            self.states.reduce([self.states.gathered()])

    def _check(self, vectors: TaskVectors, evidence: Evidence) -> None:
        problems = Problems(f"merge method '{self.name}' cannot merge these experts:")
        problems.extend(self.problems(vectors, evidence))
        problems.raise_if_any()

    @property
    def wanted(self) -> frozenset[Need]:
        """What the method needs with its options; at most what it says in ``needs``."""
        return self.needs

    @property
    def examples(self) -> int:
        """On how many unlabelled examples a task the method runs models, by its option of that name; or else 0."""
        return int(getattr(self.options, "examples", 0))

    @property
    def batch_size(self) -> int:
        """How many examples share a batch where that matters, by the method's option of that name; or else 0."""
        return int(getattr(self.options, "batch_size", 0))

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """What keeps the method from merging these task vectors, from shapes and headers alone.

        Plans ask it too, with task vectors that have no values and evidence of which nothing counts as lacking.
        """
        yield from evidence.lacking(self.wanted, vectors)

    def prepare(self, vectors: TaskVectors) -> Preparation:
        """Look at the task vectors before the first merge; most methods need not.

        Of several parts each sees its own parameters. Whatever is to be known of all of them is gathered in states; a
        ``yield`` stands where they are to be those of all parts, so all parts must come to the same ones::

            squares = self.states.add("squares", dict.fromkeys(vectors.tasks, 0.0), "sum")
            for _, _, own in vectors.walk():
                for task, block in own.items():
                    squares.value[task] += float(block.double().square().sum())
            yield  # here of this part, from here on of all
            self.norms = {task: math.sqrt(square) for task, square in squares.value.items()}
        """
        return None

    def in_blocks(self, parameter: Parameter) -> bool:
        """Whether blocks of this parameter's rows may be merged apart from each other."""
        return self.elementwise


class StaticMethod(MergeMethod[OptionsT_co]):
    """A method whose result is one set of weights for all tasks.

    Attributes:
        rescales: whether :meth:`factor` is known only once every parameter has been merged; the merged task vectors
            are then held in memory until the last one is there (``held_models`` 1).
    """

    form = "static"
    rescales: ClassVar[bool] = False

    @abstractmethod
    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Merge one parameter, or a block of its rows.

        Args:
            parameter: what the tensors are; its ``rows`` say which block of it they hold, if they hold one.
            base: the base's values, float32.
            vectors: each task's task vector, float32, of the base's shape, in the order of the tasks.

        Returns:
            The merged task vector, float32, of the same shape, before it is multiplied with the scale.
        """

    def factor(self, parameter: Parameter) -> float:
        """What a merged task vector is multiplied with once every parameter has been merged; see ``rescales``."""
        return 1.0


@dataclass(frozen=True)
class Modulated:
    """A parameter that all tasks share, and what each task keeps beside it; a task may lack either.

    Attributes:
        shared: the unified task vector, float32.
        masks: for a task a bool tensor of the same shape: which elements it uses; all of them where it has none.
        factors: for a task what it adds to that, as a product of low rank; only from methods that see whole parameters.
    """

    shared: Tensor
    masks: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, LowRank] = field(default_factory=dict)


class PerTaskMethod(MergeMethod[OptionsT_co]):
    """A method that shares one unified task vector, and keeps for each task what makes it the task's own.

    The weights of task t are ``base + rescale_t * (mask_t * unified + left_t @ right_t)``: a mask over what is shared,
    an addition of low rank, one factor; a method may do without masks or without additions.
    """

    form = "per-task"

    @abstractmethod
    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Modulated:
        """Merge one parameter, or a block of its rows; arguments as in :meth:`StaticMethod.merge`."""

    def kept_bytes(self, parameter: Parameter, tasks: int) -> int:
        """What is kept of a parameter for each task; a mask of one bit an element."""
        return (parameter.elements + 7) // 8

    @abstractmethod
    def rescalers(self) -> dict[str, float]:
        """The factor of each task, once every parameter has been merged."""
