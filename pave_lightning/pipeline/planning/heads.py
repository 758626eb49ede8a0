"""What is wrong with fitting heads to models, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pave_lightning.errors import PaveError, counted, listed
from pave_lightning.evaluation.heads import least_rows
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stages.evaluate import ScoredModel, scored_models
from pave_lightning.pipeline.stages.fit import encoded_rows
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.data import load_split, sample_rows
from pave_lightning.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("pave_lightning")


def head_problems(recipe: Recipe, cache: Path) -> Iterator[str]:
    """Tasks whose training rows have too few labels for the heads that are to be fitted.

    Rows that are to be fitted to and to be scored on alike are warned of.

    Args:
        recipe: what is checked.
        cache: folder of copies of rows.
    """
    asked, headless = recipe.fitted_heads, [task for task in recipe.tasks if not task.has_head]
    if asked and headless:
        names, kinds = listed([f"'{task.name}'" for task in headless]), listed(sorted({one.kind for one in headless}))
        why = listed(list(dict.fromkeys(task.headless_because for task in headless)))
        told = f"heads: {', '.join(one.label for one in asked)}: tasks of kind {kinds} ({names}) have no head to fit"
        if len(headless) == len(recipe.tasks):
            yield f"{told}, since {why}; leave 'heads' out"
        else:
            log.warning("%s; they are scored as they are", told)
    loaded: dict[str, tuple[pa.Table, set[str], pa.Table]] = {}
    for task in recipe.tasks if asked else ():
        if not task.has_head:
            continue
        with suppress(PaveError):  # told with what is wrong with the data
            training, test = (load_split(task, split, seed=recipe.seed, cache_dir=cache) for split in ("train", "test"))
            encoded = encoded_rows(recipe, task, cache).table("train")
            loaded[task.name] = training, set(_shown(task, test)), encoded
    for heads in asked:
        for task in recipe.tasks:
            if task.name not in loaded:
                continue
            least, (training, tested, encoded) = least_rows(task), loaded[task.name]
            places = sample_rows(len(training), heads.rows, recipe.seed)
            fitted = training.take(places)
            if also := sum(row in tested for row in _shown(task, fitted)):
                log.warning(
                    "task '%s': %s of the %s that its head is fitted to (%s) are in the test split as well; "
                    "its scores under that head are too good",
                    task.name,
                    f"{also:,}",
                    counted(len(fitted), "row"),
                    heads.label,
                )
            # Once a row, or once a word that is left.
            if (answered := len(task.scored_labels(encoded.take(places)))) < least:
                few = f"heads.rows is {heads.rows}" if heads.rows < len(training) else f"there are {len(training)}"
                yield (
                    f"task '{task.name}': fitting its head ({heads.label}) takes at least {least} labels in training "
                    f"rows, but {few}, with {counted(answered, 'label')}; give more, or set heads: expert"
                )


def _shown(task: Task, rows: pa.Table) -> Iterator[str]:
    """What a model is shown of each row, which its labels are not."""
    shown = [name for name in task.columns if name not in task.label_columns]
    return map(repr, rows.select(shown).to_pylist())


def score_folder_problems(results: Results) -> Iterator[str]:
    """Models whose scores would be written into one folder, which those under fitted heads share with merged ones."""
    first: dict[str, ScoredModel] = {}
    with suppress(PaveError):  # stacks that cannot be made are told with the merge steps
        for model in scored_models(results):
            other = first.setdefault(model.label.lower(), model)
            if (other.model, other.vectors, other.heads) != (model.model, model.vectors, model.heads):
                yield (
                    f"the scores of {other.words} and of {model.words} would be written into one folder, "
                    f"scores/{model.label}, at least on some file systems; give a merge step or a stack another name"
                )
