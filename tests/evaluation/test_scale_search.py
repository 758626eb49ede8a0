import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from pave_lightning.errors import PaveError
from pave_lightning.evaluation import Evaluator, ExpertsCandidate, TaskScore
from pave_lightning.evaluation.scale_search import ScaleSearcher
from pave_lightning.merging import TaskArithmetic, merge
from pave_lightning.merging.running import MergedVectors
from pave_lightning.recipe import ScaleSearch
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
        return {task.name: TaskScore({task.headline: value}, 1) for task, value in zip(self.tasks, values, strict=True)}


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


def find(searcher, search=(0.0, 1.0), points=5, examples=None, widen=False):
    asked = ScaleSearch(search=search, points=points, examples=examples, widen=widen)
    return searcher.best(One(), MergedVectors({"w": torch.ones(())}), asked)


def test_the_best_average_of_normalised_scores_wins(searcher):
    # Raw sums favour 1.0 (0.9 + 0.1 + 0.1); against the experts 0.25 does better (0.5/0.9 + 0.2/0.2 + 0.1/0.1).
    curve = {0.0: (0, 0, 0), 0.25: (0.5, 0.2, 0.1), 0.5: (0.5, 0.1, 0.1), 0.75: (0.6, 0, 0), 1.0: (0.9, 0.1, 0.1)}
    _, search = searcher((0.9, 0.2, 0.1), curve.get)
    found = find(search)
    assert found["scale"] == 0.25
    averages = [(a / 0.9 + b / 0.2 + c / 0.1) / 3 for a, b, c in curve.values()]
    assert [scale for scale, _ in found["tried"]] == list(curve)
    assert [average for _, average in found["tried"]] == pytest.approx(averages)


def test_among_equals_the_smaller_scale_wins(searcher):
    _, search = searcher((1, 1, 1), lambda scale: (0.5, 0.5, 0.5) if scale > 0.2 else (0, 0, 0))
    assert find(search)["scale"] == 0.25


def test_both_ends_are_tried(searcher):
    stub, search = searcher((1, 1, 1), lambda scale: (scale, scale, scale))
    assert find(search, (-0.2, 1.4), 3)["scale"] == 1.4
    assert [scale for _, scale, _ in stub.asked] == [None, -0.2, 0.6, 1.4]


@pytest.mark.parametrize(
    ("best", "search", "told"),
    [(1.0, (0.5, 1.0), "largest"), (0.5, (0.5, 1.0), "smallest"), (0.75, (0.5, 1.0), None), (0.0, (0.0, 1.0), None)],
)
def test_a_best_scale_at_the_end_of_the_search_is_told(searcher, caplog, best, search, told):
    _, found = searcher([1.0, 1.0, 1.0], lambda scale: [1 - abs(scale - best)] * 3)
    assert find(found, search=search)["scale"] == best
    assert [told] * bool(told) == [word for word in ("largest", "smallest") if f"is the {word} that was" in caplog.text]


@pytest.mark.parametrize(
    ("best", "beyond", "chosen"),
    [
        (2.0, [], 2.0),
        (4.2, [4.0, 5.0], 4.0),
        (9.0, [4.0, 5.0, 6.0], 6.0),  # as many again as there are points, and no more
        (0.45, [0.5, 0.25], 0.5),
        (0.0, [0.5, 0.25, 0.125], 0.125),
    ],
)
def test_a_search_that_may_widen_goes_on_beyond_its_ends(searcher, caplog, best, beyond, chosen):
    stub, search = searcher((1, 1, 1), lambda scale: [10 - abs(scale - best)] * 3)
    found = find(search, search=(1.0, 3.0), points=3, widen=True)
    assert found["scale"] == chosen
    assert [scale for _, scale, _ in stub.asked] == [None, 1.0, 2.0, 3.0, *beyond]
    assert [scale for scale, _ in found["tried"]] == sorted([1.0, 2.0, 3.0, *beyond])
    at_end = bool(beyond) and chosen == beyond[-1]
    assert (f"that was tried; search around {chosen:.4g}" in caplog.text) == at_end
    assert "widen: true" not in caplog.text


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize(
    ("curve", "beyond", "chosen"),
    [
        (lambda scale: 0.5, [], 1.0),
        (lambda scale: 0.5 if scale < 2.5 else 0.1, [], 1.0),
        (lambda scale: math.nan if scale > 1.5 else 0.5, [0.5], 0.5),  # what larger ones do says nothing
        (lambda scale: 0.5 if scale < 0.8 else 0.4 / scale, [0.5, 0.25], 0.25),
    ],
)
def test_a_search_does_not_walk_along_a_plateau(searcher, caplog, curve, beyond, chosen, widen):
    stub, search = searcher((1, 1, 1), lambda scale: [curve(scale)] * 3)
    found = find(search, search=(1.0, 3.0), points=3, widen=widen)
    assert found["scale"] == (chosen if widen else 1.0)
    assert [scale for _, scale, _ in stub.asked] == [None, 1.0, 2.0, 3.0, *(beyond if widen else [])]
    plateau = widen or curve(1.0) == curve(2.0)
    assert ("larger ones do as well" in caplog.text) == plateau
    assert ("widen: true goes on" in caplog.text) == (not plateau)


def test_below_a_negative_scale_nothing_is_widened_nor_said_to_be(searcher, caplog):
    _, search = searcher((1, 1, 1), lambda scale: [-scale] * 3)
    for widen in (False, True):
        assert find(search, search=(-1.0, 0.0), points=2, widen=widen)["scale"] == -1.0
    assert caplog.text.count("the smallest that was tried; search around -1") == 2


def test_results_of_searches_that_do_not_widen_keep_their_keys():
    assert ScaleSearch(search=(0, 1)).model_dump() == {"search": (0.0, 1.0), "points": 7, "examples": None}
    assert ScaleSearch(search=(0, 1), widen=True).model_dump()["widen"] is True


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
    assert find(search)["scale"] == 0.5


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
    assert found["scale"] == 0.0
    assert found["tried"][0][1] == pytest.approx(1.0)


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
    assert [average for _, average in found["tried"]] == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) > 1
    assert found["scale"] == (0.0, 0.5, 1.0)[int(np.argmax(expected))]
