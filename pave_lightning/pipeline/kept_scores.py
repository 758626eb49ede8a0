"""What a run folder keeps of the models that were scored in it, read without the recipe and without models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pave_lightning.errors import PaveError
from pave_lightning.pipeline.run_folder import MANIFEST, read_manifest
from pave_lightning.reporting.scores import Model, Score
from pave_lightning.system.files import DAMAGED, REPLACED, UNFINISHED
from pave_lightning.tasks.predictions import FILE, TaskPredictions, read_predictions

SCORES, BENCHMARKS = "scores", "benchmarks"
EXPERTS = "experts"
# What of a task must be the same for two scores of it to be of the same rows.
ROWS_ARE = ("data", "examples", "labelled")


@dataclass(frozen=True)
class Scored:
    """What a run folder keeps of one scored model.

    Attributes:
        label: its name below ``scores``.
        tasks: what each task's scores depend on.
        scores: metrics and number of examples, by task.
        predictions: by task.
        classes: names of the classes, by task.
    """

    label: str
    tasks: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, Mapping[str, Any]]
    predictions: Mapping[str, TaskPredictions]
    classes: Mapping[str, list[str]]

    @classmethod
    def read(cls, run: Path, label: str) -> Scored:
        """What is kept of a model.

        Raises:
            PaveError: it is damaged, or was made before predictions were kept.
        """
        folder = run / SCORES / label
        manifest, damage = read_manifest(folder)
        again = f"run `pave evaluate` with the recipe of this run ({run / 'recipe.yaml'})"
        if manifest is None:
            raise PaveError(f"{damage or f'{folder} is not there'}; {again}")
        if FILE not in manifest.files:
            raise PaveError(f"{folder} was made before predictions were kept; {again}")
        predictions, classes = read_predictions(folder / FILE)
        tasks, scores = dict(manifest.inputs["tasks"]), dict(manifest.result["scores"])
        for place in sorted((run / BENCHMARKS).glob(f"*/{label}")):
            found, _ = read_manifest(place)
            if found is None:
                continue
            for name, score in found.result["scores"].items():
                tasks[name] = {
                    "data": [found.inputs[key] for key in ("benchmark", "lm_eval", "files")],
                    "metrics": [list(score["metrics"]), score["primary"]],
                }
                scores[name] = score
            predictions |= read_predictions(place / FILE)[0]
        return cls(label, tasks, scores, predictions, classes)

    @property
    def model(self) -> Model:
        """It in a table."""
        return Model(self.label, "", "expert" if self.label == EXPERTS else "static")

    def scored_like(self, other: Scored, task: str) -> bool:
        """Whether another model's scores of a task are of the same rows."""
        one, two = self.tasks[task], other.tasks[task]
        return all(one.get(key) == two.get(key) for key in ROWS_ARE)

    def score_rows(self, metrics: Mapping[str, str]) -> list[Score]:
        """Its scores in one metric a task."""
        return [
            Score.of(
                self.model,
                task=task,
                metric=metric,
                is_primary=True,
                value=self.scores[task]["metrics"][metric],
                examples=self.scores[task]["examples"],
            )
            for task, metric in metrics.items()
            if metric in self.scores.get(task, {}).get("metrics", {})
        ]


def scored_labels(run: Path) -> list[str]:
    """The models that a run folder has scores of.

    Raises:
        PaveError: it is no run folder, or has none.
    """
    if not run.is_dir():
        raise PaveError(f"there is no folder {run}; give the folder of a run, such as checkpoints/quickstart")
    marks = (DAMAGED, UNFINISHED, REPLACED)
    found = sorted(
        folder.name
        for folder in (run / SCORES).glob("*")
        if (folder / MANIFEST).is_file() and not any(mark in folder.name for mark in marks)
    )
    if not found:
        raise PaveError(
            f"{run} has no scores; give the folder of a run, in which `pave run` or `pave evaluate` has left {SCORES}/"
        )
    return found
