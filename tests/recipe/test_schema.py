from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

import pave_lightning.recipe.schema as recipe_module
from pave_lightning.config import Section, slug
from pave_lightning.errors import PaveError
from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.pipeline.purifications import purifications
from pave_lightning.purification.options import Purify
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.options import Expert, Training
from pave_lightning.tasks.suites import suite_task, suite_task_names
from pave_lightning.tasks.task import Task

SECTIONS = sorted(
    (
        value
        for value in vars(recipe_module).values()
        if isinstance(value, type) and issubclass(value, Section) and value is not Section
    ),
    key=lambda section: section.__name__,
)
OWN_TASK = {"name": "own", "data": {"train": "a.csv"}, "text": "body", "classes": 2}


def build(**keys: Any) -> Recipe:
    return Recipe.model_validate({"name": "demo", "base": "folder", "tasks": ["pocket/movie"], **keys})


def build_task(**keys: Any) -> Task:
    return Task.model_validate({**OWN_TASK, **keys})


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_and_every_key_is_documented(section: type[Section]) -> None:
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no description"
        assert field.description.rstrip().endswith((".", "output.")), f"{section.__name__}.{name}"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_is_frozen_and_refuses_unknown_keys(section: type[Section]) -> None:
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["strict"]


def test_defaults() -> None:
    recipe = build()
    assert recipe.seed == 0
    assert recipe.merge == []
    assert recipe.output == "checkpoints"
    assert recipe.task("movie").training == Training()
    assert recipe.purify == Purify()


@pytest.mark.parametrize("name", suite_task_names())
def test_every_suite_task_is_valid(name: str) -> None:
    (task,) = build(tasks=[name]).tasks
    assert task.name == name.partition("/")[2]
    assert task.primary_metric == task.metrics[0]


def test_suite_names_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'pocket/movi': did you mean 'pocket/movie'\?"):
        suite_task("pocket/movi")


def test_short_forms_of_a_task() -> None:
    task = build_task(metrics="accuracy")
    assert task.text == ["body"]
    assert task.classes == ["0", "1"]
    assert task.metrics == ["accuracy"]
    assert task.primary_metric == "accuracy"
    assert task.output_size == 2


def test_classes_that_yaml_takes_for_something_else_are_texts() -> None:
    assert build_task(classes=[False, True]).classes == ["false", "true"]
    assert build_task(classes=[1, 2.5, "x"]).classes == ["1", "2.5", "x"]


def test_a_regression_task() -> None:
    task = build_task(kind="regression", classes=None, value_range=[0, 5])
    assert task.metrics == ["pearson", "spearman"]
    assert task.primary_metric == "pearson"
    assert task.output_size == 1
    assert task.value_range == (0.0, 5.0)


def test_another_primary_metric() -> None:
    assert build_task(metrics=["matthews", "accuracy"], primary_metric="accuracy").primary_metric == "accuracy"


def test_short_forms_of_merge_steps() -> None:
    recipe = build(merge=["average", {"method": "ties", "scale": 1}, {"method": "ties", "name": "searched"}])
    assert [step.name for step in recipe.merge] == ["average", "ties", "searched"]
    assert recipe.merge[1].scale == 1.0
    assert MergeStep.model_validate("average").method == "average"


def test_a_scale_is_a_number_or_a_search() -> None:
    step = MergeStep.model_validate({"method": "ties", "scale": {"search": [0.1, 1]}})
    assert step.scale == ScaleSearch(search=(0.1, 1.0), points=7)
    assert MergeStep.model_validate({"method": "ties", "scale": "search"}).scale == ScaleSearch(search="auto")
    assert MergeStep.model_validate({"method": "ties", "scale": {"search": "auto"}}).scale == ScaleSearch(search="auto")
    assert MergeStep.model_validate({"method": "ties", "scale": 0.4}).scale == 0.4
    assert MergeStep.model_validate({"method": "ties"}).scale is None


def test_expert_is_written_from() -> None:
    expert = Expert.model_validate({"from": "folder"})
    assert expert.from_ == "folder"
    assert expert.model_dump(by_alias=True) == {"from": "folder", "adapter": None, "accept": []}


