"""How long training will take is what it takes; what Lightning would refuse is refused before."""

import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.experts.rehearsal import rehearsed
from pave_lightning.experts.schedule import Schedule, training_schedule
from pave_lightning.experts.trainer_options import (
    is_distributed,
    is_plain,
    machine_options,
    process_count,
    trainer_problems,
)
from pave_lightning.experts.trainers import refused_options
from pave_lightning.tasks.task import Task


def make_task(trainer=None, **training):
    data = dict.fromkeys(("train", "validation", "test"), "rows.csv")
    return Task.model_validate(
        {
            "name": "words",
            "data": data,
            "text": "text",
            "classes": ["low", "high"],
            "training": {"batch_size": 16, **training},
            "trainer": {"accelerator": "cpu", **(trainer or {})},
        }
    )


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        # 70 rows in batches of 16 are 5 batches an epoch; 3 epochs where nothing is said.
        ({}, (3, 15, 16)),
        ({"max_epochs": 2}, (2, 10, 16)),
        ({"max_steps": 3}, (1, 3, 16)),
        ({"max_steps": 7}, (2, 7, 16)),
        ({"max_steps": 100}, (3, 15, 16)),
        ({"max_epochs": -1, "max_steps": 12}, (3, 12, 16)),
        ({"max_epochs": 1, "accumulate_grad_batches": 2}, (1, 3, 32)),
        ({"max_epochs": 2, "limit_train_batches": 2}, (2, 4, 16)),
        ({"max_epochs": 2, "limit_train_batches": 0.4}, (2, 4, 16)),
        ({"max_epochs": 1, "overfit_batches": 2}, (1, 2, 16)),
        ({"max_epochs": 1, "min_epochs": 5}, (1, 5, 16)),
        ({"max_epochs": 1, "check_val_every_n_epoch": 3}, (1, 5, 16)),
        ({"max_epochs": 1, "val_check_interval": 2}, (1, 5, 16)),
        ({"max_epochs": 1, "num_sanity_val_steps": 2}, (1, 5, 16)),
    ],
    ids=str,
)
def test_the_schedule_is_what_lightning_makes_of_the_options(trainer, expected):
    assert training_schedule(make_task(trainer), 70, 40) == Schedule(*expected, at_most=False)


PLAIN = [
    {},
    *({"accelerator": value} for value in ("auto", "cpu")),
    *({"devices": value} for value in (1, "auto")),
    {"strategy": "auto"},
    *({"precision": value} for value in ("32", "32-true", "bf16-mixed", "bf16-true")),
    *({"enable_progress_bar": value} for value in (True, False)),
    *({"max_epochs": value} for value in (1, 1000)),
    {"log_every_n_steps": 1},
    *({"gradient_clip_val": value} for value in (1, 0.5)),
    {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "bf16-mixed", "max_epochs": 2},
]


@pytest.mark.parametrize("options", PLAIN, ids=str)
def test_what_is_known_without_asking_is_what_lightning_says(options):
    assert is_plain(options)
    assert refused_options(options, "trainer") == []


@pytest.mark.parametrize(
    "options",
    [
        *({"max_epochs": value} for value in (0, -1, True, "3", 1.0, None)),
        *({"devices": value} for value in (2, "1", True, [0], -1)),
        *({"precision": value} for value in ("16-mixed", 16, "half")),
        *({"gradient_clip_val": value} for value in (-1, float("inf"), float("nan"), "1")),
        {"max_steps": 3},
        {"epochs": 3},
        {"accelerator": "gpu"},
        {"enable_progress_bar": "no"},
    ],
    ids=str,
)
def test_lightning_is_asked_about_everything_else(options):
    assert not is_plain(options)


