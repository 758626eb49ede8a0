"""The commands behind the command line, callable from Python as well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from pave_lightning.errors import PaveError, nearest
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.recipe.loading import load_recipe, recipe_digest, recipe_to_yaml
from pave_lightning.recipe.schema import Recipe
from pave_lightning.system.interrupts import stoppable
from pave_lightning.system.keeping import keeping
from pave_lightning.system.process_groups import process_group
from pave_lightning.system.processes import is_launched, refuse_foreign_launchers
from pave_lightning.system.terminal import terminal

if TYPE_CHECKING:
    from pave_lightning.pipeline.runner import Runner


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe`, with mistakes in the options of merge methods and transforms told beside those of the recipe."""

    def problems(recipe: Recipe) -> Iterable[tuple[tuple[str | int, ...], str]]:
        from pave_lightning.pipeline.planning import option_problems

        return option_problems(recipe)

    return load_recipe(path, overrides, option_problems=problems)


def run_recipe(recipe: Recipe, *, verify: bool = False, allow_code: bool = False) -> Path:
    """Run a recipe to its end: fit, capture, purify, merge, evaluate, report. Finished stages are not run again.

    Args:
        recipe: the recipe.
        verify: hash every input and every result that is there, whatever their sizes and times say.
        allow_code: whether benchmarks may run code that models write, and Python files beside task files.

    Returns:
        The run folder.

    Raises:
        PaveError: something is wrong with the recipe, its data or its models; found before anything runs where it can.
    """
    from pave_lightning.pipeline.report import write_report
    from pave_lightning.pipeline.stages import stages_of

    with working(recipe, verify=verify, evaluates=True, allow_code=allow_code) as runner:
        runner.run(stages_of(runner.results))
        write_report(runner)
    return Path(recipe.output) / recipe.name


def run_stage(recipe: Recipe, command: str, task: str | None = None, *, allow_code: bool = False) -> None:
    """Make what one command makes, for one task or (fit, capture) for all.

    Args:
        recipe: the recipe.
        command: fit, capture, purify, diagnose, merge, evaluate or report.
        task: the name of the only task; for fit and capture.
        allow_code: as in `run_recipe`; for evaluate.

    Raises:
        PaveError: what the stage builds on is missing or stale; the message names the command that makes it.
    """
    names = [entry.name for entry in recipe.tasks]
    if task is not None and task not in names:
        raise PaveError(f"--task {task}: the recipe has no such task; {nearest(task, names)}")
    if command == "report":
        from pave_lightning.pipeline.report import write_report

        with working(recipe, computes=False) as runner:
            write_report(runner)
        return
    from pave_lightning.pipeline.stages import kinds_of

    with working(recipe, evaluates=command == "evaluate", allow_code=allow_code) as runner:
        made = [stage for kind in kinds_of(command) for stage in kind.all(runner.results)]
        runner.run(stage for stage in made if task is None or (stage.task is not None and stage.task.name == task))
        if command in ("purify", "diagnose"):
            _tell([runner.results.path(stage) for stage in made])
        if command == "diagnose" and not is_launched():
            terminal().print("`pave report` puts them on the page report.html", soft_wrap=True)
        if command == "evaluate" and not is_launched():
            _tell([runner.results.folder.path("scores")])
            terminal().print("`pave report` makes tables, pictures and the page report.html of them", soft_wrap=True)


def _tell(folders: Sequence[Path]) -> None:
    """Say where results are."""
    for folder in folders:
        terminal().print(f"results: {folder}", soft_wrap=True)