def test_training_is_handed_down_key_by_key() -> None:
    recipe = build(
        training={"learning_rate": 1e-4, "batch_size": 8},
        tasks=["pocket/movie", {"use": "pocket/isa", "training": {"batch_size": 16}}, OWN_TASK],
    )
    movie, isa, own = recipe.tasks
    assert (movie.training.learning_rate, movie.training.batch_size) == (1e-4, 8)
    assert (isa.training.learning_rate, isa.training.batch_size) == (1e-4, 16)
    assert own.training == recipe.training


def test_examples_and_trainer_are_handed_down_key_by_key() -> None:
    recipe = build(
        examples={"train": 100, "test": 50},
        trainer={"max_epochs": 2, "accelerator": "cpu"},
        tasks=["pocket/movie", {"use": "pocket/isa", "examples": {"train": None}, "trainer": {"max_epochs": 1}}],
    )
    movie, isa = recipe.tasks
    assert (movie.examples.train, movie.examples.validation, movie.examples.test) == (100, None, 50)
    assert (isa.examples.train, isa.examples.test) == (None, 50)
    assert movie.trainer == {"max_epochs": 2, "accelerator": "cpu"}
    assert isa.trainer == {"max_epochs": 1, "accelerator": "cpu"}


def test_purify_is_handed_down_key_by_key() -> None:
    recipe = build(purify={"rho": 0.5, "damping": 0.2}, merge=["average", {"method": "ties", "purify": {"rho": 0.9}}])
    average, ties = recipe.merge
    assert average.purify == recipe.purify
    assert (ties.purify.rho, ties.purify.damping) == (0.9, 0.2)


def test_equal_purifications_are_one_in_a_set() -> None:
    same = [Purify(tasks=["movie"], rho=1), Purify(tasks=["movie"], rho=1.0)]
    assert set(same) == {same[0]}
    assert len({*same, Purify(tasks=["isa"], rho=1), Purify(rho=1)}) == 3


def test_what_is_handed_in_is_not_changed() -> None:
    raw = {"name": "d", "base": "b", "training": {"batch_size": 8}, "tasks": [{"use": "pocket/isa", "training": {}}]}
    Recipe.model_validate(raw)
    assert raw["tasks"] == [{"use": "pocket/isa", "training": {}}]


def test_keys_of_a_suite_task_can_be_changed_one_by_one() -> None:
    (task,) = build(tasks=[{"use": "glue/sst2", "name": "sst", "data": {"revision": "abc"}}]).tasks
    assert task.name == "sst"
    assert task.data.hub == "nyu-mll/glue"
    assert task.data.revision == "abc"
    assert task.data.test == "validation"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text": "label"}, "'text' and 'label' both name the column 'label'"),
        ({"text": ["text", "text"]}, "'text' names the column 'text' twice"),
        ({"classes": None}, "a text_classification task needs 'classes'"),
        ({"value_range": [0, 1]}, "value_range\n.*not permitted"),
        ({"kind": "regression"}, "classes\n.*not permitted"),
        (
            {"metrics": ["pearson"]},
            "metric 'pearson' does not fit a text_classification task; fitting are accuracy, f1",
        ),
        ({"kind": "regression", "classes": None, "metrics": "f1"}, "metric 'f1' does not fit a regression task"),
        ({"classes": 3, "metrics": ["f1"]}, "'f1' is for two classes; for more use 'macro_f1'"),
        ({"primary_metric": "matthews"}, "the primary metric 'matthews' is not among the metrics accuracy"),
        ({"classes": ["a", "a"]}, "the names in 'classes' must differ"),
        ({"metrics": ["f1", "f1"]}, "the names in 'metrics' must differ"),
        ({"kind": "regression", "classes": None, "value_range": [1, 1]}, r"'value_range' must be \[lowest, highest\]"),
    ],
)
def test_keys_of_a_task_that_disagree(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build_task(**keys)


def test_everything_that_disagrees_in_a_task_is_told() -> None:
    with pytest.raises(ValidationError) as caught:
        build_task(kind="regression", classes=None, metrics=["accuracy"], primary_metric="f1", value_range=[1, 1])
    assert str(caught.value.errors()[0]["ctx"]["error"]).splitlines() == [
        "metric 'accuracy' does not fit a regression task; fitting are pearson, spearman",
        "metric 'f1' does not fit a regression task; fitting are pearson, spearman",
        "the primary metric 'f1' is not among the metrics accuracy",
        "'value_range' must be [lowest, highest]",
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": ["pocket/movie", "pocket/movie"]}, "each task needs a name of its own, but movie stands twice"),
        ({"merge": ["ties", "ties"]}, "each merge step needs a name of its own, but ties stands twice"),
        ({"merge": ["base"]}, "a merge step cannot be named 'base'"),
        ({"merge": [{"method": "average", "name": "experts"}]}, "a merge step cannot be named 'experts'"),
        ({"purify": {"tasks": ["movi"]}}, r"purify.tasks: no task is named 'movi'; did you mean 'movie'\?"),
        (
            {"merge": [{"method": "ties", "purify": {"tasks": ["isa"]}}]},
            "purify.tasks of merge step 'ties': no task is named 'isa'",
        ),
    ],
)
def test_sections_that_disagree(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**keys)


