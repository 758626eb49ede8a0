import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from pave_lightning.errors import PaveError
from pave_lightning.evaluation import Evaluator, ExpertsCandidate, TaskScore
from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.evaluation.scale_search import ScaleSearcher
from pave_lightning.merging import merge
from pave_lightning.merging.merged import MergedVectors
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors, Parameter, ParameterKind, TaskVectors


class One(TaskVectors):
    """A base of one weight that is 0, so that a scaled vector of 1 tells its scale."""

    tasks = ("first", "second", "third")
    parameters = (Parameter("w", ParameterKind.OTHER, ()),)

    def base(self, parameter, rows=None):
        return torch.zeros(())

    def expert(self, task, parameter, rows=None):
        return torch.ones(())


class Stub:
    """In place of the evaluator: scores are a function of the scale, and every question is noted."""

    def __init__(self, tasks, experts, curve):
        self.tasks, self.experts, self.curve, self.asked = tasks, experts, curve, []

    def score(self, candidate, data, trainer):
        expert = isinstance(candidate, ExpertsCandidate)
        scale = None if expert else round(float(dict(candidate.weights("first"))["w"]), 6)
        self.asked.append((data.split, scale, [module.task.examples.validation for module in data.modules]))
        values = self.experts if expert else self.curve(scale)
        return {
            task.name: TaskScore({task.primary_metric: value}, 1)
            for task, value in zip(self.tasks, values, strict=True)
        }


@pytest.fixture
def searcher(suite, tmp_path):
    def build(experts, curve, tasks=None):
        tasks = tasks or suite.tasks
        stub = Stub(tasks, experts, curve)
        return stub, ScaleSearcher(
            tasks,
            stub,
            ExpertsCandidate({}),
            data=lambda task: SimpleNamespace(task=task, labels=lambda split: torch.arange(100) % 2),
            options={"accelerator": "cpu", "devices": 1},
            precision="32-true",
            root=tmp_path,
        )

    return build


def find(searcher, search=(0.0, 1.0), points=5, examples=None):
    asked = ScaleSearch(search=search, points=points, examples=examples)
    return searcher.best(One(), MergedVectors({"w": torch.ones(())}), asked)


def find_from(searcher, start):
    """An automatic search; with the scales in the order in which they were tried."""
    stub, search = searcher
    found = search.best(One(), MergedVectors({"w": torch.ones(())}), ScaleSearch(search="auto"), start=start)
    return found, [scale for _, scale, _ in stub.asked if scale is not None]


def test_the_best_average_of_normalised_scores_wins(searcher):
    # Raw sums favour 1.0 (0.9 + 0.1 + 0.1); against the experts 0.25 does better (0.5/0.9 + 0.2/0.2 + 0.1/0.1).
    curve = {0.0: (0, 0, 0), 0.25: (0.5, 0.2, 0.1), 0.5: (0.5, 0.1, 0.1), 0.75: (0.6, 0, 0), 1.0: (0.9, 0.1, 0.1)}
    _, search = searcher((0.9, 0.2, 0.1), curve.get)
    found = find(search)
    assert found.scale == 0.25
    averages = [(a / 0.9 + b / 0.2 + c / 0.1) / 3 for a, b, c in curve.values()]
    assert [scale for scale, _ in found.tried] == list(curve)
    assert [average for _, average in found.tried] == pytest.approx(averages)


def test_among_equals_the_smaller_scale_wins(searcher):
    _, search = searcher((1, 1, 1), lambda scale: (0.5, 0.5, 0.5) if scale > 0.2 else (0, 0, 0))
    assert find(search).scale == 0.25


def test_both_ends_are_tried(searcher):
    stub, search = searcher((1, 1, 1), lambda scale: (scale, scale, scale))
    assert find(search, (-0.2, 1.4), 3).scale == 1.4
    assert [scale for _, scale, _ in stub.asked] == [None, -0.2, 0.6, 1.4]


@pytest.mark.parametrize(
    ("best", "search", "told"),
    [(1.0, (0.5, 1.0), "largest"), (0.5, (0.5, 1.0), "smallest"), (0.75, (0.5, 1.0), None), (0.0, (0.0, 1.0), None)],
)
def test_a_best_scale_at_the_end_of_the_search_is_told(searcher, caplog, best, search, told):
    _, found = searcher([1.0, 1.0, 1.0], lambda scale: [1 - abs(scale - best)] * 3)
    assert find(found, search=search).scale == best
    assert [told] * bool(told) == [word for word in ("largest", "smallest") if f"is the {word} that was" in caplog.text]


def peak(best):
    """Scores that rise up to a scale and fall from there, by the distance on a logarithmic axis."""
    return lambda scale: [10 - abs(math.log2(scale) - math.log2(best))] * 3


