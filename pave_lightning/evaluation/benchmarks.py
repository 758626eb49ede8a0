"""Scores of models that are in memory, taken by lm-eval."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pave_lightning.errors import PaveError, foreign
from pave_lightning.evaluation.candidates import Candidate
from pave_lightning.evaluation.evaluator import Evaluator
from pave_lightning.evaluation.harness import Facts
from pave_lightning.evaluation.options import CODE_OPTION
from pave_lightning.experts.trainers import honest_interrupts, quiet_lightning
from pave_lightning.tasks.data import quiet_datasets
from pave_lightning.tasks.predictions import TaskPredictions

# Those of lm-eval's own command, so that scores are the same: of random, of numpy, torch and the examples in prompts.
RANDOM_SEED, OTHER_SEED = 0, 1234
# The variable by which the package evaluate lets code run, and what it asks for.
CODE_SWITCH = "HF_ALLOW_CODE_EVAL"
# Why a metric counts as a mean of what rows have.
SAME_MEAN = 1e-9
# The filter of tasks that have none.
NO_FILTER = "none"


@dataclass(frozen=True)
class BenchmarkScore:
    """What a model has in one task or group of lm-eval.

    Attributes:
        metrics: by name; where lm-eval has filtered the answers, with the filter's name behind a dot.
        lower: the metrics that are better the lower they are.
        examples: how many rows were scored.
        rows: for each row what it adds to the metrics that are means of rows.
    """

    metrics: dict[str, float]
    lower: tuple[str, ...]
    examples: int
    rows: TaskPredictions | None = field(default=None, compare=False, repr=False)


def load_tasks(facts: Facts, few_shot: int | None, *, allow_code: bool) -> dict[str, Any]:
    """The tasks of lm-eval under a name, with their data, as `lm_eval.evaluate` takes them.

    Args:
        facts: which.
        few_shot: examples in the prompt; what the task says where it is None.
        allow_code: whether tasks may be loaded that run what models write, or Python files of one's own.

    Raises:
        PaveError: data or packages are not there, or code would run.
    """
    if (facts.runs_code or facts.own_code) and not allow_code:
        raise PaveError(f"{facts.name} runs code, which takes {CODE_OPTION} on the command line")
    from lm_eval.tasks import TaskManager

    with quiet_datasets(), _quiet(), _code(allow_code), foreign(f"lm-eval cannot prepare '{facts.name}'"):
        # Its own folder comes first, so that tasks of one's own stand in for others of the same name.
        folders = list(reversed(facts.folders))
        manager = TaskManager(include_path=folders, include_defaults=False)
        loaded: dict[str, Any] = manager.load([facts.name])
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (few_shot is not None and own != 0):
            task.set_config(key="num_fewshot", value=few_shot or 0)
        task.set_fewshot_seed(seed=OTHER_SEED)
    return loaded


class BenchmarkScorer(L.LightningModule):
    """Hands a model with its task's weights to lm-eval, on the trainer's device and in its precision.

    Rows are divided among the trainer's processes.

    Args:
        evaluator: holds the model.
        candidate: its weights.
        task: the task of the recipe as whose model it is scored.
        processor: the tokenizer.
        name: the benchmark.
        loaded: see `load_tasks`.
        batch_size: rows of a pass.
        limit: the first rows of each task that are scored; all where it is None.
        chat: whether prompts are written as a chat.
        allow_code: whether code that the model writes may run.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        candidate: Candidate,
        *,
        task: str,
        processor: Any,
        name: str,
        loaded: Mapping[str, Any],
        batch_size: int,
        limit: int | None = None,
        chat: bool = False,
        allow_code: bool = False,
    ) -> None:
        super().__init__()
        self.evaluator = evaluator
        self._candidate, self._task, self._processor = candidate, task, processor
        self._name, self._loaded = name, loaded
        self._options = {"limit": limit, "apply_chat_template": chat, "fewshot_as_multiturn": chat}
        self._batch_size, self._allow_code = batch_size, allow_code
        self._found: BenchmarkScore | None = None

    def score(self, trainer: L.Trainer) -> BenchmarkScore:
        """The model's score, on all processes.

        Raises:
            PaveError: lm-eval fails.
        """
        with quiet_lightning(), honest_interrupts():
            trainer.test(self, dataloaders=DataLoader(TensorDataset(torch.zeros(1))), verbose=False)
        if self._found is None:
            raise PaveError(f"lm-eval gives no scores of '{self._name}'")
        return self._found

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score the model; the one batch says only that it is time."""
        from lm_eval.evaluator import evaluate

        strategy = self.trainer.strategy
        rows = [_rows_of(task, self._options["limit"]) for task in self._loaded["tasks"].values()]
        divided = self.trainer.world_size if min(rows, default=0) >= self.trainer.world_size else 1
        with (
            self.evaluator.model_of(self._candidate, self._task) as model,
            _seeded(),
            _quiet(),
            _code(self._allow_code),
            foreign(f"lm-eval cannot score '{self._name}'"),
        ):
            lm = _wrapped(model, self._processor, self._batch_size)
            if divided > 1:
                lm._rank, lm._world_size, lm.strategy = self.trainer.global_rank, divided, strategy
            found = evaluate(
                lm,
                dict(self._loaded),
                bootstrap_iters=0,
                log_samples=True,
                confirm_run_unsafe_code=self._allow_code,
                **self._options,
            )
            score = None if found is None else _score(self._name, found)
        self._found = strategy.broadcast(score, src=0)


def metric_of(score: Mapping[str, float], wanted: str | None) -> str | None:
    """The name of the metric that is meant, among those that were measured; None where there is none.

    Args:
        score: the metrics.
        wanted: as a recipe names it, with or without a filter; the first where it is None.
    """
    names = list(score)
    if wanted is None:
        return next(iter(names), None)
    name = _key(wanted)
    return next((one for one in names if one == name or one.partition(".")[0] == name), None)


def _key(name: str) -> str:
    """The name of a metric in tables: lm-eval's own, ``metric,filter``, but with what every record can name."""
    metric, _, chosen = name.partition(",")
    whole = metric if chosen in ("", NO_FILTER) else f"{metric}.{chosen}"
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in whole)