def test_a_wrong_task_to_purify_is_told_once_and_not_for_every_step() -> None:
    with pytest.raises(ValidationError) as caught:
        build(purify={"tasks": ["movi"]}, merge=["average", "ties"])
    assert str(caught.value).count("no task is named") == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"seed": True},
        {"seed": "3"},
        {"seed": 1.0},
        {"purify": {"rho": True}},
        {"purify": {"rho": "0.5"}},
        {"purify": {"rho": float("nan")}},
        {"purify": {"damping": float("inf")}},
        {"tracking": {"upload_models": 1}},
        {"merge": [{"method": "ties", "scale": True}]},
        {"merge": [{"method": "ties", "scale": {"search": [False, True]}}]},
        {"merge": [{"method": "ties", "name": 0}]},
        {"merge": [{"method": "ties", "vectors": ["plain", "plain"]}]},
        {"name": "a b"},
        {"name": ".hidden"},
        {"name": ""},
    ],
)
def test_values_of_another_kind_are_not_converted(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build(**keys)


def test_whole_numbers_are_numbers() -> None:
    assert build(purify={"rho": 1}).purify.rho == 1.0


def test_slug() -> None:
    assert slug("a/b: c") == "a-b-c"
    assert slug("ties_0.5-x") == "ties_0.5-x"


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (
            [{"method": "featcal", "anchor": "tise"}, "ties"],
            "anchor: no merge step is named 'tise'; did you mean 'ties'",
        ),
        ([{"method": "featcal", "anchor": "featcal"}], "its anchors lead back to itself (featcal -> featcal)"),
        (
            [{"method": "featcal", "anchor": "b"}, {"method": "featcal", "name": "b", "anchor": "featcal"}],
            "its anchors lead back to itself (featcal -> b -> featcal)",
        ),
        ([{"method": "ties", "tune": {"density": []}}], "tune.density: takes no value"),
        ([{"method": "ties", "tune": {"density": [0.1, 0.1]}}], "tune.density: takes the same value twice"),
        (
            [{"method": "ties", "tune": {"density": [0.1]}, "options": {"density": 0.2}}],
            "has a value in options as well",
        ),
    ],
)
def test_anchors_and_tuned_options_that_cannot_be(recipe_settings, steps, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        Recipe.model_validate({**recipe_settings, "merge": steps})


def test_every_combination_of_tuned_options():
    step = MergeStep.model_validate({"method": "m", "options": {"x": 1}, "tune": {"a": [1, 2], "b": [True, False]}})
    assert step.tuned_options == [{"x": 1, "a": a, "b": b} for a in (1, 2) for b in (True, False)]
    assert MergeStep.model_validate("m").tuned_options == [{}]


@pytest.mark.parametrize(
    ("purify", "merge", "keys"),
    [
        ({"rho": "auto"}, [], "purify.rho"),
        ({"rho": "auto"}, ["average", {"method": "ties", "purify": {"damping": 0.2}}], "purify.rho"),
        (
            {"rho": 0.9},
            [
                {"method": "average", "vectors": ["plain"]},
                {"method": "ties", "purify": {"rho": "auto"}},
                {"method": "emr", "name": "kept", "purify": {"rho": "auto"}},
            ],
            "merge.ties.purify.rho or merge.kept.purify.rho",
        ),
    ],
)
def test_where_a_ratio_must_be_given_is_told_by_the_keys_that_say_auto(
    purify: dict[str, Any], merge: list[Any], keys: str
) -> None:
    with pytest.raises(PaveError, match=rf"give a number at {re.escape(keys)}$"):
        purifications(build(purify=purify, merge=merge))