@pytest.mark.parametrize(
    ("best", "asked"),
    [
        (1.0, [1.0, 2.0, 0.5]),
        (6.0, [1.0, 2.0, 0.5, 4.0, 8.0, 16.0]),
        (0.1, [1.0, 2.0, 0.5, 0.25, 0.125, 0.0625]),
    ],
)
def test_an_automatic_search_goes_by_factors_of_two_until_the_score_has_fallen_on_both_sides(searcher, best, asked):
    found, tried = find_from(searcher((1, 1, 1), peak(best)), 1.0)
    assert tried[: len(asked)] == asked
    assert len(tried) == len(asked) + 4  # two refinements, on both sides of the best
    assert max(found.scale / best, best / found.scale) < 2**0.25
    assert [scale for scale, _ in found.tried] == pytest.approx(sorted(tried), abs=1e-6)


def test_an_automatic_search_finds_a_best_scale_far_beyond_a_usual_range(searcher):
    found, tried = find_from(searcher((1, 1, 1), peak(7.3)), 1.0)
    assert found.scale == pytest.approx(7.3, rel=0.1)
    assert max(tried) == 16.0


def test_an_automatic_search_begins_at_the_default_scale(searcher):
    _, tried = find_from(searcher((1, 1, 1), peak(0.3)), 0.3)
    assert tried[:3] == [0.3, 0.6, 0.15]


@pytest.mark.parametrize(("direction", "end"), [(1, "largest"), (-1, "smallest")])
def test_an_automatic_search_ends_after_twelve_scales_and_tells_that_its_end_is_open(searcher, caplog, direction, end):
    found, _ = find_from(searcher((1, 1, 1), lambda scale: [direction * math.log2(scale)] * 3), 1.0)
    powers = [math.log2(scale) for scale, _ in found.tried]
    assert sum(power == round(power) for power in powers) == 12
    assert found.scale == 2.0 ** (10 * direction)
    assert f"the best scale is the {end} of the {len(powers)} that were tried" in caplog.text


def test_a_plateau_ends_an_automatic_search(searcher, caplog):
    found, tried = find_from(searcher((1, 1, 1), lambda scale: [0.5] * 3), 1.0)
    assert sorted(tried) == [0.5, 1.0, 2.0]
    assert found.scale == 0.5
    assert "larger ones do as well" in caplog.text


def test_a_plateau_at_larger_scales_is_not_walked_along(searcher):
    _, tried = find_from(searcher((1, 1, 1), lambda scale: [min(scale, 2.0)] * 3), 1.0)
    assert max(tried) == 4.0


def test_scales_without_finite_scores_end_a_side(searcher):
    found, tried = find_from(searcher((1, 1, 1), lambda scale: [math.nan if scale > 3 else scale] * 3), 1.0)
    assert max(tried) == 4.0
    assert 2.0 <= found.scale <= 3.0


def test_an_automatic_search_goes_down_while_nothing_is_finite(searcher):
    found, _ = find_from(searcher((1, 1, 1), lambda scale: [math.nan if scale > 0.3 else scale] * 3), 1.0)
    assert 0.25 <= found.scale <= 0.3
    with pytest.raises(PaveError, match="no scale that was tried gives finite scores"):
        find_from(searcher((1, 1, 1), lambda scale: [math.nan] * 3), 1.0)


def test_an_end_of_a_range_is_told_with_what_goes_beyond_it(searcher, caplog):
    _, search = searcher((1, 1, 1), lambda scale: [scale] * 3)
    assert find(search, search=(1.0, 3.0), points=3).scale == 3.0
    assert "`scale: search` continues past the end of a range" in caplog.text


@pytest.mark.parametrize(
    ("curve", "plateau"),
    [
        (lambda scale: 0.5, True),
        (lambda scale: 0.5 if scale < 2.5 else 0.1, True),
        (lambda scale: math.nan if scale > 1.5 else 0.5, False),  # what larger ones do says nothing
    ],
)
def test_a_plateau_at_the_end_of_a_range_is_told(searcher, caplog, curve, plateau):
    _, search = searcher((1, 1, 1), lambda scale: [curve(scale)] * 3)
    assert find(search, search=(1.0, 3.0), points=3).scale == 1.0
    assert ("larger ones do as well" in caplog.text) == plateau


def test_only_validation_splits_are_looked_at(searcher):
    stub, search = searcher((1, 1, 1), lambda scale: (scale, scale, scale))
    find(search, examples=7)
    assert {split for split, _, _ in stub.asked} == {"validation"}
    assert all(examples == [7, 7, 7] for _, _, examples in stub.asked)


