"""The scores of one model in one task or group of lm-eval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, cast

from pave_lightning.config import slug
from pave_lightning.errors import PaveError, doing
from pave_lightning.evaluation.options import LmEval
from pave_lightning.pipeline.benchmark_facts import facts_of
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import expert_stages
from pave_lightning.pipeline.stages.evaluate import ScoredModel, scored_models
from pave_lightning.pipeline.stages.fit import own_digests
from pave_lightning.system.files import file_sha256
from pave_lightning.system.processes import is_rank_zero

# Raised when scores change meaning, so that older ones are made anew.
FORMAT = 1


class BenchmarkStage(Stage):
    """What lm-eval finds for one model and one benchmark, and what each row adds to it (``predictions.parquet``).

    Each is a stage of its own, since a benchmark of a large model takes hours: one that is added costs no other one.

    Args:
        results: the recipe, and what is there of it.
        model: the model.
        benchmark: name of the task or group of lm-eval.
    """

    command = "evaluate"
    announced = False

    def __init__(self, results: Results, model: ScoredModel, benchmark: str) -> None:
        super().__init__(results)
        self.model, self.benchmark = model, benchmark

    @classmethod
    def all(cls, results: Results) -> Iterable[Stage]:
        """Every benchmark of every model that a run scores."""
        return benchmark_stages(results)

    @property
    def options(self) -> LmEval:
        """The recipe's section about lm-eval."""
        return cast(LmEval, self.results.recipe.evaluate.lm_eval)

    @property
    def name(self) -> str:
        """``benchmarks/BENCHMARK/LABEL``."""
        return f"benchmarks/{slug(self.benchmark)}/{self.model.label}"

    @property
    def trainer(self) -> Mapping[str, Any] | None:
        """The recipe's options."""
        return self.results.recipe.trainer

    @property
    def wanted(self) -> str | None:
        """The metric that the recipe names."""
        return self.options.benchmarks[self.benchmark].metric

    def about(self) -> str:
        """What is scored on."""
        return f"{self.benchmark}, by lm-eval"

    def needs(self) -> list[Stage]:
        """The experts, and what the model is made of."""
        return [*expert_stages(self.results), *self.model.needs()]

    def depends_on(self) -> dict[str, Any]:
        """The model's weights, the benchmark, and the version of lm-eval."""
        chosen, recipe = self.options.benchmarks[self.benchmark], self.results.recipe
        facts = facts_of(self.options, self.benchmark)
        ours = [*facts.files, *facts.own_code] if self.options.folder is not None else []
        return {
            "format": FORMAT,
            "benchmark": [self.benchmark, chosen.expert, chosen.few_shot, self.options.limit, self.options.chat],
            "lm_eval": version("lm_eval"),
            "files": [file_sha256(path) for path in dict.fromkeys([*ours, *facts.local]) if path.is_file()],
            "expert": own_digests(self.results)[chosen.expert],
            "precision": recipe.evaluate.precision,
            **self.model.depends_on(),
        }

    def run(self, context: Context) -> None:
        """Score the model."""
        from pave_lightning.evaluation.benchmarks import metric_of
        from pave_lightning.pipeline.evaluating import score_on_benchmark
        from pave_lightning.tasks.predictions import FILE, write_predictions

        with doing(f"evaluate {self.model.label} on {self.benchmark}"):
            candidate, facts = self.model.by_itself(context)
            scored = score_on_benchmark(context, candidate, self.benchmark, own=self.model.own_tokens)
            primary = metric_of(scored.metrics, self.wanted)
            if is_rank_zero():
                with context.writing(self) as writer:
                    plain = {"metrics": scored.metrics, "examples": scored.examples, "primary": primary}
                    writer.result.update(facts, scores={self.benchmark: plain}, lower=list(scored.lower))
                    kept = {} if scored.rows is None else {self.benchmark: scored.rows}
                    write_predictions(writer.path / FILE, kept, {})


def benchmark_stages(results: Results) -> Iterator[BenchmarkStage]:
    """Every benchmark of every model that a run scores, in the order of its tables; none without lm-eval."""
    options = results.recipe.evaluate.lm_eval
    for benchmark in () if options is None else options.benchmarks:
        yield from (BenchmarkStage(results, model, benchmark) for model in scored_models(results))


def primary_metric(stage: BenchmarkStage, scores: Mapping[str, Any], lower: Iterable[str]) -> str:
    """The metric of a benchmark that stands in the tables.

    Args:
        stage: whose scores they are.
        scores: see `BenchmarkStage.run`.
        lower: the metrics that are better the lower they are.

    Raises:
        PaveError: it was not measured, or is better the lower it is.
    """
    from pave_lightning.evaluation.benchmarks import metric_of

    found = metric_of(scores["metrics"], stage.wanted)
    better = [name for name in scores["metrics"] if name not in lower]
    where = f"evaluate.lm_eval.benchmarks.{stage.benchmark}.metric"
    if found is None:
        raise PaveError(f"{where}: '{stage.wanted}' was not measured; measured are {', '.join(scores['metrics'])}")
    if found in lower:
        hint = f"name another one: {', '.join(better)}" if better else "leave this benchmark out"
        raise PaveError(f"{where}: '{found}' is better the lower it is, and tables compare by higher scores; {hint}")
    return found
