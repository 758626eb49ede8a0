"""The report of a sweep: its scores, their summary, a figure and the findings, as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from pave_lightning.reporting.sweep_findings import findings, findings_of
from pave_lightning.reporting.sweep_plot import draw, draw_scores
from pave_lightning.reporting.sweep_table import SweepScores, plainly, summarise, summary_of
from pave_lightning.reporting.sweep_view import SweepView
from pave_lightning.system.files import replacing

__all__ = ["SweepView", "draw", "findings", "summarise", "write_sweep"]


def write_sweep(frame: pd.DataFrame, view: SweepView, folder: Path | str) -> list[Path]:
    """Write scores.parquet, summary.csv, summary.parquet, figure.png and findings.md.

    Args:
        frame: One row a score: a column for every varied key, and seed, model, vectors, form, task, metric,
            is_headline, value, examples, scale, rho.
        view: What the summary, the figure and the findings look at.
        folder: Where the files go; it is made where it does not exist.

    Returns:
        The files, in that order.

    Raises:
        PaveError: columns are missing, the view names columns that are not there, or one score has two values.
    """
    scores = SweepScores(frame, view)
    summary = summary_of(scores)
    writers: dict[str, Callable[[Path], object]] = {
        "scores.parquet": lambda path: _of_one_type(frame).to_parquet(path, index=False),
        "summary.csv": lambda path: summary.to_csv(path, index=False, lineterminator="\n"),
        "summary.parquet": lambda path: _of_one_type(summary).to_parquet(path, index=False),
        "figure.png": lambda path: draw_scores(scores, path),
        "findings.md": lambda path: path.write_text(findings_of(scores, summary), encoding="utf-8"),
    }
    files = []
    for name, write in writers.items():
        file = Path(folder) / name
        with replacing(file) as temporary:
            write(temporary)
        files.append(file)
    return files


def _of_one_type(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns that hold numbers and words, which parquet cannot, become words."""
    frame = frame.copy()
    # Columns of texts alone, which pandas tells apart, are of one type already.
    for name in [name for name, kind in frame.dtypes.items() if isinstance(kind, np.dtype) and kind.hasobject]:
        present = [value for value in frame[name] if not _is_absent(value)]
        if len({type(value) for value in present}) > 1:
            frame[name] = [None if _is_absent(value) else plainly(value) for value in frame[name]]
    return frame


def _is_absent(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)  # noqa: PLR0124