def test_fewer_examples_than_the_task_allows(searcher, suite):
    limited = suite.tasks[0].examples.model_copy(update={"validation": 4})
    tasks = [suite.tasks[0].model_copy(update={"examples": limited}), *suite.tasks[1:]]
    stub, search = searcher((1, 1, 1), lambda scale: (scale, scale, scale), tasks)
    find(search, examples=7)
    assert stub.asked[0][2] == [4, 7, 7]
    find(search)
    assert stub.asked[-1][2] == [4, None, None]


def test_experts_are_scored_once_for_each_number_of_examples(searcher):
    stub, search = searcher((1, 1, 1), lambda scale: (scale, scale, scale))
    for examples in (None, None, 7, 7):
        find(search, examples=examples)
    assert [scale for _, scale, _ in stub.asked].count(None) == 2


def test_the_rows_of_a_search_are_found_once(searcher, suite):
    _, found = searcher([1.0, 1.0, 1.0], lambda scale: [scale] * 3)
    asked = []
    given, found.data = found.data, lambda task: asked.append(task.name) or given(task)
    find(found)
    find(found)
    find(found, examples=2)
    assert asked == 2 * [task.name for task in suite.tasks]


def test_scores_that_are_no_numbers_never_win(searcher):
    _, search = searcher((1, 1, 1), lambda scale: (math.nan, 1, 1) if scale > 0.6 else (scale, 0, 0))
    assert find(search).scale == 0.5


def test_no_scale_with_finite_scores(searcher):
    _, search = searcher((1, 1, 1), lambda scale: (math.nan, 1, 1))
    with pytest.raises(PaveError, match="no scale that was tried gives finite scores"):
        find(search)


def test_an_expert_without_finite_scores_is_named(searcher):
    _, search = searcher((1, 1, math.nan), lambda scale: (1, 1, 1))
    with pytest.raises(PaveError, match="task 'third': pearson is not finite from its own expert"):
        find(search)


def test_tasks_whose_expert_scores_nothing_do_not_count(searcher):
    _, search = searcher((1, 0, -0.1), lambda scale: (1 - scale, scale, scale))
    found = find(search)
    assert found.scale == 0.0
    assert found.tried[0][1] == pytest.approx(1.0)


def test_an_expert_that_scores_next_to_nothing_is_told_once(searcher, caplog):
    _, search = searcher((1, 0.05, 0.1), lambda scale: (1, 1, 1))
    find(search)
    (told,) = [record.getMessage() for record in caplog.records if "hardly learned" in record.getMessage()]
    assert f"expert of {search.tasks[1].name} (0.050, always the same answer: 0.333) has" in told


def test_no_expert_scores_anything(searcher):
    _, search = searcher((0, -0.5, -0.1), lambda scale: (1, 1, 1))
    with pytest.raises(PaveError, match="no expert scores above zero"):
        find(search)


@torch.no_grad()
def accuracy(expert_folder, backbone, rows, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(expert_folder).eval()
    if backbone is not None:
        model.bert.load_state_dict({**model.bert.state_dict(), **backbone})
    return np.mean(
        [int(model(**tokenizer(r["text"], return_tensors="pt")).logits.argmax()) == r["label"] for r in rows]
    )


def test_a_search_with_models_never_touches_the_test_split(suite, tmp_path):
    task, rows, expert_folder = suite.tasks[0], suite.rows["first", "validation"], suite.experts["first"]
    poisoned = tmp_path / "test.jsonl"
    poisoned.write_text('{"text": null, "label": "poison"}\n')
    data = task.data.model_copy(update={"test": str(poisoned), "train": "nowhere.jsonl"})
    tasks = [task.model_copy(update={"name": name, "data": data}) for name in ("first", "again")]
    base, experts = suite.checkpoint(), {name: Checkpoint(expert_folder, "bert") for name in ("first", "again")}
    source = ExpertTaskVectors(base, experts, Architecture.of_folder(expert_folder))
    searcher = ScaleSearcher(
        tasks,
        Evaluator(tasks, experts, base),
        ExpertsCandidate(experts),
        data=suite.data,
        options={"accelerator": "cpu", "devices": 1},
        precision="32-true",
        root=tmp_path,
    )
    found = searcher.best(source, merge(TaskArithmetic(), source), ScaleSearch(search=(0.0, 1.0), points=3))

    start, expert = (load_file(folder / "model.safetensors") for folder in (suite.base, expert_folder))
    reference = accuracy(expert_folder, None, rows, suite.tokenizer)
    expected = []
    for scale in (0.0, 0.5, 1.0):
        backbone = {name: value + scale * 2 * (expert[f"bert.{name}"] - value) for name, value in start.items()}
        expected.append(accuracy(expert_folder, backbone, rows, suite.tokenizer) / reference)
    assert [average for _, average in found.tried] == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) > 1
    assert found.scale == (0.0, 0.5, 1.0)[int(np.argmax(expected))]
