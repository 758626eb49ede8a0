"""Scoring of models for the stages: on test splits, and on validation splits where something is chosen."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import torch

from pave_lightning.evaluation import Candidate, Evaluator, ExpertsCandidate, SuiteData, TaskScore
from pave_lightning.evaluation.options import LmEval
from pave_lightning.evaluation.scale_search import ScaleSearcher
from pave_lightning.experts.trainer_options import machine_options
from pave_lightning.experts.trainers import build_trainer, quiet_lightning
from pave_lightning.pipeline.benchmark_facts import facts_of
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.scoring import score_inputs
from pave_lightning.pipeline.stages.align import experts, own_experts
from pave_lightning.pipeline.stages.fit import own_digests
from pave_lightning.pipeline.task_data import data_module

if TYPE_CHECKING:
    from pave_lightning.evaluation.benchmarks import BenchmarkScore


@shared
def evaluator(context: Context) -> Evaluator:
    """The evaluator of all tasks, which holds one model."""
    with torch.random.fork_rng():
        return Evaluator(context.recipe.tasks, experts(context), context.base)


@shared
def evaluator_of_experts(context: Context) -> Evaluator:
    """The evaluator of the experts by themselves, each with its own tokens."""
    if context.recipe.vocabulary == "error":
        return evaluator(context)
    with torch.random.fork_rng():
        return Evaluator(context.recipe.tasks, own_experts(context), context.base)


def score_on_test(
    context: Context, candidate: Candidate, *, alone: bool = False, own: bool = False
) -> dict[str, TaskScore]:
    """A candidate's scores on all test splits, with its predictions.

    Args:
        context: the recipe, and what is loaded of it.
        candidate: the model.
        alone: score it in this process, whatever the trainer asks for.
        own: whether the candidate is the experts by themselves, each with its own tokens.
    """
    recipe = context.recipe
    modules = [data_module(context, task, recipe.evaluate.batch_size, own=own) for task in recipe.tasks]
    data = SuiteData(modules, "test")
    with quiet_lightning():
        trainer = build_trainer(
            _one_process(context) if alone else machine_options(recipe.trainer),
            root=context.folder.root,
            precision=recipe.evaluate.precision,
        )
    scoring = evaluator_of_experts(context) if own else evaluator(context)
    return scoring.score(candidate, data, trainer, keep=True)


def score_on_benchmark(context: Context, candidate: Candidate, benchmark: str, *, own: bool = False) -> BenchmarkScore:
    """A candidate's score in a task or group of lm-eval.

    Args:
        context: the recipe, and what is loaded of it.
        candidate: the model.
        benchmark: the task or group; one of the recipe's.
        own: whether the candidate is the experts by themselves, each with its own tokens.
    """
    from pave_lightning.evaluation.benchmarks import BenchmarkScorer, load_tasks

    recipe = context.recipe
    options = cast(LmEval, recipe.evaluate.lm_eval)
    chosen = options.benchmarks[benchmark]
    loaded = load_tasks(facts_of(options, benchmark), chosen.few_shot, allow_code=context.allow_code)
    scorer = BenchmarkScorer(
        evaluator_of_experts(context) if own else evaluator(context),
        candidate,
        task=chosen.expert,
        processor=data_module(context, recipe.task(chosen.expert), recipe.evaluate.batch_size, own=own).processor,
        name=benchmark,
        loaded=loaded,
        batch_size=options.batch_size or recipe.evaluate.batch_size,
        limit=options.limit,
        chat=options.chat,
        allow_code=context.allow_code,
    )
    with quiet_lightning():
        trainer = build_trainer(
            machine_options(recipe.trainer), root=context.folder.root, precision=recipe.evaluate.precision
        )
    return scorer.score(trainer)


@shared
def searcher(context: Context) -> ScaleSearcher:
    """What scores candidates on the validation splits."""
    recipe = context.recipe
    depends_on = score_inputs(recipe, own_digests(context.results), "validation")
    size, differ = recipe.evaluate.batch_size, recipe.vocabulary != "error"
    return ScaleSearcher(
        recipe.tasks,
        evaluator(context),
        ExpertsCandidate(own_experts(context) if differ else experts(context)),
        data=lambda task: data_module(context, task, size),
        of_experts=(evaluator_of_experts(context), lambda task: data_module(context, task, size, own=True))
        if differ
        else None,
        options=_one_process(context),
        precision=recipe.evaluate.precision,
        root=context.folder.root,
        references=context.references.setdefault(json.dumps(depends_on), {}),
        group=context.group,
    )


def _one_process(context: Context) -> dict[str, Any]:
    """Options of a trainer that is one process; of several that score side by side each takes a card of its own."""
    options, cards = machine_options(context.recipe.trainer), torch.cuda.device_count()
    shared = context.group.size > 1 and cards and options.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    devices = [context.group.rank % cards] if shared else 1
    return {**options, "devices": devices, "num_nodes": 1, "strategy": "auto"}
