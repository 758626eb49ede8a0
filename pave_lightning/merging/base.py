"""What every merge rule looks like, and the registry that knows them by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from pave_lightning.errors import PaveError, Problems, nearest
from pave_lightning.weights import Parameter, TaskVectors

ENTRY_POINTS = "pave_lightning.methods"


class Need(StrEnum):
    """What a rule needs besides the weights."""

    COVARIANCES = "covariances"
    UNLABELLED_DATA = "unlabelled data"
    LABELS = "labels"
    GRADIENTS = "gradients"


class MethodOptions(BaseModel):
    """Options of a merge rule: typed, frozen, with the source's defaults; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class MergeMethod(ABC):
    """A merge rule.

    A rule is fed one parameter at a time, and elementwise rules one block of rows at a time. It may look at all task
    vectors once beforehand, in :meth:`prepare`.

    Attributes:
        name: how recipes call it; set by :func:`register`.
        summary: the idea in one line.
        source: paper and year.
        needs: what it needs besides the weights.
        form: ``static`` when one set of weights serves all tasks, ``per-task`` when something is kept for each task.
        elementwise: whether blocks of rows may be merged apart from each other.
        whole_model_pass: whether :meth:`prepare` reads every task vector once.
        default_scale: what its merged task vector is multiplied with unless a recipe says otherwise; None for a rule
            that has no such scale.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    form: ClassVar[Literal["static", "per-task"]]
    elementwise: ClassVar[bool] = False
    whole_model_pass: ClassVar[bool] = False
    default_scale: ClassVar[float | None] = None
    Options: ClassVar[type[MethodOptions]] = MethodOptions

    def __init__(self, options: MethodOptions | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    def prepare(self, vectors: TaskVectors) -> None:
        """Look at the task vectors once before the first merge; most rules need not."""
        return


class StaticMethod(MergeMethod):
    """A rule whose result is one set of weights for all tasks."""

    form = "static"

    @abstractmethod
    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Merge one parameter, or a block of its rows.

        Args:
            parameter: what the tensors are.
            base: the base's values, float32.
            vectors: each task's task vector, float32, of the base's shape, in the order of the tasks.

        Returns:
            The merged task vector, float32, of the same shape, before it is multiplied with the scale.
        """


@dataclass(frozen=True)
class Modulated:
    """A parameter that all tasks share, and which of its elements each task uses.

    Attributes:
        shared: the unified task vector, float32.
        masks: for each task a bool tensor of the same shape.
    """

    shared: Tensor
    masks: dict[str, Tensor]


class PerTaskMethod(MergeMethod):
    """A rule that shares one unified task vector, and keeps for each task a mask over it and one rescaling factor.

    The weights of task t are ``base + rescale_t * mask_t * unified``.
    """

    form = "per-task"

    @abstractmethod
    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Modulated:
        """Merge one parameter, or a block of its rows; arguments as in :meth:`StaticMethod.merge`."""

    @abstractmethod
    def rescalers(self) -> dict[str, float]:
        """The factor of each task, once every parameter has been merged."""


_registry: dict[str, type[MergeMethod]] = {}
_Method = TypeVar("_Method", bound=type[MergeMethod])


def register(name: str) -> Callable[[_Method], _Method]:
    """Class decorator that makes a rule known by a name; a name can be given once.

    Third parties name the module that holds their decorated class under the entry point group
    ``pave_lightning.methods``.

    Raises:
        ValueError: another class has the name already.
    """

    def add(method: _Method) -> _Method:
        if name in _registry and _registry[name] is not method:
            raise ValueError(f"two merge methods are named '{name}': {_registry[name].__name__} and {method.__name__}")
        method.name = name
        _registry[name] = method
        return method

    return add


def methods() -> dict[str, type[MergeMethod]]:
    """Every known rule by name: those of this package and those that installed packages register."""
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
    return dict(_registry)


def method_named(name: str) -> type[MergeMethod]:
    """The rule of that name.

    Raises:
        PaveError: no rule has the name; the nearest one is told.
    """
    known = methods()
    if name not in known:
        raise PaveError(f"unknown merge method '{name}': {nearest(name, sorted(known))} (see: pave methods)")
    return known[name]


def make_method(name: str, options: Mapping[str, Any]) -> MergeMethod:
    """The rule of that name with the given options.

    Raises:
        PaveError: the rule or an option is unknown, or an option's value is not possible; all is told at once.
    """
    kind = method_named(name)
    try:
        return kind(kind.Options.model_validate(options))
    except ValidationError as error:
        problems = Problems(f"the options of merge method '{name}':")
        for found in error.errors():
            key = ".".join(str(part) for part in found["loc"])
            if found["type"] == "extra_forbidden":
                problems.add(f"{key}: unknown option; {nearest(key, list(kind.Options.model_fields))}")
            else:
                problems.add(f"{key}: {found['msg'].removeprefix('Input ')}, found {found['input']!r}")
        problems.raise_if_any()
        raise
