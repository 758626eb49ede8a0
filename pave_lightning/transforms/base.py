"""What every transform of task vectors looks like, and the registry that knows them by name; nobody lists them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, cast

from pydantic import BaseModel
from typing_extensions import TypeVar

from pave_lightning.config import Section, options_of
from pave_lightning.errors import Problems
from pave_lightning.merging import Evidence, Need
from pave_lightning.purification.options import Compute
from pave_lightning.system.plug_ins import Registry
from pave_lightning.weights import DerivedTaskVectors, TaskVectors

# Where the transforms of this package lie, which import this module.
TRANSFORMS = "pave_lightning.transforms"
ENTRY_POINTS = "pave_lightning.transforms"

OptionsT_co = TypeVar("OptionsT_co", bound=BaseModel, default=BaseModel, covariant=True)


class Transform(ABC, Generic[OptionsT_co]):
    """A transform of task vectors: a source of them in, a source of others out, of the same tasks and parameters.

    Stacks of transforms are named in recipes; the next one is given what the one before gave. What comes out is read
    as any source is, parameter by parameter and in blocks of rows, so it must depend neither on the order of reading
    nor on the size of the blocks.

    Attributes:
        name: how recipes call it; set by `vector_transform`.
        summary: the idea in one line.
        source: paper and year, or where else it is from.
        needs: what it needs besides the task vectors, see `wanted`; an anchor it cannot have, which is made of
            transformed ones.
        keeps_factors: whether what comes out has low-rank factors where what goes in has them.
        ordered: whether the order of the tasks matters.
        section: name of the section of recipes and merge steps that holds its options, over which a stack may write
            some of its own; empty where a stack holds all of them.
        Options: the class of its options. Of an option ``seed`` that is None the recipe's seed takes the place.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    keeps_factors: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    section: ClassVar[str] = ""
    Options: ClassVar[type[BaseModel]] = Section

    def __init__(self, options: OptionsT_co | None = None) -> None:
        self.options = options if options is not None else cast(OptionsT_co, self.Options())

    @property
    def examples(self) -> int:
        """On how many unlabelled examples a task it runs models, by its option of that name; or else 0."""
        return int(getattr(self.options, "examples", 0))

    def wanted(self, *, changed: bool) -> frozenset[Need]:
        """What it needs with its options.

        Args:
            changed: whether another transform comes before it, so that its experts are not those that were fine-tuned.
        """
        return self.needs

    def problems(self, vectors: TaskVectors) -> Iterator[str]:
        """What keeps it from transforming these task vectors, from names and shapes alone.

        Plans ask it too, with task vectors that have no values, and no parameters where the base cannot be read.
        """
        return iter(())

    @abstractmethod
    def apply(self, vectors: TaskVectors, evidence: Evidence, compute: Compute) -> TaskVectors:
        """The transformed task vectors, computed as they are read: a `DerivedTaskVectors`, or the very same object.

        Args:
            vectors: what is transformed.
            evidence: what it ``needs``.
            compute: how it may use the machine, where it does work that is worth it.
        """


_registry = Registry[Transform]("transform", TRANSFORMS, ENTRY_POINTS, command="pave transforms")


def vector_transform(name: str) -> Callable[[type[Any]], type[Any]]:
    """Decorator that makes a class known as a transform by a name; a name can be given once.

    Third parties name the module that holds what they decorate under the entry point group
    ``pave_lightning.transforms``.

    Raises:
        ValueError: another transform has the name already.
        TypeError: it is no complete transform.
    """

    def add(kind: type[Any]) -> type[Any]:
        if not (isinstance(kind, type) and issubclass(kind, Transform)) or inspect.isabstract(kind):
            raise TypeError(f"'{name}' is no complete transform: {getattr(kind, '__name__', kind)!r}")
        if lacking := [told for told in ("summary", "source") if not isinstance(getattr(kind, told, 0), str)]:
            raise TypeError(f"transform '{name}' does not say its {', '.join(lacking)}")
        if Need.ANCHOR in kind.needs:
            raise TypeError(f"transform '{name}' needs an anchor, which is made of transformed task vectors itself")
        _registry.add(name, kind)
        kind.name = name
        return kind

    return add


def known_transforms() -> dict[str, type[Transform]]:
    """Every known transform by name: those of this package and those that installed packages register."""
    return _registry.known()


def transform_named(name: str) -> type[Transform]:
    """The transform of that name.

    Raises:
        PaveError: no transform has the name; the nearest one is told.
    """
    return _registry.named(name)


def make_transform(name: str, options: Mapping[str, Any]) -> Transform:
    """The transform of that name with the given options.

    Raises:
        PaveError: the transform or an option is unknown, or an option's value is not possible; all is told at once.

    Example:
        >>> make_transform("depth_scale", {"first": 0.5}).options.last
        1.0
    """
    kind = transform_named(name)
    return kind(options_of(kind.Options, options, f"transform '{name}'"))


def transformed(
    vectors: TaskVectors,
    transforms: Iterable[Transform],
    evidence: Evidence | None = None,
    compute: Compute | None = None,
) -> TaskVectors:
    """Task vectors after some transforms, one after the other; the same object where there is none.

    Args:
        vectors: any task vectors.
        transforms: the transforms, the first one first.
        evidence: what they need; nothing where None.
        compute: how they use the machine.

    Raises:
        PaveError: lists everything that keeps a transform from being used.
        TypeError: a transform gives something else than `DerivedTaskVectors`.
    """
    evidence = evidence or Evidence()
    for transform in transforms:
        changed = isinstance(vectors, DerivedTaskVectors)
        problems = Problems(f"transform '{transform.name}' cannot be used on these task vectors:")
        problems.extend(transform.problems(vectors))
        problems.extend(evidence.lacking(transform.wanted(changed=changed), vectors))
        problems.raise_if_any()
        found = transform.apply(vectors, evidence, compute or Compute())
        if found is not vectors and not isinstance(found, DerivedTaskVectors):
            raise TypeError(f"transform '{transform.name}' gives no DerivedTaskVectors, but {type(found).__name__}")
        vectors = found
    return vectors
