"""What is there of a recipe's stages in its run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pave_lightning.errors import PaveError
from pave_lightning.pipeline.bases import folder_of_base, reference_of_base
from pave_lightning.pipeline.run_folder import Manifest, RunFolder
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.task import Task
from pave_lightning.weights import model_digest
from pave_lightning.weights.checkpoint import stored_tensors, weight_files


class Kept(Protocol):
    """What a run folder keeps; see `Stage`, which says more of it."""

    @property
    def name(self) -> str:
        """Its folder below the run folder."""

    @property
    def made_by(self) -> str:
        """The command that makes it, in full."""

    def inputs(self) -> dict[str, Any]:
        """Everything that it depends on, as plain JSON values."""


class Results:
    """A recipe, and what is there of it in its run folder.

    Args:
        recipe: what is to be done.
        folder: where results are kept.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder
        self._names: dict[tuple[str, str], str] = {}

    def path(self, stage: Kept) -> Path:
        """The folder of a stage."""
        return self.folder.path(stage.name)

    def current(self, stage: Kept) -> Manifest | None:
        """The stage's manifest, if it is finished and was made from these very inputs."""
        return self.folder.current(stage.name, stage.inputs())

    def finished(self, stage: Kept) -> Manifest:
        """The stage's manifest.

        Raises:
            PaveError: it is missing or stale; the message names the command that makes it.
        """
        found = self.current(stage)
        if found is None:
            damage = self.folder.damage(stage.name)
            known = self.folder.manifest(stage.name) is not None
            state = "stale: its inputs have changed" if known else f"damaged: {damage}" if damage else "not there yet"
            raise PaveError(f"{self.path(stage)} is {state}; run `{stage.made_by}` with this recipe, or `pave run`")
        return found

    def place(self, stage: Kept) -> Path:
        """Where the result of a finished stage is: in its own folder, or in one that it only notes.

        Raises:
            PaveError: as `finished`.
        """
        found = self.finished(stage)
        return Path(found.result["folder"]) if "folder" in found.result else self.path(stage)

    def is_there(self, stage: Kept) -> bool:
        """Whether the stage is finished and was made from these very inputs, as everything that it builds on."""
        with suppress(PaveError):  # something that it builds on is not there or stale itself
            return self.current(stage) is not None
        return False

    def state(self, stage: Kept) -> str:
        """Whether the stage's result is there, stale, damaged, or to do."""
        if self.is_there(stage):
            return "there"
        if self.folder.damage(stage.name):
            return "damaged"
        return "stale" if self.folder.manifest(stage.name) is not None else "to do"

    def name_for(self, folder: str, task: Task, inputs: Callable[[], Mapping[str, Any]]) -> str:
        """The name of a task's stage; in a shared folder with a mark that tells different inputs apart."""
        if self.folder.shared is None:
            return f"{folder}{task.name}"
        if (folder, task.name) not in self._names:
            self._names[folder, task.name] = f"{folder}{task.name}-{short_digest(inputs())}"
        return self._names[folder, task.name]

    @cached_property
    def base_reference(self) -> str:
        """How the base is named, as `locate_model` takes it."""
        return str(reference_of_base(self.recipe))

    @cached_property
    def base_folder(self) -> Path:
        """Where the base is."""
        return folder_of_base(self.recipe)

    @cached_property
    def base_in_halves(self) -> bool:
        """Whether the base holds weights in half precision, to which merged ones are rounded unless told otherwise."""
        halves = ("F16", "BF16")
        files = weight_files(self.base_folder)
        return any(stored.dtype in halves for file in files for stored in stored_tensors(file).values())

    @cached_property
    def base_digest(self) -> str:
        """What identifies the base."""
        return model_digest(self.base_folder)


def short_digest(values: Mapping[str, Any]) -> str:
    """Eight characters that tell values apart in folder names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
