"""What a stage is: one piece of a recipe's work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, ClassVar, Self

from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.run_folder import Manifest
from pave_lightning.tasks.task import Task


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
    def processes(self) -> int:
        """How many processes share its work, all of which call `run` and write through `Context.writing_together`."""
        return 1

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
