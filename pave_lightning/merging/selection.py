"""Which parameters are merged: patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from pave_lightning.errors import Problems, listed, near, shortened
from pave_lightning.merging.parts import PartOfVectors
from pave_lightning.weights import Parameter, TaskVectors

# Characters that make a pattern of a name.
WILD = "*?["


def is_selected(name: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> bool:
    """Whether a parameter of that name is merged.

    Args:
        name: its name inside the backbone.
        include: patterns of which one must match, where there are any; ``*`` stands for any characters, dots too, ``?``
            for one, ``[ab]`` for one of these.
        exclude: patterns of which none may match.

    Example:
        >>> is_selected("layer.3.attention.query.weight", include=["layer.*"], exclude=["*.bias"])
        True
    """
    included = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return included and not any(fnmatchcase(name, pattern) for pattern in exclude)


def pattern_problems(patterns: Iterable[str], names: Sequence[str]) -> Iterator[str]:
    """Patterns that match no parameter, each with what was probably meant.

    Args:
        patterns: the patterns.
        names: names of all parameters.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"'{shortened(pattern)}' matches no parameter; {_meant(pattern, names)}"


def _meant(pattern: str, names: Sequence[str]) -> str:
    inside = f"*{pattern.strip('*')}*"
    if any(fnmatchcase(name, inside) for name in names):
        return f"patterns match whole names, so did you mean '{shortened(inside)}'?"
    plain = "".join(letter for letter in pattern if letter not in WILD)
    close = near(plain, names)
    return f"did you mean '{close}'?" if close else f"names are such as {listed(list(names[:3]))}"


class SelectedTaskVectors(PartOfVectors):
    """Task vectors of those parameters that are to be merged; the others stay as they are in the base.

    Args:
        source: any task vectors.
        include: as of `is_selected`.
        exclude: as of `is_selected`.

    Raises:
        PaveError: a pattern matches no parameter, or nothing is left; all is told at once.
    """

    def __init__(self, source: TaskVectors, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        chosen = [p for p in source.parameters if is_selected(p.name, include, exclude)]
        super().__init__(source, chosen)
        kept = {parameter.name for parameter in chosen}
        self._others = [parameter for parameter in source.parameters if parameter.name not in kept]
        problems = Problems("these parameters cannot be chosen:")
        problems.extend(selection_problems(source.parameters, include, exclude))
        problems.raise_if_any()

    def unmerged(self) -> Iterator[tuple[str, Tensor]]:
        """The base's values of the other parameters, and of what the source leaves out."""
        yield from self.source.unmerged()
        for parameter in self._others:
            yield parameter.name, self.source.base(parameter)


def selection_problems(
    parameters: Iterable[Parameter], include: Sequence[str], exclude: Sequence[str]
) -> Iterator[str]:
    """What is wrong with patterns for these parameters."""
    names = [parameter.name for parameter in parameters]
    if not names:
        return
    for key, patterns in (("include", include), ("exclude", exclude)):
        yield from (f"{key}: {problem}" for problem in pattern_problems(patterns, names))
    if not any(is_selected(name, include, exclude) for name in names):
        yield "include and exclude leave no parameter to merge"


def selected(source: TaskVectors, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> TaskVectors:
    """Task vectors of the parameters that are to be merged, see `SelectedTaskVectors`; the same object where all are.

    Args:
        source: any task vectors.
        include: as of `is_selected`.
        exclude: as of `is_selected`.

    Raises:
        PaveError: as `SelectedTaskVectors` does.
    """
    return SelectedTaskVectors(source, include, exclude) if include or exclude else source
