"""One model trained on several tasks: whose batch is next, what is shared, rates, resuming."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from pave_lightning.experts import fitting, joint
from pave_lightning.experts.fitting import fit_expert
from pave_lightning.experts.joint import fit_joint
from pave_lightning.experts.joint_schedule import (
    common_freeze,
    disagreements,
    joint_schedule,
    joint_settings,
    partly_frozen,
)
from pave_lightning.experts.task_expert import TaskExpert, linear_schedule
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.joint_data import JointDataModule
from pave_lightning.tasks.samplers import JointSampler, TrainingSampler
from pave_lightning.tasks.task import Task
from pave_lightning.tasks.turns import Turns

ROWS = {"words": (48, 24), "numbers": (48, 24), "tags": (20, 12)}


class StoppedError(Exception):
    """In place of a kill."""


@pytest.fixture(scope="module")
def make_tasks(task_files, tag_files):
    """Three tasks of three kinds, with options of their own."""
    own = {
        "words": {"data": task_files(), "text": "text", "classes": ["low", "high"]},
        "numbers": {"data": task_files("regression"), "text": "text", "kind": "regression"},
        "tags": {"data": tag_files, "kind": "token_classification", "words": "words", "classes": ["low", "high"]},
    }

    def build(*names, trainer=None, training=None, **different):
        return [
            Task.model_validate(
                {
                    "name": name,
                    **own[name],
                    "training": {
                        **{"learning_rate": 1e-3, "batch_size": 16, "max_length": 16},
                        **(training or {}),
                        **different.get(name, {}),
                    },
                    "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, **(trainer or {})},
                }
            )
            for name in names or own
        ]

    return build


@pytest.fixture(scope="module")
def fit(base_folder, tmp_path_factory):
    """Trains on tasks; the models."""
    cache = tmp_path_factory.mktemp("data")

    def run(tasks, folder, base=base_folder, seed=0):
        turns = joint_schedule(tasks, ROWS, seed).turns
        return fit_joint(tasks, base, turns, work_folder=folder / "work", cache_folder=cache)

    return run


# --- whose batch is next ---------------------------------------------------------------------------------------------


def test_every_epoch_has_all_batches_of_all_tasks_in_an_order_of_its_own():
    turns = Turns((5, 2, 3), seed=4)
    epochs = [turns.of_epoch(epoch).tolist() for epoch in range(20)]
    assert all(Counter(epoch) == {0: 5, 1: 2, 2: 3} for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert epochs[7] == Turns((5, 2, 3), seed=4).of_epoch(7).tolist()
    assert epochs[7] != Turns((5, 2, 3), seed=5).of_epoch(7).tolist()
    assert [turns.at(batch) for batch in range(200)] == [task for epoch in epochs for task in epoch]
    first = np.mean([epoch.index(1) for epoch in epochs])
    assert 0 < first < 8, "tasks are mixed, not one after the other"


def test_batches_are_those_that_each_task_has_alone_and_a_resumed_run_gets_the_rest():
    lengths = [range(3, 23), range(1, 9)]
    sizes = (4, 3)
    alone = [TrainingSampler(one, batch_size=size, seed=2) for one, size in zip(lengths, sizes, strict=True)]
    turns = Turns((5, 3), seed=2)
    sampler = JointSampler(
        [TrainingSampler(one, batch_size=size, seed=2) for one, size in zip(lengths, sizes, strict=True)], turns
    )
    assert len(sampler) == 8
    sampler.set_epoch(3)
    found = list(sampler)
    assert [task for task, _ in found] == turns.of_epoch(3).tolist()
    for task, one in enumerate(alone):
        one.set_epoch(3)
        assert [row for owner, rows in found if owner == task for row in rows] == list(one)
        assert all(len(rows) <= sizes[task] for owner, rows in found if owner == task)
    sampler.resume(3, 6)
    assert list(sampler) == list(sampler) == found[6:]
    sampler.set_epoch(4)
    assert len(list(sampler)) == 8


def test_all_processes_train_on_the_same_task_in_a_step():
    turns, ranks = Turns((3, 2), seed=0), []
    for rank in range(2):
        samplers = [TrainingSampler(range(1, rows + 1), batch_size=4, seed=0, world=2, rank=rank) for rows in (24, 16)]
        ranks.append(list(JointSampler(samplers, turns)))
    assert [task for task, _ in ranks[0]] == [task for task, _ in ranks[1]]
    assert all(len(one.rows) == len(other.rows) for one, other in zip(*ranks, strict=True))
    for task, rows in ((0, 24), (1, 16)):
        assert sorted(row for rank in ranks for owner, part in rank if owner == task for row in part) == list(
            range(rows)
        )


def test_a_batch_is_what_the_task_itself_gives_its_model(make_tasks, tiny_tokenizer, tmp_path):
    tasks = make_tasks()
    turns = joint_schedule(tasks, ROWS, 0).turns
    assert turns.batches == (3, 3, 2)

    def modules():
        return [TaskDataModule(task, tiny_tokenizer, seed=0, cache_dir=tmp_path, batch_size=16) for task in tasks]

    batches = list(JointDataModule(modules(), turns).train_dataloader())
    for index, module in enumerate(modules()):
        alone = list(module.train_dataloader())
        own = [batch for task, batch in batches if task == index]
        assert len(own) == len(alone)
        torch.testing.assert_close(own, alone, rtol=0, atol=0)


# --- how long --------------------------------------------------------------------------------------------------------


def test_a_joint_training_has_the_steps_of_all_tasks(make_tasks):
    tasks = make_tasks(words={"batch_size": 10}, trainer={"max_epochs": 2})
    schedule = joint_schedule(tasks, ROWS, 0)
    assert (schedule.epochs, schedule.turns.batches, schedule.steps) == (2, (5, 3, 2), 20)
    limited = joint_schedule(make_tasks(trainer={"limit_train_batches": 1}), ROWS, 0)
    assert (limited.turns.batches, limited.steps) == ((1, 1, 1), 9)
    assert "limit_train_batches" not in joint_settings(make_tasks(trainer={"limit_train_batches": 1})[0])
    assert joint_schedule(make_tasks(training={"early_stopping": {}}), ROWS, 0).at_most


def test_processes_need_not_wait_for_other_tasks_heads(make_tasks):
    (task,) = make_tasks("words", trainer={"devices": 2, "strategy": "ddp"})
    assert joint_settings(task)["strategy"] == "ddp_find_unused_parameters_true"
    assert "strategy" not in joint_settings(make_tasks("words")[0])


def test_what_has_to_agree(make_tasks):
    assert not list(disagreements(make_tasks(words={"learning_rate": 1e-5, "max_length": 8, "batch_size": 4})))
    (told,) = disagreements(make_tasks(words={"weight_decay": 0.5}))
    assert told.startswith("training.weight_decay must be the same for all tasks, found words: 0.5 and numbers: 0.01")
    (told,) = disagreements(make_tasks(tags={"lora": {"rank": 2}}))
    assert "training.lora" in told
    assert "tags: {'rank': 2" in told
    (told,) = disagreements(make_tasks(trainer={"max_steps": 4}))
    assert told.startswith("trainer.max_steps cannot be shared out")
    one, other, _ = make_tasks()
    quick = other.model_copy(update={"trainer": {**other.trainer, "max_epochs": 9}})
    (told,) = disagreements([one, quick])
    assert told.startswith("trainer.max_epochs must be the same for all tasks, found words: 3 and numbers: 9")


def test_what_is_frozen_for_all_is_frozen(make_tasks):
    tasks = make_tasks(
        "words",
        "numbers",
        words={"freeze": ["embeddings", "encoder.layer.0"]},
        numbers={"freeze": ["embeddings.word_embeddings", "encoder.layer.0"]},
    )
    assert common_freeze(tasks) == ["encoder.layer.0", "embeddings.word_embeddings"]
    assert partly_frozen(tasks) == ["embeddings"]


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warm_up", "steps"), [(0, 7), (2, 9), (5, 5)])
def test_the_schedule_is_that_of_transformers(warm_up, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warm_up, steps)
    for step in range(steps + 2):
        assert linear_schedule(step, warm_up, steps) == schedule.lr_lambdas[0](step)


def test_each_step_has_the_rates_of_its_task_and_leaves_other_heads_alone(make_tasks, fit, tmp_path, monkeypatch):
    """Seen from outside: which weights move in a step, and by how much."""
    rates = {"words": 1e-3, "numbers": 4e-3, "tags": 2e-3}
    tasks = make_tasks(
        trainer={"max_epochs": 1},
        training={"warmup_share": 0.0, "weight_decay": 0.0},
        **{name: {"learning_rate": rate, "head_learning_rate": 10 * rate} for name, rate in rates.items()},
    )
    before, seen = {}, []
    start, end = TaskExpert.on_train_batch_start, TaskExpert.on_train_batch_end

    def noting(self, batch, batch_idx):
        before.update({name: value.detach().clone() for name, value in self.named_parameters()})
        return start(self, batch, batch_idx)

    def compare(self, outputs, batch, batch_idx):
        moved = {name: float((value.detach() - before[name]).abs().max()) for name, value in self.named_parameters()}
        seen.append((batch.task, moved))
        return end(self, outputs, batch, batch_idx)

    monkeypatch.setattr(TaskExpert, "on_train_batch_start", noting)
    monkeypatch.setattr(TaskExpert, "on_train_batch_end", compare)
    fit(tasks, tmp_path)
    assert [task for task, _ in seen] == joint_schedule(tasks, ROWS, 0).turns.of_epoch(0).tolist()
    for step, (task, moved) in enumerate(seen):
        still = {name for name, distance in moved.items() if distance == 0}
        others = {0, 1, 2} - {task}
        assert {
            name for name in moved if name.startswith(tuple(f"model.{other}.classifier" for other in others))
        } <= still
        assert f"model.{task}.classifier.bias" not in still
        if step == 0:
            # The first step of Adam goes by the learning rate wherever there is a gradient.
            name = tasks[task].name
            assert moved["model.0.bert.encoder.layer.1.output.dense.weight"] == pytest.approx(rates[name], rel=1e-2)
            assert moved[f"model.{task}.classifier.weight"] == pytest.approx(10 * rates[name], rel=1e-2)


# --- what is shared --------------------------------------------------------------------------------------------------


def states(models):
    return [model.state_dict() for model in models]


def test_kinds_share_the_backbone_but_not_the_pooler(make_tasks, fit, tmp_path):
    models, metrics = fit(make_tasks(), tmp_path)
    first, second, third = (model.bert for model in models)
    assert first.encoder is second.encoder is third.encoder
    assert first.embeddings is second.embeddings is third.embeddings
    assert first.pooler is not second.pooler
    assert third.pooler is None
    assert not torch.equal(first.pooler.dense.weight, second.pooler.dense.weight)
    assert not any(module.training for model in models for module in model.modules())
    assert set(metrics) == {
        "validation/primary_average",
        "validation/words/accuracy/constant",
        "validation/numbers/pearson/constant",
        "validation/numbers/spearman/constant",
        "validation/tags/accuracy/constant",
        "validation/tags/macro_f1/constant",
    }


def test_tasks_of_one_kind_share_the_pooler_that_the_base_has(make_base, make_tasks, fit, tmp_path):
    one, other = fit(make_tasks("words", "numbers"), tmp_path)[0]
    assert one.bert.pooler is other.bert.pooler
    one, other = fit(make_tasks("words", "numbers"), tmp_path / "without", base=make_base(pooler=False))[0]
    assert one.bert.pooler is not other.bert.pooler


def test_heads_start_as_those_of_the_experts(make_tasks, base_folder, tmp_path):
    tasks = make_tasks(training={"learning_rate": 1e-30, "head_learning_rate": 1e-30})
    turns = joint_schedule(tasks, ROWS, 3).turns
    models, _ = fit_joint(tasks, base_folder, turns, work_folder=tmp_path / "all", cache_folder=tmp_path / "d")
    for task, model in zip(tasks, models, strict=True):
        folders = {"work_folder": tmp_path / task.name, "cache_folder": tmp_path / "d"}
        alone, _ = fit_expert(task, base_folder, seed=3, **folders)
        torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=1e-6)


def test_frozen_parts_stay(make_tasks, fit, base_folder, tmp_path):
    frozen = {"freeze": ["embeddings", "encoder.layer.0"]}
    models, _ = fit(make_tasks(training=frozen, tags={"freeze": ["embeddings"]}), tmp_path)
    from transformers import AutoModel

    base = AutoModel.from_pretrained(base_folder).state_dict()
    moved = {
        name
        for name, value in models[0].bert.state_dict().items()
        if name in base and not torch.equal(value, base[name])
    }
    assert not any(name.startswith("embeddings") for name in moved)
    assert any(name.startswith("encoder.layer.0") for name in moved)


@pytest.mark.parametrize("names", [("words", "numbers"), ("tags", "words", "numbers")])
def test_one_adapter_for_all_tasks(make_tasks, fit, base_folder, tmp_path, names):
    tasks = make_tasks(*names, training={"lora": {"rank": 2, "target_modules": ["query", "dense"]}})
    models, _ = fit(tasks, tmp_path)
    from transformers import AutoModel

    base = AutoModel.from_pretrained(base_folder).state_dict()
    assert all(model.bert.encoder is models[0].bert.encoder for model in models)
    for model in models:
        assert not any("lora" in name for name, _ in model.named_modules())
        for name, value in model.bert.encoder.state_dict().items():
            difference = (value - base[f"encoder.{name}"]).double()
            if name.endswith(("query.weight", "dense.weight")):
                assert torch.linalg.matrix_rank(difference, atol=1e-6) == 2
            else:
                assert not difference.any()
        assert torch.isfinite(model.classifier.weight).all()


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "modules_to_save": ["embeddings", "LayerNorm"]},
        {"init_lora_weights": "pissa", "bias": "all", "trainable_token_indices": [3, 7]},
    ],
)
def test_one_adapter_with_options_of_peft(make_tasks, fit, base_folder, tmp_path, options):
    models, _ = fit(make_tasks("words", "numbers", training={"lora": {"rank": 2, **options}}), tmp_path)
    from transformers import AutoModel

    base = AutoModel.from_pretrained(base_folder).state_dict()
    for model in models:
        assert not any("lora" in name or "modules_to_save" in name for name, _ in model.bert.named_modules())
        state = model.bert.state_dict()
        assert {name for name in base if "pooler" not in name} <= set(state)
        moved = {name for name in base if name in state and not torch.equal(state[name], base[name])}
        assert {"embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"} <= moved
        for name in moved - {name for name in moved if "pooler" in name}:
            assert torch.equal(state[name], models[0].bert.state_dict()[name])


# --- from a checkpoint -----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_models(make_tasks, fit, tmp_path):
    one, same, other = (
        states(fit(make_tasks(), tmp_path / name, seed=seed)[0]) for name, seed in zip("abc", (0, 0, 1), strict=True)
    )
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one[0]["classifier.weight"], other[0]["classifier.weight"])


@pytest.mark.parametrize("lora", [None, {"rank": 2}, {"rank": 2, "use_dora": True, "modules_to_save": ["embeddings"]}])
def test_a_training_that_was_killed_ends_as_one_that_was_not(make_tasks, fit, tmp_path, caplog, lora):
    tasks = make_tasks(training={"lora": lora})
    whole = states(fit(tasks, tmp_path / "whole")[0])

    class Stopping(fitting.TaskExpert):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 2 and batch_idx == 4:
                raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "TaskExpert", Stopping)
        with pytest.raises(StoppedError):
            fit(tasks, tmp_path / "stopped")
    state = torch.load(tmp_path / "stopped" / "work" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 16
    with caplog.at_level("INFO", logger="pave_lightning"):
        found = states(fit(tasks, tmp_path / "stopped")[0])
    assert "joint: training goes on from its last checkpoint" in caplog.text
    torch.testing.assert_close(found, whole, rtol=0, atol=0)


def test_the_best_epoch_is_that_with_the_best_mean(make_tasks, fit, tmp_path, monkeypatch):
    """The second epoch is best on average, although each other one is best in some task."""
    known = iter([(0.9, 0.1, 0.1), (0.6, 0.6, 0.5), (0.1, 0.1, 0.9)])
    left = []
    heads = []

    def scored(metrics):
        if not left:
            left.extend(next(known))
        value = left.pop(0)
        return dict.fromkeys(["accuracy", "pearson", "spearman", "macro_f1"], value)

    validate = TaskExpert.on_validation_epoch_end

    def noting(self):
        heads.append([model.classifier.weight.detach().clone() for model in self.models])
        validate(self)

    monkeypatch.setattr("pave_lightning.experts.task_expert.scores", scored)
    monkeypatch.setattr(TaskExpert, "on_validation_epoch_end", noting)
    models, metrics = fit(make_tasks(), tmp_path)
    assert metrics["validation/primary_average"] == pytest.approx((0.6 + 0.6 + 0.5) / 3)
    assert len(heads) == 3
    for model, head in zip(models, heads[1], strict=True):
        assert torch.equal(model.classifier.weight, head)
