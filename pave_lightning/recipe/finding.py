"""Finds recipes: files by their paths, and those that are shipped with the package by their names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pave_lightning.errors import PaveError, listed, near, nearest

RECIPE_FOLDER = Path("recipes")
SWEEPS_FOLDER = RECIPE_FOLDER / "sweeps"
SUFFIXES = (".yaml", ".yml")


def shipped_folder() -> Path:
    """The folder of the shipped recipes: a part of an installed package, and the folder ``recipes`` of a checkout."""
    installed = Path(__file__).with_name("files")
    return installed if installed.is_dir() else Path(__file__).parents[2] / RECIPE_FOLDER


def shipped_recipes() -> dict[str, Path]:
    """The files of the shipped recipes by name: ``quickstart``, ``paper/glue_roberta``, ``sweeps/rank-ratio``."""
    folder = shipped_folder()
    files = (file for pattern in ("*.yaml", "paper/*.yaml", "sweeps/*.yaml") for file in sorted(folder.glob(pattern)))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def shipped_recipe(name: str) -> tuple[str, Path]:
    """The full name and the file of a shipped recipe.

    Args:
        name: its name, with or without the folder: ``sweeps/rank-ratio`` or ``rank-ratio``.

    Raises:
        PaveError: no shipped recipe has that name.
    """
    shipped = shipped_recipes()
    if found := _shipped(name, shipped):
        return found, shipped[found]
    short = [known.rpartition("/")[2] for known in shipped]
    raise PaveError(f"no recipe named '{name}' is shipped; {nearest(name, [*shipped, *short])}")


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped recipe where there is no file at that path.

    Raises:
        PaveError: there is neither; the message suggests the closest match.
    """
    path = Path(name)
    if _is_there(path):
        return path
    shipped = shipped_recipes()
    if found := _shipped(name, shipped):
        return shipped[found]
    if alike := _shipped(path.stem, shipped):  # recipes/quickstart.yaml, where there is no checkout
        raise PaveError(f"there is no recipe {name}; to use the shipped recipe of that name, write {alike}")
    own = recipe_files(path.parent)
    same = next((recipe for recipe in own if Path(recipe).stem == path.stem), name)
    if near(same, [*own, *shipped]) is not None:
        raise PaveError(f"there is no recipe {name}; {nearest(same, [*own, *shipped])}")
    here = f"recipes here are: {listed(own)}; " if own else ""
    raise PaveError(f"there is no recipe {name}; {here}`pave recipes` lists those that are shipped")


def find_sweep(name: str) -> Path:
    """The recipe of a sweep: a path, or a name in ``recipes/sweeps`` or among the shipped recipes.

    Raises:
        PaveError: there is none; the names that there are, are told.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {known.rpartition("/")[2]: file for known, file in shipped_recipes().items() if "sweeps/" in known}
    own = {file.stem: file for file in sorted(SWEEPS_FOLDER.glob("*.yaml"))}
    known = {**shipped, **own}
    found = known.get(name.removeprefix("sweeps/"))
    if found is None:
        raise PaveError(f"there is no sweep '{name}': {nearest(name, sorted(known))}")
    return found


def recipe_files(folder: Path) -> list[str]:
    """The recipe files of a folder and of ./recipes."""
    files = {file for place in (folder, RECIPE_FOLDER) if place.is_dir() for file in place.iterdir()}
    return sorted(str(file) for file in files if file.suffix in SUFFIXES)


def nearby(path: Path) -> str:
    """A hint for a recipe that is not there: the nearest one of its folder or of ./recipes, or all of them."""
    recipes = recipe_files(path.parent)
    if not recipes:
        return f"there are no recipes (*.yaml) in {path.parent} or ./{RECIPE_FOLDER}"
    same = [recipe for recipe in recipes if Path(recipe).stem == path.stem]
    return nearest(same[0] if same else str(path), recipes)


def _shipped(name: str, shipped: Iterable[str]) -> str | None:
    """The full name of a shipped recipe that is named with or without its folder."""
    alike = [known for known in shipped if name in (known, known.rpartition("/")[2])]
    return alike[0] if len(alike) == 1 else None


def _is_there(path: Path) -> bool:
    """Whether there is anything at a path; also where that cannot be, which is told by what reads the file."""
    try:
        return "\0" in str(path) or path.exists()
    except OSError:  # it is too long
        return True
