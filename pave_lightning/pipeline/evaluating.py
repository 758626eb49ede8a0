"""Scoring of models for the stages: on test splits, and on validation splits where something is chosen."""

from __future__ import annotations

import json
from typing import Any

import torch

from pave_lightning.evaluation import Candidate, Evaluator, ExpertsCandidate, SuiteData, TaskScore
from pave_lightning.evaluation.scale_search import ScaleSearcher
from pave_lightning.experts.trainer_options import machine_options
from pave_lightning.experts.trainers import build_trainer, quiet_lightning
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.scoring import score_inputs
from pave_lightning.pipeline.stages.fit import expert_digests, experts
from pave_lightning.pipeline.task_data import data_module


@shared
def evaluator(context: Context) -> Evaluator:
    """The evaluator of all tasks, which holds one model."""
    with torch.random.fork_rng():
        return Evaluator(context.recipe.tasks, experts(context), context.base)


def score_on_test(context: Context, candidate: Candidate, *, alone: bool = False) -> dict[str, TaskScore]:
    """A candidate's scores on all test splits, with its predictions.

    Args:
        context: the recipe, and what is loaded of it.
        candidate: the model.
        alone: score it in this process, whatever the trainer asks for.
    """
    recipe = context.recipe
    data = SuiteData([data_module(context, task, recipe.evaluate.batch_size) for task in recipe.tasks], "test")
    with quiet_lightning():
        trainer = build_trainer(
            _one_process(context) if alone else machine_options(recipe.trainer),
            root=context.folder.root,
            precision=recipe.evaluate.precision,
        )
    return evaluator(context).score(candidate, data, trainer, keep=True)


@shared
def searcher(context: Context) -> ScaleSearcher:
    """What scores candidates on the validation splits."""
    recipe = context.recipe
    depends_on = score_inputs(recipe, expert_digests(context.results), "validation")
    return ScaleSearcher(
        recipe.tasks,
        evaluator(context),
        ExpertsCandidate(experts(context)),
        data=lambda task: data_module(context, task, recipe.evaluate.batch_size),
        options=_one_process(context),
        precision=recipe.evaluate.precision,
        root=context.folder.root,
        references=context.references.setdefault(json.dumps(depends_on), {}),
    )


def _one_process(context: Context) -> dict[str, Any]:
    return {**machine_options(context.recipe.trainer), "devices": 1, "num_nodes": 1, "strategy": "auto"}
