"""What a recipe's merging and purification will leave out of its model, as a plan tells it."""

from __future__ import annotations

from pave_lightning.pipeline.bases import folder_of_base
from pave_lightning.pipeline.planning.merging import stored_parameters
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.pipeline.selections import excluded_sections
from pave_lightning.pipeline.stages import captures
from pave_lightning.recipe.schema import Recipe
from pave_lightning.weights import Architecture
from pave_lightning.weights.coverage import Coverage


def coverage_lines(recipe: Recipe, folder: RunFolder) -> list[str]:
    """Tensors that will not be merged, and weights that will not be captured and purified, by name and reason."""
    base_folder = folder_of_base(recipe)
    architecture = Architecture.of_folder(base_folder, *recipe.auto_models)
    base = architecture.base_checkpoint(base_folder)
    found = Coverage.of(base, architecture, convolutions=recipe.capture.convolutions)
    sections = found.sections(merges=bool(recipe.merge), captures=captures(Results(recipe, folder)))
    sections |= excluded_sections(recipe.merge, (one.name for one in stored_parameters(base, architecture)))
    return [line for heading, lines in sections.items() for line in (heading, *(f"  {line}" for line in lines))]
