"""What is wrong with benchmarks of lm-eval, and what they fetch and run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pave_lightning.errors import PaveError, listed
from pave_lightning.evaluation.options import CODE_OPTION, Benchmark, LmEval
from pave_lightning.pipeline.benchmark_facts import facts_of
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stages.benchmark import benchmark_stages
from pave_lightning.recipe.schema import Recipe

if TYPE_CHECKING:  # plans of recipes without benchmarks need none of it
    from pave_lightning.evaluation.harness import Facts


def benchmark_problems(results: Results, *, allow_code: bool | None) -> Iterator[str]:
    """Why benchmarks cannot be scored. Those that are still to be scored are loaded, with their data.

    Args:
        results: the recipe, and what is there of it.
        allow_code: whether they may run code; None where nothing is scored now, and they may not.
    """
    options = results.recipe.evaluate.lm_eval
    if options is None:
        return
    told: set[str] = set()
    for name, chosen in options.benchmarks.items():
        try:
            facts = facts_of(options, name)
        except PaveError as error:
            if str(error) not in told:  # of all of them, where lm-eval is not installed
                yield f"evaluate.lm_eval: {error}"
            told.add(str(error))
            continue
        problems = [*_problems(facts, chosen)]
        todo = [stage for stage in benchmark_stages(results) if stage.benchmark == name]
        if not problems and not all(results.is_there(stage) for stage in todo):
            problems += _loading_problems(facts, chosen, allow_code)
        yield from (f"evaluate.lm_eval.benchmarks.{name}: {problem}" for problem in problems)


def _problems(facts: Facts, chosen: Benchmark) -> Iterator[str]:
    if facts.lacking:
        extras = f"pip install 'lm_eval[{','.join(facts.extras)}]'"
        hint = f"run: {extras}" if facts.extras else "install the packages that hold them"
        yield f"its code imports {listed(facts.lacking)}, not installed; {hint}"
    if facts.lacks_score:
        yield f"it is a group without a score of the whole; name its tasks instead: {listed(facts.tasks)}"
    if facts.few_shot == 0 and chosen.few_shot:
        yield f"few_shot is {chosen.few_shot}, but the task fixes it at 0; leave few_shot out"
    missing = [path for path in facts.local if not path.exists()]
    if missing:
        yield f"there is no file {listed([str(path) for path in missing])}; relative paths begin in the current folder"


def _loading_problems(facts: Facts, chosen: Benchmark, allow_code: bool | None) -> Iterator[str]:
    if (facts.runs_code or facts.own_code) and not allow_code:
        if allow_code is not None:
            yield f"it runs {_code(facts)}; if you trust that, add {CODE_OPTION} to the command"
        return
    from pave_lightning.evaluation.benchmarks import load_tasks
    from pave_lightning.system.hub import unreached

    try:
        load_tasks(facts, chosen.few_shot, allow_code=bool(allow_code))
    except PaveError as error:
        why = "" if facts.local else unreached()
        yield f"{error}{f' ({why})' if why else ''}"


def _code(facts: Facts) -> str:
    """What is run, in words."""
    own = [str(path) for path in facts.own_code]
    parts = [*(["code that models write"] if facts.runs_code else []), *([listed(own)] if own else [])]
    return " and ".join(parts)


def benchmark_lines(recipe: Recipe) -> list[str]:
    """For each benchmark its data, metrics and extras, and what code it runs, as a plan tells it."""
    options = recipe.evaluate.lm_eval
    if options is None:
        return []
    lines = ["benchmarks, by lm-eval"]
    for name, chosen in options.benchmarks.items():
        lines += [f"  {name} (expert {chosen.expert})", *(f"    {line}" for line in _lines(options, name))]
    return lines


def _lines(options: LmEval, name: str) -> Iterator[str]:
    facts = facts_of(options, name)
    limit = "" if options.limit is None else f", the first {options.limit} rows of each task"
    tasks = "" if facts.tasks == (name,) else f"{len(facts.tasks)} tasks: {listed(facts.tasks, 8)}; "
    data = [str(path) for path in facts.local] or list(facts.data)
    yield f"{tasks}data {listed(data, 8) or 'that its own code loads'}{limit}"
    fetched = f"; fetched from the hub: {listed(facts.fetched)}" if facts.fetched else ""
    yield f"metrics {listed(facts.metrics) or 'that its own code says'}{fetched}"
    if facts.extras:
        yield f"takes lm_eval[{','.join(facts.extras)}]"
    if facts.runs_code or facts.own_code:
        yield f"runs {_code(facts)}: pave run takes {CODE_OPTION} for it"
