"""What sections of options are made of, wherever they are used: typed, frozen, described."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pave_lightning.errors import Problems, nearest, shortened

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


# In which type merged weights are written: each as the base stores it, or all in one.
WrittenDtype = Literal["base", "float32", "bfloat16", "float16"]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: int | str) -> int:
    """A size in bytes: a number, or a number with one of the units KB, MB, GB, TB (decimal) and KiB, MiB, GiB (binary).

    Raises:
        ValueError: it is no such size, or not above zero.

    Example:
        >>> bytes_of("5GB"), bytes_of("0.5 MiB"), bytes_of(1000)
        (5000000000, 524288, 1000)
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z]{0,3})", str(size).strip())
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None or (count := int(float(found[1]) * unit)) < 1:
        raise ValueError("must be a size above zero, such as 5GB, 500MB or a number of bytes")
    return count


def _size(value: int | str) -> int | str:
    bytes_of(value)
    return value


FileSize = Annotated[int | str, AfterValidator(_size)]
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


AnyOptions = TypeVar("AnyOptions", bound=BaseModel)


def options_of(kind: type[AnyOptions], given: Mapping[str, Any], whose: str) -> AnyOptions:
    """Options made of plain values.

    Args:
        kind: their class.
        given: names and values.
        whose: what they are options of, in messages.

    Raises:
        PaveError: an option is unknown, or an option's value is not possible; all is told at once.
    """
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        problems = Problems(f"the options of {whose}:")
        for found in error.errors():
            key = _key_of(found["loc"], given)
            if found["type"] == "extra_forbidden":
                problems.add(f"{key}: unknown option; {nearest(key, list(kind.model_fields))}")
            elif found["type"] == "missing":
                problems.add(f"{key}: is missing, and has no default")
            else:
                wrong = found["msg"].removeprefix("Input ").removeprefix("Value error, ")
                told = f"{key}: {wrong}, found {shortened(repr(found['input']))}" if key else wrong
                problems.add(told)
        problems.raise_if_any()
        raise


def _key_of(location: Sequence[str | int], given: Any) -> str:
    """Where an error is, as far as its location leads into what was given; the rest names members of unions."""
    words: list[str] = []
    for part in location:
        if isinstance(given, Mapping):
            given = given.get(part)
        elif isinstance(given, list | tuple) and isinstance(part, int) and part < len(given):
            given = given[part]
        else:
            break
        words.append(str(part))
    return ".".join(words)


def slug(text: str) -> str:
    """A name that is safe as a folder name on every file system."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