def plan_recipe(
    recipe: Recipe, console: Console | None = None, *, verify: bool = False, allow_code: bool = False
) -> None:
    """Check everything, run nothing, and print what would be done.

    Args:
        recipe: the recipe.
        console: where to print.
        verify: hash every input and every result that is there, whatever their sizes and times say.
        allow_code: whether benchmarks that run code are looked at as well, which runs their own.

    Raises:
        PaveError: lists everything that is wrong.
    """
    from pave_lightning.pipeline.planning import (
        benchmark_lines,
        check_recipe,
        cost_table,
        coverage_lines,
        plan_rows,
        token_notes,
        weight_notes,
    )

    console = console or terminal()
    with planning_folder(recipe, verify=verify) as folder:
        check_recipe(recipe, folder, evaluates=True, allow_code=allow_code or None)
        table = Table()
        for heading in ("stage", "result", "what"):
            table.add_column(heading)
        for row in plan_rows(recipe, folder):
            table.add_row(*row)
        print_under(f"{recipe.name} in {folder.root}", table, console)
        console.print(cost_table(recipe, folder))
        for line in benchmark_lines(recipe):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        for note in (*weight_notes(recipe), *token_notes(recipe)):
            console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
        for line in coverage_lines(recipe, folder):
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def print_under(heading: str, table: Table, console: Console) -> None:
    """Print a table below a heading on one line; a title of its own would be broken to the table's width."""
    console.print(heading, soft_wrap=True, markup=False, highlight=False)
    console.print(table)


def open_folder(recipe: Recipe, data: Path | None = None, *, verify: bool = False) -> RunFolder:
    """The recipe's run folder, which need not be there; with copies of its rows in another place where one is given."""
    shared = None if recipe.shared is None else Path(recipe.shared)
    return RunFolder(Path(recipe.output) / recipe.name, shared, data, verify=verify)


@contextmanager
def planning_folder(recipe: Recipe, *, verify: bool = False) -> Iterator[RunFolder]:
    """The recipe's run folder, for looking at it; copies of rows that are made for that are removed in the end."""
    refuse_foreign_launchers()
    folder = open_folder(recipe, verify=verify)
    if folder.data.is_dir():
        with keeping():
            yield folder
        folder.note_hashes()
        return
    with TemporaryDirectory(prefix="pave-plan-") as copies, keeping():
        yield open_folder(recipe, Path(copies), verify=verify)


@contextmanager
def working(
    recipe: Recipe, *, computes: bool = True, verify: bool = False, evaluates: bool = False, allow_code: bool = False
) -> Iterator[Runner]:
    """A runner over the recipe's run folder: checked, locked and recorded in MLflow.

    Inside a process that a driver started, the driver has done all this, and only rank zero records. What computes
    nothing asks nothing of the machine's devices.
    """
    refuse_foreign_launchers()  # before Lightning is loaded
    from pave_lightning.pipeline.context import Context
    from pave_lightning.pipeline.launching import attached_tracker
    from pave_lightning.pipeline.results import Results
    from pave_lightning.pipeline.runner import Runner

    folder = open_folder(recipe, verify=verify)
    results = Results(recipe, folder)
    if is_launched():
        context = Context(results, attached_tracker(), allow_code=allow_code, group=process_group())
        yield Runner(context)
        return

    from pave_lightning.pipeline.launching import Launcher
    from pave_lightning.pipeline.planning import check_recipe
    from pave_lightning.tracking import Tracker, environment_tags

    with folder.locked(), stoppable():
        check_recipe(recipe, folder, computes=computes, evaluates=evaluates, allow_code=allow_code)
        resolved = folder.write_text("recipe.yaml", recipe_to_yaml(recipe))
        tracker = Tracker(
            recipe.tracking.uri,
            recipe.tracking.experiment,
            recipe.name,
            key=f"{folder.root.resolve()}:{recipe_digest(recipe)}",
            params={
                "base": str(recipe.base),
                "seed": recipe.seed,
                "tasks": ", ".join(task.name for task in recipe.tasks),
                "capture": recipe.capture.model_dump(),
                "purify": recipe.purify.model_dump(),
                "trainer": recipe.trainer,
            },
            tags=environment_tags(),
        )
        with tracker.recorded(), stoppable():  # inside of the record, which says whether the run failed or was stopped
            tracker.log_file(tracker.parent_run_id, resolved)
            yield Runner(Context(results, tracker, allow_code=allow_code), Launcher(allow_code=allow_code))
