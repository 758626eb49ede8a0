"""The experts' matrix weights, purified."""

from __future__ import annotations

from typing import Any

from pave_lightning.errors import doing
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.purifications import label
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import expert_digests, expert_stages, plain_vectors
from pave_lightning.pipeline.stages.capture import CaptureStage, statistics, statistics_digests
from pave_lightning.purification import PurifiedTaskVectors, StoredPurification, write_purified
from pave_lightning.purification.options import Purify, ratios
from pave_lightning.subspace.parallel import limited_threads
from pave_lightning.weights import Checkpoint, TaskVectors

FORMAT = 3


class PurifyStage(Stage):
    """The experts' matrix weights, purified once for every stage that asks for the same.

    Args:
        results: the recipe, and what is there of it.
        options: the purification, of a ratio below 1: one of 1 leaves every expert as it is.
    """

    command = "merge"
    on_demand = True

    def __init__(self, results: Results, options: Purify) -> None:
        super().__init__(results)
        self.options = options

    @classmethod
    def all(cls, results: Results) -> tuple[()]:
        """None but those that other stages need."""
        return ()

    @property
    def name(self) -> str:
        """``purified/LABEL``."""
        return f"purified/{label(self.options)}"

    @property
    def processes(self) -> int:
        """As many as the recipe says; each purifies its own layers."""
        return self.results.recipe.compute.processes

    def about(self) -> str:
        """The purification in a few words."""
        return self.options.summary

    def needs(self) -> list[Stage]:
        """Experts and statistics."""
        return [*expert_stages(self.results), *CaptureStage.all(self.results)]

    def depends_on(self) -> dict[str, Any]:
        """Experts, statistics and options."""
        return purification_inputs(self.results, self.options)

    def run(self, context: Context) -> None:
        """Purify the weights of all tasks, layer by layer."""
        group = context.group
        threads = limited_threads(context.recipe.compute.threads_of_each(group.size))
        with doing(f"purify ({self.options.summary})"), threads, context.writing_together(self) as writer:
            vectors = purified_now(context, self.options)
            write_purified(vectors, writer.path, group)
            writer.result["ranks"] = [[r.task, r.layer, r.rank, r.full] for r in vectors.ranks.values()]
            writer.result["untouched"] = [[*key, reason] for key, reason in vectors.untouched.items()]


def purified_now(context: Context, options: Purify) -> PurifiedTaskVectors:
    """Task vectors that are purified as they are read."""
    return PurifiedTaskVectors(plain_vectors(context), statistics(context), options, context.recipe.compute)


def task_vectors(context: Context, options: Purify | None) -> TaskVectors:
    """Task vectors with a finished purification; the plain ones without, and for a ratio of 1, which is none.

    Raises:
        PaveError: the purified weights are missing or stale.
    """
    plain = plain_vectors(context)
    if options is None or options.changes_nothing:
        return plain
    stage = PurifyStage(context.results, options)
    context.results.finished(stage)
    folder, prefix = context.results.path(stage), context.architecture.prefix
    tasks = [name for name in plain.tasks if (folder / name).is_dir()]
    return StoredPurification(plain, {name: Checkpoint(folder / name, prefix) for name in tasks})


def purification_inputs(results: Results, options: Purify) -> dict[str, Any]:
    """What purified weights depend on.

    Raises:
        PaveError: an expert, or what it saw, is missing or stale.
    """
    # Inputs are compared without their order, which says whose statistics the other task's are.
    order = [task.name for task in results.recipe.tasks] if options.statistics == "other_task" else None
    return {
        **({"order": order} if order else {}),
        "format": FORMAT,
        "experts": expert_digests(results),
        "statistics": statistics_digests(results),
        "purify": options.model_dump(),
        **({} if results.recipe.compute.threads is None else {"threads": results.recipe.compute.threads}),
    }


def purify_stages(results: Results, options: Purify) -> list[PurifyStage]:
    """What a purification takes: several stages where its ratio is chosen, none where it leaves the experts alone."""
    return [PurifyStage(results, one) for one in ratios(options)]


def needed_for(results: Results, options: Purify) -> list[Stage]:
    """The stages that purified task vectors take; of a ratio of 1 the statistics count although nothing reads them."""
    return [*CaptureStage.all(results), *purify_stages(results, options)]
