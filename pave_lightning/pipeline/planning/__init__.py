"""What `pave plan` asks, and every other command before it begins: what is wrong, what would be done, what it takes."""

from pave_lightning.pipeline.planning.benchmarks import benchmark_lines
from pave_lightning.pipeline.planning.checks import check_recipe
from pave_lightning.pipeline.planning.coverage import coverage_lines
from pave_lightning.pipeline.planning.merging import merge_problems, option_problems
from pave_lightning.pipeline.planning.models import weight_notes
from pave_lightning.pipeline.planning.table import cost_table, plan_rows, predicted_cost
from pave_lightning.pipeline.planning.tokens import token_notes

__all__ = [
    "benchmark_lines",
    "check_recipe",
    "cost_table",
    "coverage_lines",
    "merge_problems",
    "option_problems",
    "plan_rows",
    "predicted_cost",
    "token_notes",
    "weight_notes",
]
