"""What sections of options are made of, wherever they are used: typed, frozen, described."""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Span = Annotated[tuple[float, float], Field(strict=False)]  # strict would refuse a list, which is all that YAML has

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
LONGEST_NAME = 100  # folders add to it, and most file systems end at 255
MOST_TOLD = 20


def name_problem(name: str) -> str | None:
    """Why a task, merge step or recipe cannot have a name although its letters are right; None if it can."""
    if name == "manifest.json" or ".unfinished-" in name or ".replaced-" in name:
        return f"'{name}' cannot be a name: run folders use it for files of their own"
    if name.endswith((".", ".lock", ".tmp")):
        return f"'{name}' cannot be a name: it must not end with '{name[name.rindex('.') :]}'"
    return None


def usable_name(name: str) -> str:
    """The name, unless run folders use it for something else."""
    if problem := name_problem(name):
        raise ValueError(problem)
    return name


def _path(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be a path of printable characters")
    return text


Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME), AfterValidator(usable_name)]
FolderPath = Annotated[str, AfterValidator(_path)]


class Section(BaseModel):
    """A part of a recipe: frozen, strictly typed (true is no number), unknown keys refused, every field described."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )


AnySection = TypeVar("AnySection", bound=Section)


def unless_wrong(section: AnySection, wrong: list[str]) -> AnySection:
    """The section, unless something is wrong: then everything at once, one line each."""
    if wrong:
        raise ValueError("\n".join(wrong))
    return section


def slug(text: str) -> str:
    """A name that is safe as a folder name on every file system."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
