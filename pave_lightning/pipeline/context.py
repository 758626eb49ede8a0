"""What the stages of a recipe share while they work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from pave_lightning.pipeline.results import Kept, Results
from pave_lightning.pipeline.run_folder import RunFolder, StageWriter
from pave_lightning.recipe.schema import Recipe
from pave_lightning.system.process_groups import ALONE, ProcessGroup
from pave_lightning.tracking import Tracker, record_stage
from pave_lightning.tracking.record import Kind
from pave_lightning.weights import Architecture, Checkpoint
from pave_lightning.weights.coverage import Coverage


class Context:
    """What the stages of one recipe share: the base, the run folder, the record, and all that they load.

    What a stage leaves is loaded by a function in the stage's own file, once for all others (see `shared`).

    Args:
        results: the recipe, and what is there of it.
        tracker: the MLflow record; None in processes that are not rank zero.
        label: what the names of its runs in MLflow begin with.
        references: validation scores of experts, which normalise those of merged models, by what they depend on;
            filled on the way, so that several recipes may share them.
        allow_code: whether code that models write may be run, which the command line alone can say.
        group: the processes that share the work of stages that can be divided.

    Attributes:
        loaded: what was loaded, by the function that did it.
    """

    def __init__(
        self,
        results: Results,
        tracker: Tracker | None = None,
        *,
        label: str = "",
        references: dict[str, dict[int | None, dict[str, float]]] | None = None,
        allow_code: bool = False,
        group: ProcessGroup = ALONE,
    ) -> None:
        self.results, self.tracker, self.label, self.group = results, tracker, label, group
        self.allow_code = allow_code
        self.references = {} if references is None else references
        self.loaded: dict[Callable[[Context], Any], Any] = {}

    @property
    def recipe(self) -> Recipe:
        """What is to be done."""
        return self.results.recipe

    @property
    def folder(self) -> RunFolder:
        """Where results are kept."""
        return self.results.folder

    # ---- the base --------------------------------------------------------------------------------------------------

    @property
    def base_folder(self) -> Path:
        """Where the base is."""
        return self.results.base_folder

    @cached_property
    def architecture(self) -> Architecture:
        """What the base's parameters are."""
        return Architecture.of_folder(self.base_folder, *self.recipe.auto_models)

    @cached_property
    def base(self) -> Checkpoint:
        """The base's checkpoint."""
        return self.architecture.base_checkpoint(self.base_folder)

    @cached_property
    def coverage(self) -> Coverage:
        """What merging and purification leave out of the model."""
        return Coverage.of(self.base, self.architecture, convolutions=self.recipe.capture.convolutions)

    @property
    def token_rows(self) -> int:
        """Rows of the base's token embedding."""
        stored = [self.base.backbone.get(name) for name in self.architecture.token_embeddings]
        return next((found.shape[0] for found in stored if found is not None), 0)

    # ---- what is written and recorded ------------------------------------------------------------------------------

    def writing(self, stage: Kept) -> AbstractContextManager[StageWriter]:
        """Write a stage: all of it appears under its final name at once, or nothing does."""
        return self.folder.writing(stage.name, stage.inputs())

    @contextmanager
    def writing_together(self, stage: Kept) -> Iterator[StageWriter]:
        """As `writing`, into one folder by all processes that share the stage; what the first one says of it counts."""
        if self.group.size == 1:
            with self.writing(stage) as writer:
                yield writer
        elif self.group.is_first:
            with self.writing(stage) as writer:
                self.group.from_first(str(writer.path))
                yield writer
                self.group.wait()  # until the others have written all
            self.group.wait()  # until the folder has its name
        else:
            yield StageWriter(Path(self.group.from_first("")))
            self.group.wait()
            self.group.wait()

    def child(self, run: str, stage: str, params: Mapping[str, Any]) -> str:
        """Begin a run of MLflow; its id, or nothing where nothing is recorded."""
        return "" if self.tracker is None else self.tracker.child(f"{self.label}{run}", stage=stage, params=params)

    def record(self, kind: Kind, run: str, result: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        """Let MLflow have what a manifest says, whether the stage was made now or before."""
        if self.tracker is not None:
            record_stage(self.tracker, f"{self.label}{run}", kind, result, params)


T = TypeVar("T")


def shared(load: Callable[[Context], T]) -> Callable[[Context], T]:
    """Decorator: what a function makes of a context is made when it is first asked for, and kept with the context."""

    @wraps(load)
    def once(context: Context) -> T:
        if load not in context.loaded:
            context.loaded[load] = load(context)
        return cast(T, context.loaded[load])

    return once
