"""What runs of each kind on each family, and the page that shows it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers as hf
from transformers.utils import logging as hf_logging

from kinds_by_family.bases import write_base
from kinds_by_family.rows import KINDS, task
from pave_lightning import Recipe, load_merged
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.report import collect_scores
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.runner import Runner
from pave_lightning.pipeline.stages import CaptureStage, stages_of
from pave_lightning.tasks.task import kind_named

PAGE = Path(__file__).parents[2] / "docs" / "kinds.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
NONE, REFUSED = "", "refused"
# Models that are merged whole: two tasks of one kind share all of it.
WHOLE = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_log = logging.getLogger(__name__)


def walk(family: str, folder: Path) -> dict[str, str]:
    """Run all kinds on a family; what came of each, as the page shows it."""
    hf_logging.set_verbosity_error()
    config = write_base(family, folder / "base")
    cells = dict.fromkeys(KINDS, NONE)
    heads: dict[str, list[str]] = {}
    for kind in KINDS:
        if _has_class(kind, config):
            heads.setdefault(kind_named(kind).auto_model, []).append(kind)
    headed = [kind for name, kinds in heads.items() if name not in WHOLE for kind in kinds]
    found = _run(headed, folder, "together") if headed else {}
    if REFUSED in found.values():
        found = {}
        for name in heads.keys() - set(WHOLE):
            found |= _run(heads[name], folder, name)
    for name in heads.keys() & set(WHOLE):
        found |= _run(heads[name], folder, name)
    return cells | found


def _has_class(kind: str, config: Any) -> bool:
    """Whether transformers has a model of this kind for a configuration."""
    reads = kind_named(kind).reads_tokens
    return (
        reads == hasattr(config, "vocab_size")
        and type(config) in getattr(hf, kind_named(kind).auto_model)._model_mapping
    )


def _run(kinds: list[str], folder: Path, name: str) -> dict[str, str]:
    """Fine-tune, capture, purify, merge and score; for each kind how many layers were captured."""
    tasks = [(kind, kind) for kind in kinds] + ([(kinds[0], "another")] if len(kinds) == 1 else [])
    rows = folder / "rows" / name
    rows.mkdir(parents=True)
    recipe = Recipe.model_validate(
        {
            "name": name,
            "base": str(folder / "base"),
            "output": str(folder / "runs"),
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
            "training": {"batch_size": 8, "max_length": 24},
            "tasks": [task(kind, called, rows) for kind, called in tasks],
            "capture": {"examples": 8, "batch_size": 8, "convolutions": True},
            "merge": [{"method": "task_arithmetic", "scale": 0.5}],
            "tracking": {"uri": f"sqlite:///{folder / 'no.db'}"},
        }
    )
    place = open_folder(recipe)
    try:
        check_recipe(recipe, place)
    except PaveError as error:
        _log.info("%s, %s: %s", folder, name, error)
        return dict.fromkeys(kinds, REFUSED)
    runner = Runner(Context(Results(recipe, place)))
    runner.run(stages_of(runner.results))
    _check_scores(recipe, runner.results)
    captured = _captured(runner.results)
    for vectors in ("plain", "purified"):
        for one in recipe.tasks:
            model = load_merged(place.root / "merged" / f"task_arithmetic-{vectors}", one.name)
            assert (
                isinstance(model, getattr(hf, one.auto_model)._model_mapping[type(model.config)])
                or one.has_head is False
            )
    return {kind: f"{captured[kind]} layers" for kind in kinds}


def _check_scores(recipe: Recipe, results: Results) -> None:
    table = collect_scores(results)
    values = [score.value for score in table.scores]
    assert np.isfinite(values).all()
    models = {(score.model, score.vectors) for score in table.scores}
    assert models == {("base", ""), ("experts", ""), ("task_arithmetic", "plain"), ("task_arithmetic", "purified")}
    assert {score.task for score in table.scores} == {one.name for one in recipe.tasks}


def _captured(results: Results) -> Mapping[str, int]:
    """How many layers were captured of each task."""
    found = {}
    for stage in stages_of(results):
        if isinstance(stage, CaptureStage):
            found[stage.task.name] = len(list(stage.load().layers()))
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def line(family: str, cells: Mapping[str, str]) -> str:
    """One line of the table."""
    return f"| {' | '.join([family, *(cells[kind] for kind in KINDS)])} |"


def shown() -> dict[str, str]:
    """The lines of the page's table, by family."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    return {text.split("|")[1].strip(): text for text in table}


def write(lines: list[str]) -> None:
    """Put a table into the page in place of the one that is there."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    header = f"| family | {' | '.join(f'`{kind}`' for kind in KINDS)} |\n|{'---|' * (len(KINDS) + 1)}"
    PAGE.write_text(before + "\n".join([BEGIN, header, *lines, END]) + rest.partition(END)[2], encoding="utf-8")