def test_a_cluster_has_a_say_in_plain_options(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert not is_plain({"max_epochs": 2})


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("epochs", [1, 3])
def test_plain_epochs_are_counted_as_lightning_counts_them(rows, epochs):
    schedule = training_schedule(make_task({"max_epochs": epochs}), rows, 1)
    assert (schedule.epochs, schedule.steps) == rehearsed(f'{{"max_epochs": {epochs}}}', 16, rows, 1, 1)


def test_processes_share_the_rows():
    assert training_schedule(make_task({"max_epochs": 1}), 70, 40, 2) == Schedule(1, 3, 32, at_most=False)
    assert process_count({"accelerator": "cpu", "devices": 2, "strategy": "ddp"}) == 2
    assert process_count({"accelerator": "cpu"}) == 1


@pytest.mark.parametrize(
    "task", [make_task({"max_time": "00:01:00:00"}), make_task(early_stopping={"patience": 2})], ids=["time", "early"]
)
def test_what_may_end_sooner_is_said(task):
    assert training_schedule(task, 70, 40).at_most


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"max_epochs": 0}, "nothing would be trained.*max_epochs: 0"),
        ({"max_steps": 0}, "nothing would be trained.*max_steps: 0"),
        ({"limit_train_batches": 0}, "nothing would be trained.*limit_train_batches: 0"),
        ({"limit_val_batches": 0}, "nothing would be validated.*limit_val_batches: 0"),
        ({"limit_val_batches": 0.01}, "limit_val_batches=0.33"),
        ({"limit_train_batches": 0.01}, "limit_train_batches=0.2"),
        ({"max_epochs": -1}, "no end"),
        ({"max_epochs": -1, "max_time": "00:01:00:00"}, "no end"),
        ({"val_check_interval": 6}, "val_check_interval"),
        ({"val_check_interval": 0}, "val_check_interval: 0"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch: 0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches: 0"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused(trainer, told):
    with pytest.raises(PaveError, match=told):
        training_schedule(make_task(trainer), 70, 40)


def test_asking_changes_nothing():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    training_schedule(make_task(), 70, 40)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strategy": "ddp_spawn", "devices": 2}, "ddp_spawn.*use strategy: ddp"),
        ({"strategy": "ddp_notebook", "devices": 2}, "use strategy: ddp"),
        ({"strategy": "fsdp"}, "trainer.strategy: fsdp needs GPUs; use fsdp2, which divides the weights on CPUs too"),
        ({"strategy": "fsdp_cpu_offload", "devices": 2}, "fsdp_cpu_offload needs GPUs"),
        ({"strategy": "ModelParallelStrategy"}, "trainer.strategy: ModelParallelStrategy is called fsdp2 here"),
        ({"strategy": "model_parallel", "devices": 2}, "model_parallel is called fsdp2 here"),
        ({"strategy": "fsdp2", "devices": 2, "precision": "64-true"}, "does not support .*64-true"),
        ({"strategy": "no_such"}, "no_such"),
        ({"strategy": {"class_path": "x"}}, "trainer.strategy: expected str, found"),
        ({"num_nodes": 2}, "trainer.num_nodes: pave starts its processes on this machine alone"),
        ({"fast_dev_run": True}, "trainer.fast_dev_run: it keeps no checkpoint"),
        ({"fast_dev_run": 3}, "trainer.fast_dev_run: it keeps no checkpoint"),
        ({"profiler": {"class_path": "x"}}, "trainer.profiler: expected str"),
        ({"plugins": ["x"]}, "trainer.plugins cannot be set in a recipe"),
        ({"max_epochs": "3"}, "trainer.max_epochs: expected int, found '3'"),
        ({"max_epochs": 1.5}, "trainer.max_epochs: expected int, found 1.5"),
        ({"max_time": 5}, "trainer.max_time: expected str or dict, found 5"),
        ({"limit_train_batches": 1.5}, r"1.5 for limit_train_batches, it has to be in \[0.0, 1.0\] or an int"),
        ({"accelerator": "tpu"}, "torch_xla"),
    ],
    ids=str,
)
def test_options_that_would_fail_later_are_refused(options, told):
    problem, *_ = trainer_problems({"accelerator": "cpu", **options}, "trainer")
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(problem)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "fsdp2", "devices": 2},
        {"strategy": "fsdp2", "devices": 2, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2},
        {"fast_dev_run": False},
        {"num_nodes": 1},
        {"precision": 16},
        {"profiler": "simple"},
        {"max_time": {"minutes": 1}},
    ],
    ids=str,
)
def test_harmless_options_pass(options):
    assert trainer_problems({"accelerator": "cpu", **options}, "trainer") == []


def test_what_a_strategy_lacks_is_told_at_once(monkeypatch):
    monkeypatch.setattr("pave_lightning.experts.trainers.find_spec", lambda name: None)
    options = {"accelerator": "cpu", "strategy": "deepspeed_stage_3", "devices": 2}
    told = trainer_problems(options, "trainer")
    assert "run `pip install deepspeed`, or use fsdp2" in told[0]
    assert "needs GPUs" in told[1]
    told = trainer_problems({**options, "strategy": "fsdp", "gradient_clip_val": 1.0}, "trainer")
    assert "needs GPUs" in told[0]
    assert "clips no gradients by their norm" in told[1]


@pytest.mark.parametrize(
    ("strategy", "where_nothing_is_trained"),
    [
        ("fsdp", "fsdp2"),
        ("fsdp2", "fsdp2"),
        ("fsdp_cpu_offload", "fsdp2"),
        ("deepspeed_stage_3_offload", "fsdp2"),
        ("deepspeed", "auto"),
        ("deepspeed_stage_2", "auto"),
        ("ddp_find_unused_parameters_true", "ddp_find_unused_parameters_true"),
        ("auto", "auto"),
    ],
)
def test_capture_and_evaluation_divide_weights_as_the_training_does(strategy, where_nothing_is_trained):
    options = {"strategy": strategy, "devices": 4, "max_epochs": 2}
    assert machine_options(options) == {"strategy": where_nothing_is_trained, "devices": 4}
    assert machine_options({"devices": 4}) == {"devices": 4}


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp", "deepspeed_stage_2"])
def test_divided_weights_are_always_trained_in_processes_of_their_own(strategy):
    assert is_distributed({"accelerator": "cpu", "devices": 1, "strategy": strategy})
    assert not is_distributed({"accelerator": "cpu", "devices": 1, "strategy": "ddp"})


def test_processes_of_divided_weights_are_counted():
    assert process_count({"accelerator": "cpu", "devices": 3, "strategy": "fsdp2"}) == 3
