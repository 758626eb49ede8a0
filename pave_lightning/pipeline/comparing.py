"""``pave compare``: two models of a run, from what its folder keeps of their predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pave_lightning.errors import PaveError, Problems, counted, listed, nearest, shortened
from pave_lightning.pipeline.kept_scores import EXPERTS, Scored, scored_labels
from pave_lightning.reporting.bootstrap import bootstrap_intervals
from pave_lightning.reporting.comparison import (
    Disagreements,
    columns_of,
    comparison_table,
    disagreements,
    has_all_experts,
)
from pave_lightning.reporting.scores import ScoreTable
from pave_lightning.system.files import replacing
from pave_lightning.system.terminal import terminal

if TYPE_CHECKING:
    import pandas as pd

    from pave_lightning.recipe.schema import Recipe

ENDINGS = (".csv", ".parquet")
# How much of a row's text is shown.
TEXT_WIDTH = 160


def compare(
    run: str | Path,
    first: str | None = None,
    second: str | None = None,
    *,
    task: str | None = None,
    metric: str | None = None,
    rows: int = 5,
    output: str | Path | None = None,
    console: Console | None = None,
) -> None:
    """Print how two models of a run differ, with intervals, and where they disagree; without names, which there are.

    Args:
        run: the run folder.
        first: name of a model, A: its folder below ``scores``.
        second: name of another model, B.
        task: only this task.
        metric: this metric instead of each task's primary one.
        rows: how many rows of disagreement are shown of each task.
        output: a .csv or .parquet file for all disagreements.
        console: where to print.

    Raises:
        PaveError: the folder or a model is not there, or the models were scored on different rows.
    """
    run, console = Path(run), console or terminal()
    labels = scored_labels(run)
    if first is None:
        console.print(f"models in {run}:", soft_wrap=True, highlight=False)
        for label in labels:
            console.print(f"  {label}", soft_wrap=True, highlight=False)
        return
    _check(run, labels, (first, second), rows, output)
    pair = _Pair(Scored.read(run, first), Scored.read(run, str(second)))
    metrics = pair.metrics(task, metric)
    models = [pair.a, pair.b]
    if EXPERTS in labels and EXPERTS not in (first, second):
        models.append(Scored.read(run, EXPERTS))
    table = _table(models, pair, metrics)
    found = {name: pair.disagreements(name) for name in metrics if pair.has_predictions(name)}
    console.print(f"A: {first}\nB: {second}", soft_wrap=True, highlight=False)
    models_shown = (pair.a.model, pair.b.model)
    console.print(comparison_table(table, *models_shown, found, averages=len(metrics) > 1), highlight=False)
    numbers = any(not pair.a.predictions[name].are_classes for name in found)
    console.print(
        "Intervals are over test rows, paired: both models on the same rows. beyond chance: whether the interval"
        " excludes zero." + (" Of numbers, right means nearer to the target." if numbers else ""),
        highlight=False,
    )
    if has_all_experts(table) and table.left_out_note():
        console.print(table.left_out_note(), highlight=False)
    texts = _Texts(run, pair.a) if rows or output else None
    if rows:
        for name, one in found.items():
            for line in _row_lines(name, pair.frame(name, one.first_ones(rows), texts), len(one.places)):
                console.print(line, soft_wrap=True, highlight=False)
        if texts is not None and texts.problem:
            console.print(f"without texts: {texts.problem}", soft_wrap=True, highlight=False)
    if output is not None:
        _write(Path(output), [pair.frame(name, one, texts) for name, one in found.items() if len(one.places)])
        console.print(f"disagreements: {output}", soft_wrap=True, highlight=False)


def _check(
    run: Path, labels: Sequence[str], names: tuple[str, str | None], rows: int, output: str | Path | None
) -> None:
    """Find everything that is wrong with what was asked for.

    Raises:
        PaveError: lists it.
    """
    problems = Problems("these models cannot be compared:")
    first, second = names
    for name in names:
        if name is not None and name not in labels:
            problems.add(f"{run} has no scores of '{shortened(name)}'; {nearest(name, labels)}")
    if second is None:
        problems.add(f"expected two models, found only '{first}'; `pave compare {run}` lists them")
    elif first == second:
        problems.add(f"expected two different models, found '{first}' twice")
    if rows < 0:
        problems.add(f"--rows: expected 0 or more, found {rows}")
    if output is not None and Path(output).suffix.lower() not in ENDINGS:
        problems.add(f"--output: expected a file that ends in {' or '.join(ENDINGS)}, found {output}")
    elif output is not None and Path(output).is_dir():
        problems.add(f"--output: {output} is a folder; give the path of a file")
    problems.raise_if_any()


@dataclass(frozen=True)
class _Pair:
    """Two models, A and B."""

    a: Scored
    b: Scored

    def metrics(self, task: str | None, metric: str | None) -> dict[str, str]:
        """The metric in which each task is compared.

        Args:
            task: only this one.
            metric: this one instead of each task's primary one.

        Raises:
            PaveError: there is no such task or metric, or the models were scored on different rows.
        """
        a, b = self.a, self.b
        tasks = [name for name in a.scores if name in b.scores]
        if not tasks:
            raise PaveError(f"{a.label} and {b.label} have no task in common")
        problems = Problems(f"{a.label} and {b.label} cannot be compared:")
        if task is not None and task not in tasks:
            problems.add(f"--task {shortened(task)}: they have no such task; {nearest(task, tasks)}")
        wanted = [name for name in tasks if task in (None, name)]
        different = [name for name in wanted if not self._on_same_rows(name)]
        if different:
            problems.add(
                f"they were scored on different rows of {listed(different)}; run `pave evaluate` with one recipe for "
                "both"
            )
        measured = {name: [m for m in a.scores[name]["metrics"] if m in b.scores[name]["metrics"]] for name in wanted}
        chosen = {name: metric or str(a.tasks[name]["metrics"][1]) for name in wanted}
        known = list(dict.fromkeys(name for names in measured.values() for name in names))
        if metric is not None and wanted and metric not in known:
            problems.add(f"--metric {shortened(metric)}: it was not measured; {nearest(metric, known)}")
        problems.raise_if_any()
        return {name: found for name, found in chosen.items() if found in measured[name]}

    def has_predictions(self, task: str) -> bool:
        """Whether those of both are kept."""
        return task in self.a.predictions and task in self.b.predictions

    def disagreements(self, task: str) -> Disagreements:
        """Where they disagree."""
        return disagreements(self.a.predictions[task], self.b.predictions[task])

    def frame(self, task: str, found: Disagreements, texts: _Texts | None) -> pd.DataFrame:
        """One row a disagreement: the columns of `columns_of`, ``file_row`` and ``text``."""
        import pandas as pd

        predictions = (self.a.predictions[task], self.b.predictions[task])
        frame = pd.DataFrame(columns_of(task, *predictions, found, self.a.classes.get(task, [])))
        rows = frame["row"].tolist()
        text, places = ([""] * len(rows), [None] * len(rows)) if texts is None else texts.of(task, rows)
        return frame.assign(file_row=pd.array(places, dtype="Int64"), text=text)

    def _on_same_rows(self, task: str) -> bool:
        alike = self.a.scored_like(self.b, task)
        return alike and (
            not self.has_predictions(task) or self.a.predictions[task].same_rows(self.b.predictions[task])
        )


def _table(models: Sequence[Scored], pair: _Pair, metrics: Mapping[str, str]) -> ScoreTable:
    """The scores of the pair, and of the experts where they are of the same rows, with intervals."""
    scores, predictions = [], {}
    for one in models:
        tasks = [task for task in metrics if task in one.tasks and one.scored_like(pair.a, task)]
        alike = {task: metrics[task] for task in tasks}
        scores += one.score_rows(alike)
        predictions[one.model] = {task: one.predictions[task] for task in alike if task in one.predictions}
    seed = next((int(found["examples"][1]) for found in pair.a.tasks.values() if "examples" in found), 0)
    compared = [(pair.a.model, pair.b.model)]
    intervals = bootstrap_intervals(ScoreTable(scores), predictions, seed=seed, pairs=compared)
    return ScoreTable(scores, intervals=intervals)


class _Texts:
    """The texts of test rows, where the run folder's copies or the recipe's data still have them.

    Args:
        run: the run folder.
        scored: a model, whose scores say which rows they are.
    """

    def __init__(self, run: Path, scored: Scored) -> None:
        self._run, self._scored = run, scored
        self._recipe: Recipe | None = None
        self.problem = ""
        from pave_lightning.recipe.loading import load_recipe

        try:
            self._recipe = load_recipe(run / "recipe.yaml")
        except PaveError as error:
            self.problem = str(error).partition("\n")[0]

    def of(self, task: str, rows: Sequence[int]) -> tuple[list[str], list[int | None]]:
        """Texts, and numbers in the file, of some rows; nothing of those that cannot be read."""
        nothing: tuple[list[str], list[int | None]] = ([""] * len(rows), [None] * len(rows))
        recipe = self._recipe
        if recipe is None or task not in [one.name for one in recipe.tasks]:
            return nothing
        import pyarrow as pa

        from pave_lightning.tasks.data import earlier_rows

        facts, own = self._scored.tasks[task], recipe.task(task)
        shared = Path(recipe.shared) if recipe.shared is not None else self._run
        wanted, seed = facts["examples"]
        own = own.model_copy(update={"examples": own.examples.model_copy(update={"test": wanted})})
        try:
            table, places = earlier_rows(own, "test", facts["data"], seed=seed, cache_dir=shared / "data")
        except PaveError as error:
            self.problem = str(error).partition("\n")[0]
            return nothing
        if len(rows) and max(rows) >= len(table):
            return nothing
        shown = [name for name in own.columns if name not in own.label_columns]
        used = table.select(shown).take(pa.array(rows, pa.int64())).to_pylist()
        texts = [" | ".join(_text(value) for value in row.values()) for row in used]
        return texts, [int(places[row]) for row in rows]


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row_lines(task: str, frame: pd.DataFrame, count: int) -> list[str]:
    """The first disagreements of a task, of which there are so many in all, one line each below a heading."""
    if not count:
        return ["", f"{task}: A and B never disagree"]
    first = "" if len(frame) == count else f", the first {len(frame)}"
    order = "; the largest differences first" if (frame["target_class"] == "").all() else ""
    lines = ["", f"{task}: {counted(count, 'disagreement')}{first}{order}"]
    several = (frame["position"] > 0).any()
    for row in frame.to_dict("records"):
        place = f"row {row['row']}" + (f", prediction {row['position']}" if several else "")
        target, a, b = (row[f"{name}_class"] or f"{row[name]:.3g}" for name in ("target", "a", "b"))
        text = shortened(" ".join(row["text"].split()), TEXT_WIDTH)
        lines.append(f"  {place}: target {target}, A {a}, B {b}" + (f": {text}" if text else ""))
    return lines


def _write(path: Path, frames: Sequence[pd.DataFrame]) -> None:
    """All disagreements as one table."""
    import pandas as pd

    whole = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"task": []})
    with replacing(path) as unfinished:
        if path.suffix.lower() == ".csv":
            whole.to_csv(unfinished, index=False)
        else:
            whole.to_parquet(unfinished, index=False)
