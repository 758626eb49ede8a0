import pytest

from pave_lightning.tasks.suites import suite_task, suite_task_names
from pave_lightning.tasks.task import Task


@pytest.mark.parametrize("name", suite_task_names())
def test_every_named_task_is_a_valid_task(name):
    task = Task.model_validate(suite_task(name))
    assert task.name == name.split("/")[1]
    assert task.primary_metric == task.metrics[0]


def test_names_are_unique_and_cover_all_suites():
    names = suite_task_names()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"pocket", "images", "instructions", "glue", "clip"}


def test_glue_reports_on_the_labelled_split():
    assert suite_task("glue/sst2")["data"] == {
        "hub": "nyu-mll/glue",
        "config": "sst2",
        "train": "train[:90%]",
        "validation": "train[90%:]",
        "test": "validation",
    }
    assert suite_task("glue/mnli")["data"]["test"] == "validation_matched"


@pytest.mark.parametrize(("wrong", "meant"), [("pocket/moive", "pocket/movie"), ("glue/sst-2", "glue/sst2")])
def test_unknown_task_names_the_nearest(wrong, meant):
    with pytest.raises(ValueError, match=f"unknown task '{wrong}'.*'{meant}'"):
        suite_task(wrong)


def test_far_off_name_lists_what_is_known():
    with pytest.raises(ValueError, match="known are: pocket/movie"):
        suite_task("zzz")


def test_changing_a_task_leaves_the_suite_as_it_was():
    suite_task("glue/mnli")["data"]["test"] = "other"
    assert suite_task("glue/sst2")["data"]["test"] == "validation"
    assert suite_task("glue/mnli")["data"]["test"] == "validation_matched"
