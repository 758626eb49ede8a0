"""What a stage is, and what is there of a recipe's stages in its run folder."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pave_lightning.errors import PaveError
from pave_lightning.pipeline.run_folder import Manifest, RunFolder
from pave_lightning.recipe.schema import Recipe, Task
from pave_lightning.weights import locate_model, model_digest

if TYPE_CHECKING:
    from pave_lightning.pipeline.context import Context


class Stage(ABC):
    """One piece of a recipe's work, which leaves one folder.

    What a stage says of itself takes no model and no trainer, so that a plan can ask it as well; a file of a stage
    imports what only the work needs inside of `run`.

    Nothing has to be undone where a stage breaks off: it writes through `Context.writing`, which gives its folder the
    final name in the end or else removes it. What a killed process left is cleared away when the run folder, or a
    stage that is shared, is held the next time (`RunFolder.locked`, `RunFolder.claimed`).

    Attributes:
        command: the command that makes it, as in ``pave COMMAND RECIPE``.
        on_demand: whether it is made by whatever needs it, because it has no command of its own.
        announced: whether the log says where it is up to date.
        task: the task that its command can be asked for alone; None where there is no such choice.
        results: the recipe, and what is there of it.
    """

    command: ClassVar[str]
    on_demand: ClassVar[bool] = False
    announced: ClassVar[bool] = True
    task: Task | None = None

    def __init__(self, results: Results) -> None:
        self.results = results
        self._begun: dict[str, Any] | None = None

    @classmethod
    @abstractmethod
    def all(cls, results: Results) -> Iterable[Stage]:
        """What the command makes for a recipe, in the order of work."""

    @classmethod
    def asked(cls, results: Results) -> Iterable[Stage]:
        """What a whole run of a recipe makes; in a plan with what is needed for it."""
        return cls.all(results)

    @property
    @abstractmethod
    def name(self) -> str:
        """The stage's name, which is its folder below the run folder."""

    @abstractmethod
    def about(self) -> str:
        """What the stage does, in one line, for a plan."""

    def needs(self) -> Sequence[Stage]:
        """The stages that it builds on."""
        return ()

    @abstractmethod
    def depends_on(self) -> dict[str, Any]:
        """Everything that the result depends on, as plain JSON values; see `inputs`."""

    @abstractmethod
    def run(self, context: Context) -> None:
        """Do the work and write the result; all processes of the stage call it, of which only rank zero writes."""

    def record(self, context: Context, found: Manifest) -> None:
        """Let MLflow have what the manifest says, whether the stage was made now or before."""
        return

    @property
    def trainer(self) -> Mapping[str, Any] | None:
        """Options of the trainer that it uses, which may start several processes; None where it uses none."""
        return None

    @property
    def made_by(self) -> str:
        """The command that makes it, in full."""
        return f"pave {self.command}"

    def inputs(self) -> dict[str, Any]:
        """Everything that the result depends on, as plain JSON values.

        Raises:
            PaveError: something that it builds on is missing or stale itself.
        """
        return self.depends_on() if self._begun is None else self._begun

    def begun(self) -> Self:
        """The stage with its inputs as they are now: a file that changes while it works must not count as its input."""
        begun = copy(self)
        begun._begun = self.inputs()
        return begun

    def needed(self) -> Iterator[Stage]:
        """All that it builds on, each after what that builds on itself; stages may come more than once."""
        for stage in self.needs():
            yield from stage.needed()
            yield stage


class Results:
    """A recipe, and what is there of it in its run folder.

    Args:
        recipe: what is to be done.
        folder: where results are kept.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder
        self._names: dict[tuple[str, str], str] = {}

    def path(self, stage: Stage) -> Path:
        """The folder of a stage."""
        return self.folder.path(stage.name)

    def current(self, stage: Stage) -> Manifest | None:
        """The stage's manifest, if it is finished and was made from these very inputs."""
        return self.folder.current(stage.name, stage.inputs())

    def finished(self, stage: Stage) -> Manifest:
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

    def is_there(self, stage: Stage) -> bool:
        """Whether the stage is finished and was made from these very inputs, as everything that it builds on."""
        with suppress(PaveError):  # something that it builds on is not there or stale itself
            return self.current(stage) is not None
        return False

    def state(self, stage: Stage) -> str:
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
    def base_folder(self) -> Path:
        """Where the base is."""
        return locate_model(self.recipe.base, role="base")

    @cached_property
    def base_digest(self) -> str:
        """What identifies the base."""
        return model_digest(self.base_folder)


def short_digest(values: Mapping[str, Any]) -> str:
    """Eight characters that tell values apart in folder names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
