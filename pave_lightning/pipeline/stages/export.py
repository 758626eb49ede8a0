"""The purified experts as ordinary Hugging Face checkpoints, one folder a task, heads included."""

from __future__ import annotations

from typing import Any

from pave_lightning.errors import doing
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.purifications import PurificationStage
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import experts
from pave_lightning.pipeline.stages.purify import needed_for, purification_inputs, purify_stages, task_vectors
from pave_lightning.purification import KeptRank
from pave_lightning.weights.tokenizer_files import has_tokenizer


class ExportStage(PurificationStage):
    """The experts of one purification."""

    command = "purify"
    place = "purified-experts"

    def needs(self) -> list[Stage]:
        """Statistics and purified weights."""
        return needed_for(self.results, self.options)

    def depends_on(self) -> dict[str, Any]:
        """What the purified weights depend on."""
        return purification_inputs(self.results, self.options)

    def run(self, context: Context) -> None:
        """Write every expert with its purified weights."""
        from pave_lightning.purification.export import write_purified_experts
        from pave_lightning.tasks.image_processors import copy_image_processor, has_image_processor
        from pave_lightning.tasks.tokenizers import load_tokenizer

        made = [self.results.finished(stage) for stage in purify_stages(self.results, self.options)]
        ranks = [KeptRank(*rank) for found in made for rank in found.result["ranks"]]
        with doing(f"write purified experts ({self.options.summary})"), context.writing(self) as writer:
            vectors, options = task_vectors(context, self.options), self.options.model_dump(mode="json")
            write_purified_experts(writer.path, vectors, experts(context), options, ranks)
            for task in context.recipe.tasks:
                written = writer.path / task.name
                if written.is_dir() and task.reads_tokens and not has_tokenizer(written):
                    load_tokenizer(context.base_folder).save_pretrained(written)
                if written.is_dir() and not has_image_processor(written):
                    copy_image_processor(context.base_folder, context.base_folder, written)
