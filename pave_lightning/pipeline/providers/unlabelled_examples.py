"""Examples without labels, and what it takes to run models on them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pave_lightning.merging import Evidence, Need
from pave_lightning.merging.passes import ForwardPasses, load_parameters
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.providers.base import Asking, MergeRequest, Provider, provides
from pave_lightning.pipeline.stages.align import classifier, expert_folder, experts, plain_vectors
from pave_lightning.pipeline.stages.capture import shown_examples
from pave_lightning.weights.backbones import backbone_of
from pave_lightning.weights.embeddings import OwnTokens, resize_rows, tokens_beyond
from pave_lightning.weights.empty_models import empty_model
from pave_lightning.weights.task_vectors import own_token_rows


@provides(Need.UNLABELLED_EXAMPLES)
class UnlabelledExamples(Provider):
    """Forward passes on a seeded sample of each task's training split; the last is kept, for options that are tuned."""

    loads_weights = True

    def __init__(self) -> None:
        self._last: tuple[int, ForwardPasses] | None = None

    def inputs(self, request: MergeRequest) -> dict[str, Any]:
        """Which rows the sample is taken of."""
        tasks = request.results.recipe.tasks
        return {"examples": {task.name: shown_examples(request.results, task) for task in tasks}}

    def provide(self, evidence: Evidence, context: Context, asking: Asking, request: MergeRequest) -> Evidence:
        """The evidence with passes on as many examples a task as are asked for."""
        if self._last is None or self._last[0] != asking.examples:
            self._last = (asking.examples, _passes(context, asking.examples))
        return replace(evidence, passes=self._last[1])


def _passes(context: Context, examples: int) -> ForwardPasses:
    from pave_lightning.pipeline.task_data import shown_batches

    tasks = context.recipe.tasks
    return ForwardPasses(
        lambda: _backbone(context),
        plain_vectors(context),
        {task.name: shown_batches(context, task, examples) for task in tasks},
        context.recipe.compute.device,
        partial(classifier, context),
        {task.name: _own_tokens(context, task.name) for task in tasks},
        {task.name: task for task in tasks},
    )


def _backbone(context: Context) -> nn.Module:
    """The base's backbone, in memory."""
    with torch.random.fork_rng():
        backbone = backbone_of(empty_model(context.base_folder, context.recipe.tasks[0].auto_model, device="cpu"))
    resize_rows(backbone, context.token_rows)
    plain = plain_vectors(context)
    load_parameters(backbone, {parameter.name: plain.base(parameter) for parameter in plain.parameters})
    kept = [name for name in context.base if context.architecture.averages(name)]
    load_parameters(backbone, {name: context.base.tensor(name) for name in kept})
    return backbone.float().eval()


def _own_tokens(context: Context, name: str) -> OwnTokens | None:
    """The tokens of a task's expert that the base has no row of; None where there are none."""
    from pave_lightning.experts.loading import load_expert

    if not own_token_rows(context.base, experts(context)[name], context.architecture):
        return None
    model = load_expert(expert_folder(context.results, name), context.recipe.task(name), context.base_folder)
    return tokens_beyond(backbone_of(model), context.token_rows)
