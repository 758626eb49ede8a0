"""What the benchmarks of a recipe fetch and run, read once for plans and stages."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pave_lightning.evaluation.options import LmEval

if TYPE_CHECKING:  # plans of recipes without benchmarks need none of it
    from pave_lightning.evaluation.harness import Catalogue, Facts


def facts_of(options: LmEval, benchmark: str) -> Facts:
    """What a benchmark fetches and runs.

    Raises:
        PaveError: lm-eval is not installed, or has no such task.
    """
    return _facts(options.folder, benchmark)


@cache
def _facts(folder: str | None, benchmark: str) -> Facts:
    return _catalogue(folder).facts(benchmark)


@cache
def _catalogue(folder: str | None) -> Catalogue:
    from pave_lightning.evaluation.harness import Catalogue

    return Catalogue(None if folder is None else Path(folder))