def _score(name: str, found: Mapping[str, Any]) -> BenchmarkScore:
    """What lm-eval's results say of a task or group."""
    result = found["results"][name]
    values = {
        _key(key): float(value)
        for key, value in result.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    higher = {_key(metric): better for metric, better in (found["higher_is_better"].get(name) or {}).items()}
    lower = tuple(key for key in values if higher.get(key.partition(".")[0]) is False)
    leaves = _leaves(name, found["group_subtasks"])
    samples = [found["samples"][one] for one in leaves]
    return BenchmarkScore(values, lower, int(result["sample_len"]), _kept_rows(samples, values))


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, each once, in order; of a task itself."""
    if name not in members:
        return [name]
    return list(dict.fromkeys(leaf for member in members[name] for leaf in _leaves(member, members)))


def _kept_rows(tasks: Sequence[Sequence[Mapping[str, Any]]], scores: Mapping[str, float]) -> TaskPredictions | None:
    """What each row adds to those scores that are means of rows; None where there are none."""
    rows: dict[tuple[int, int], dict[str, float]] = {}
    for number, samples in enumerate(tasks):
        for sample in samples:
            own = rows.setdefault((number, int(sample["doc_id"])), {})
            for metric in sample["metrics"]:
                if isinstance(sample[metric], bool | int | float | np.number):
                    own[_key(f"{metric},{sample['filter']}")] = float(sample[metric])
    ordered = [rows[place] for place in sorted(rows)]
    means = [name for name, score in scores.items() if ordered and _is_mean(ordered, name, score)]
    if not means:
        return None
    values = np.asarray([[own[name] for name in means] for own in ordered], dtype=np.float64)
    places = np.arange(len(ordered)).repeat(len(means))
    return TaskPredictions.ordered(places, values.flatten(), np.ones(values.size), means)


def _is_mean(rows: Sequence[Mapping[str, float]], name: str, score: float) -> bool:
    values = [own.get(name, np.nan) for own in rows]
    return bool(abs(float(np.mean(values)) - score) <= SAME_MEAN)


def _rows_of(task: Any, limit: int | None) -> int:
    rows = len(task.eval_docs)
    return rows if limit is None else min(rows, limit)


def _wrapped(model: nn.Module, processor: Any, batch_size: int) -> Any:
    """A model as lm-eval takes it, without bars where nobody looks, and among processes that Lightning has started."""
    from lm_eval.models.huggingface import HFLM

    hidden = not sys.stderr.isatty()

    class InMemory(HFLM):  # type: ignore[misc]
        """A model that is in memory."""

        strategy: Any = None

        def all_gather(self, tensor: Any) -> Any:
            return tensor if self.strategy is None else self.strategy.all_gather(tensor)

        def barrier(self) -> None:
            if self.strategy is not None:
                self.strategy.barrier()

        def loglikelihood(self, requests: Any, disable_tqdm: bool = hidden) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = hidden) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = hidden) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    return InMemory(pretrained=model, tokenizer=processor, batch_size=batch_size)


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw as lm-eval's command does, and go on afterwards as if nothing had been drawn."""
    with isolate_rng():
        random.seed(RANDOM_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        yield


@contextmanager
def _code(allowed: bool) -> Iterator[None]:
    """Let the package evaluate run code, or not, whatever the environment says."""
    before = os.environ.get(CODE_SWITCH)
    os.environ[CODE_SWITCH] = "1" if allowed else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[CODE_SWITCH]
        else:
            os.environ[CODE_SWITCH] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's notices and bars out of the user's sight, and Python out of reach of templates in task files."""
    import lm_eval.api.task as tasks
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    before = logger.level, tasks.tqdm, utils.env
    sandbox = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline)
    sandbox.filters.update(utils.env.filters)
    if logger.level < logging.ERROR:
        logger.setLevel(logging.ERROR)
    tasks.tqdm, utils.env = partial(tqdm, disable=True), sandbox
    try:
        yield
    finally:
        tasks.tqdm, utils.env = before[1:]
        logger.setLevel(before[0])
