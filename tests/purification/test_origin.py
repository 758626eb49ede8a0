"""Statistics of another expert, of another model or of a part of the model are refused."""

import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.purification import PurifiedTaskVectors
from pave_lightning.purification.options import Purify
from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.weights import ParameterKind, model_digest, task_vectors

LAYERS = ("block.wide", "block.tall", "end.square", "end.flipped")
AGAIN = "capture the statistics of this very expert again"


def problems(source, captured, **options):
    with pytest.raises(PaveError) as caught:
        PurifiedTaskVectors(source, captured, Purify(rho=0.7, **options))
    return str(caught.value).splitlines()[1:]


def told(statistics, *, metadata=None, unreached=None, keep=lambda layer: True, rename=lambda layer: layer):
    """The same statistics with other metadata and a part of the layers, under other names."""
    moments = {rename(layer): moment for layer, moment in statistics.items() if keep(layer)}
    return TaskStatistics(moments, examples=5, metadata=metadata, unreached=unreached)


def test_statistics_that_name_another_task_are_refused(source, statistics):
    named = {task: told(own, metadata={"task": task}) for task, own in statistics.items()}
    PurifiedTaskVectors(source, named, Purify(rho=0.7))
    swapped = {"a": named["b"], "b": named["a"], "c": named["c"]}
    assert problems(source, swapped) == [
        f"  - task '{task}': expected statistics of this task, but they say that they were captured of task '{other}': "
        f"{AGAIN}"
        for task, other in ("ab", "ba")
    ]
    strangers = {task: told(own, metadata={"task": f"{task} elsewhere"}) for task, own in statistics.items()}
    PurifiedTaskVectors(source, strangers, Purify(rho=0.7))


def test_layers_that_are_lacking_are_refused_by_name_all_at_once(source, statistics, tmp_path):
    part = told(statistics["b"], keep=lambda layer: layer == "block.tall", unreached=["end.square"])
    part.save(tmp_path / "part")
    captured = {**statistics, "a": told(statistics["a"], unreached=[]), "b": TaskStatistics.load(tmp_path / "part")}
    assert problems(source, captured) == [
        "  - task 'b': expected all 4 linear layers of the model, but the statistics lack 2 layers (block.wide, "
        "end.flipped), and do not say that no example reached them: "
        f"delete {tmp_path / 'part'}, then {AGAIN} (pave capture RECIPE)"
    ]


def test_layers_that_no_example_reached_may_be_lacking(source, statistics):
    captured = {
        task: told(own, keep=lambda layer: layer != "end.square", unreached=["end.square"])
        for task, own in statistics.items()
    }
    vectors = PurifiedTaskVectors(source, captured, Purify(rho=0.7))
    vectors.expert("a", source.named("end.square"))
    assert vectors.untouched == {(task, "end.square"): "no example reached it" for task in "abc"}


def test_statistics_that_do_not_say_what_was_reached_may_lack_layers(source, statistics):
    captured = {task: told(own, keep=lambda layer: layer == "end.square") for task, own in statistics.items()}
    assert captured["a"].unreached is None
    PurifiedTaskVectors(source, captured, Purify(rho=0.7))


def test_a_convolution_that_was_not_captured_is_not_lacking(make_source, capture):
    source = make_source(convolutions=True)
    captured = {task: told(own, unreached=[]) for task, own in capture(source).items()}
    vectors = PurifiedTaskVectors(source, captured, Purify(rho=0.7))
    assert len(vectors.layers) == len(LAYERS)


def test_layers_under_a_foreign_prefix_are_refused(source, statistics):
    def rename(layer):
        return f"model.{layer}" if layer.startswith("end") else layer

    captured = {**statistics, "b": told(statistics["b"], rename=rename)}
    assert problems(source, captured) == [
        "  - task 'b': the statistics hold 2 layers (model.end.flipped, model.end.square), which the model has not: "
        f"{AGAIN}"
    ]


def test_a_layer_of_a_head_may_end_like_one_of_the_model(source, statistics):
    extra = LayerMoment("input", torch.eye(9), 9)
    captured = {
        task: TaskStatistics({**own, "classifier.end.square": extra}, examples=1) for task, own in statistics.items()
    }
    PurifiedTaskVectors(source, captured, Purify(rho=0.7))


@pytest.fixture(scope="module")
def stored(base_folder, expert_folders):
    """Task vectors of two checkpoints."""
    chosen = {task: str(expert_folders[task]) for task in ("first", "second")}
    return task_vectors(str(base_folder), chosen)


def identities(source, **facts):
    linear = [parameter for parameter in source.parameters if parameter.kind is ParameterKind.LINEAR]
    moments = {p.layer: LayerMoment("input", torch.eye(p.matrix_shape[1]), 9) for p in linear}
    return TaskStatistics(moments, examples=1, **facts)


def test_statistics_of_another_experts_files_are_refused(stored, expert_folders):
    digests = {task: model_digest(expert_folders[task]) for task in stored.tasks}
    captured = {task: identities(stored, metadata={"expert_files": digests[task]}) for task in stored.tasks}
    PurifiedTaskVectors(stored, captured, Purify(rho=0.7))
    # A source made of the experts' is one of the experts, too.
    inner = PurifiedTaskVectors(stored, captured, Purify(rho=0.7))
    swapped = {"first": captured["second"], "second": captured["second"]}
    for source in (stored, inner):
        assert problems(source, swapped) == [
            f"  - task 'first': the statistics were captured of another expert than {expert_folders['first']}: "
            f"expected expert_files {digests['first']}, found {digests['second']}: {AGAIN}"
        ]


def test_digests_count_for_more_than_names_of_tasks(stored, expert_folders):
    captured = {
        task: identities(stored, metadata={"expert_files": model_digest(expert_folders[task]), "task": other})
        for task, other in (("first", "second"), ("second", "first"))
    }
    PurifiedTaskVectors(stored, captured, Purify(rho=0.7))


def test_only_modules_of_the_experts_may_have_been_captured_besides(stored):
    extra = {"classifier": LayerMoment("input", torch.eye(32), 9), "model.other": LayerMoment("input", torch.eye(3), 9)}
    captured = {
        task: TaskStatistics({**identities(stored), **extra}, examples=1, unreached=[]) for task in stored.tasks
    }
    assert problems(stored, captured) == [
        f"  - task '{task}': the statistics hold 1 layer (model.other), which the model has not: {AGAIN}"
        for task in stored.tasks
    ]
