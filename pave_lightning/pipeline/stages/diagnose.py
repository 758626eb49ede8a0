"""What a purification does to the task vectors, as tables and pictures."""

from __future__ import annotations

import logging
from typing import Any

from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.purifications import PurificationStage
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import expert_stages, plain_vectors
from pave_lightning.pipeline.stages.capture import CaptureStage, statistics
from pave_lightning.pipeline.stages.purify import purification_inputs, purified_now

log = logging.getLogger("pave_lightning")

FORMAT = 1


class DiagnoseStage(PurificationStage):
    """A look at one purification."""

    command = "diagnose"
    place = "diagnostics"

    def needs(self) -> list[Stage]:
        """Experts and statistics."""
        return [*expert_stages(self.results), *CaptureStage.all(self.results)]

    def depends_on(self) -> dict[str, Any]:
        """What purified weights depend on."""
        return {"diagnostics": FORMAT, **purification_inputs(self.results, self.options)}

    def run(self, context: Context) -> None:
        """Look at every layer, write tables and pictures, and let MLflow have them."""
        from pave_lightning.diagnostics import DiagnosticOptions, diagnose
        from pave_lightning.merging.methods.dare import DareOptions
        from pave_lightning.reporting.diagnostic_plots import write_diagnostics

        log.info("diagnose (%s) ...", self.options.summary)
        purified = purified_now(context, self.options)
        looked_at = DiagnosticOptions(dare=DareOptions(seed=context.recipe.seed))
        found = diagnose(plain_vectors(context), purified, statistics(context), looked_at)
        with context.writing(self) as writer:
            write_diagnostics(found, writer.path)
        if context.tracker is not None:
            context.tracker.log_folder(context.tracker.parent_run_id, self.results.path(self), self.name)
