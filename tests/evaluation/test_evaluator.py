"""Scores against a plain loop: one model and one row at a time, without padding, metrics from their definitions."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from pave_lightning.errors import PaveError
from pave_lightning.evaluation import (
    CheckpointCandidate,
    Evaluator,
    ExpertsCandidate,
    MergedCandidate,
    ModulatedCandidate,
    SuiteData,
)
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.merging import Modulator, merge
from pave_lightning.merging.folders import MergeContext, load_merged, write_merged
from pave_lightning.merging.methods.emr import Emr
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.weights import Architecture, Checkpoint


def load(folder, backbone=None):
    """The model of an expert's folder, with another backbone where one is given."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if backbone is not None:
        model.bert.load_state_dict({**model.bert.state_dict(), **backbone})
    return model


@torch.no_grad()
def answers(model, task, rows, tokenizer):
    outputs = []
    for row in rows:
        tokens = tokenizer(*[row[name] for name in task.text], return_tensors="pt")
        outputs.append(model(**tokens).logits[0].double().numpy())
    return np.array(outputs)


def f1(predicted, labels, positive):
    right = sum((predicted == positive) & (labels == positive))
    return 2 * right / (sum(predicted == positive) + sum(labels == positive))


def expected_metrics(task, outputs, rows):
    labels = np.array([row["label"] for row in rows])
    if task.kind == "regression":
        ranks = [np.argsort(np.argsort(values)) for values in (outputs[:, 0], labels)]
        return {
            "pearson": np.corrcoef(outputs[:, 0], labels)[0, 1],
            "spearman": np.corrcoef(*ranks)[0, 1],
        }
    predicted = outputs.argmax(1)
    assert len(set(predicted)) > 1, "a constant answer would hide mistakes"
    found = {"accuracy": np.mean(predicted == labels)}
    occurring = sorted({*predicted, *labels})
    found["macro_f1"] = np.mean([f1(predicted, labels, value) for value in occurring])
    found["f1"] = f1(predicted, labels, 1)
    return {name: found[name] for name in task.metrics}


@pytest.fixture
def trainer(tmp_path):
    return build_trainer({"accelerator": "cpu", "devices": 1}, root=tmp_path, enable_progress_bar=False)


@pytest.fixture(scope="module")
def evaluator(suite):
    return Evaluator(suite.tasks, suite.checkpoints(), suite.checkpoint())


@pytest.fixture
def score(suite, evaluator, trainer):
    def run(candidate, split="test", with_evaluator=evaluator, **options):
        data = SuiteData([suite.data(task, **options) for task in with_evaluator.tasks], split)
        return with_evaluator.score(candidate, data, trainer)

    return run


def check(scores, suite, models, split="test"):
    """Compare scores with those of a plain loop over each task's model."""
    assert list(scores) == list(models)
    for task in suite.tasks:
        if task.name in models:
            rows = suite.rows[task.name, split]
            outputs = answers(models[task.name], task, rows, suite.tokenizer)
            assert scores[task.name].examples == len(rows)
            assert scores[task.name].metrics == pytest.approx(expected_metrics(task, outputs, rows), abs=1e-5)


def models_of(suite, backbone=None):
    return {task: load(folder, backbone) for task, folder in suite.experts.items()}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_experts(score, suite, split):
    check(score(ExpertsCandidate(suite.checkpoints()), split), suite, models_of(suite), split)


def test_the_base_with_the_heads_of_its_experts(score, suite):
    base = load_file(suite.base / "model.safetensors")
    check(score(CheckpointCandidate(suite.checkpoint())), suite, models_of(suite, base))


def test_candidates_one_after_the_other_leave_nothing_behind(score, suite):
    experts, base = ExpertsCandidate(suite.checkpoints()), CheckpointCandidate(suite.checkpoint())
    first, between = score(experts), score(base)
    assert between != first
    assert score(experts) == first
    assert score(base) == between


def test_weights_that_no_checkpoint_gives_are_not_left_as_they_were_drawn(score, suite):
    class Half(ExpertsCandidate):
        def weights(self, task):
            return ((name, tensor) for name, tensor in super().weights(task) if "layer.1.output" not in name)

    with pytest.raises(PaveError, match=r"4 weights of the backbone, such as encoder\.layer\.1\.output"):
        score(Half(suite.checkpoints()))


def test_a_scaled_sum(score, suite):
    base = load_file(suite.base / "model.safetensors")
    experts = [load_file(folder / "model.safetensors") for folder in suite.experts.values()]
    summed = {name: value + 0.4 * sum(own[f"bert.{name}"] - value for own in experts) for name, value in base.items()}
    source = suite.vectors()
    candidate = MergedCandidate(source, merge(TaskArithmetic(), source), 0.4)
    check(score(candidate), suite, models_of(suite, summed))


def test_a_model_of_masks_switches_with_the_task(score, suite, tmp_path):
    base, architecture = suite.checkpoint(), Architecture.of_folder(suite.experts["first"])
    folder = tmp_path / "merged"
    folder.mkdir()
    context = MergeContext(str(suite.base), base, suite.checkpoints(), architecture, {})
    write_merged(folder, Emr(), suite.vectors(), None, context)
    unified = Checkpoint(folder, "bert")
    modulators = {task: Modulator(folder / "modulators" / f"{task}.safetensors") for task in suite.experts}
    scores = score(ModulatedCandidate(base, unified, modulators))
    check(scores, suite, {task: load_merged(folder, task) for task in suite.experts})
    assert scores != score(CheckpointCandidate(unified))


@pytest.mark.parametrize("kind", ["base", "experts"])
def test_poolers_that_the_base_lacks_switch_with_the_head(score, make_suite, kind):
    suite = make_suite(pooler=False)
    candidate = ExpertsCandidate(suite.checkpoints()) if kind == "experts" else CheckpointCandidate(suite.checkpoint())
    scores = score(candidate, with_evaluator=Evaluator(suite.tasks, suite.checkpoints(), suite.checkpoint()))
    backbone = None if kind == "experts" else load_file(suite.base / "model.safetensors")
    check(scores, suite, models_of(suite, backbone))


def test_one_task_alone(score, suite):
    alone = Evaluator(suite.tasks[1:2], suite.checkpoints(), suite.checkpoint())
    scores = score(ExpertsCandidate(suite.checkpoints()), with_evaluator=alone)
    check(scores, suite, {"second": load(suite.experts["second"])})


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_example_is_counted_once_whatever_the_batches(score, suite, batch_size):
    found = score(ExpertsCandidate(suite.checkpoints()), batch_size=batch_size)
    check(found, suite, models_of(suite))


def test_the_backbone_exists_once(evaluator):
    assert {id(model.bert) for model in evaluator.models} == {id(evaluator.backbone)}
    assert [model.classifier.weight.shape[0] for model in evaluator.models] == [2, 3, 1]
    assert not any(parameter.requires_grad for parameter in evaluator.parameters())


def test_an_expert_without_its_head(suite, tmp_path):
    tensors = load_file(suite.experts["second"] / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((suite.experts["second"] / "config.json").read_bytes())
    experts = {**suite.checkpoints(), "second": Checkpoint(tmp_path, "bert")}
    with pytest.raises(PaveError, match=r"task 'second': .* lacks weights of the head: classifier\.bias"):
        Evaluator(suite.tasks, experts, suite.checkpoint())


class Turned(CheckpointCandidate):
    """The base with new heads, on features that are turned, and with a wrapper that counts the batches it is given."""

    def __init__(self, checkpoint, heads, turn):
        super().__init__(checkpoint)
        self.heads, self.turn, self.asked, self.batches = heads, turn, [], 0

    def adapt(self, model, task):
        self.asked.append(task)
        model.classifier = nn.Sequential(self.turn, self.heads[task])
        model.register_forward_pre_hook(lambda *_: setattr(self, "batches", self.batches + 1))
        return model


def turned(suite):
    """New heads and an orthogonal turn of the features they read."""
    torch.manual_seed(3)
    heads = {task.name: nn.Linear(32, task.output_size) for task in suite.tasks}
    turn = nn.Linear(32, 32, bias=False)
    nn.init.orthogonal_(turn.weight)
    return heads, turn


def state_of(evaluator):
    """Everything that scoring a candidate must leave as it was: modules, hooks, tensors."""
    modules = {name: (id(module), len(module._forward_pre_hooks)) for name, module in evaluator.named_modules()}
    tensors = {**dict(evaluator.named_parameters()), **dict(evaluator.named_buffers())}
    return modules, {name: (id(tensor), tensor.clone()) for name, tensor in tensors.items() if "metrics" not in name}


def test_a_candidate_may_bring_heads_and_modules_of_its_own(score, suite, evaluator):
    heads, turn = turned(suite)
    candidate, plain = Turned(suite.checkpoint(), heads, turn), CheckpointCandidate(suite.checkpoint())
    before, (modules, tensors) = score(plain), state_of(evaluator)
    found = score(candidate)
    assert candidate.asked == [task.name for task in suite.tasks]
    assert candidate.batches == sum(-(-len(suite.rows[task.name, "test"]) // 4) for task in suite.tasks)
    models = models_of(suite, load_file(suite.base / "model.safetensors"))
    for task, model in models.items():
        model.classifier = nn.Sequential(turn, heads[task])
    check(found, suite, models)
    assert found != before
    modules_after, tensors_after = state_of(evaluator)
    assert modules_after == modules
    assert tensors_after.keys() == tensors.keys()
    assert all(tensors_after[name][0] == found for name, (found, _) in tensors.items())
    assert all(torch.equal(tensors_after[name][1], value) for name, (_, value) in tensors.items())
    assert score(plain) == before


def test_modules_of_a_candidate_have_the_precision_of_the_model(suite, tmp_path):
    options = {"accelerator": "cpu", "devices": 1, "precision": "bf16-true"}
    trainer = build_trainer(options, root=tmp_path, enable_progress_bar=False)
    alone = Evaluator(suite.tasks, suite.checkpoints(), suite.checkpoint())
    data = SuiteData([suite.data(task) for task in suite.tasks], "test")
    candidate = Turned(suite.checkpoint(), *turned(suite))
    found = alone.score(candidate, data, trainer)
    assert not any(scored.broken for scored in found.values())
    assert candidate.turn.weight.dtype == torch.bfloat16


def test_a_candidate_may_wrap_the_model(score, suite):
    class Doubled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.factor = model, nn.Parameter(torch.tensor(-1.0))

        def forward(self, **batch):
            outputs = self.model(**batch)
            outputs.logits = self.factor * outputs.logits
            return outputs

    class Opposed(ExpertsCandidate):
        def adapt(self, model, task):
            return Doubled(model) if task == "third" else model

    plain, found = score(ExpertsCandidate(suite.checkpoints())), score(Opposed(suite.checkpoints()))
    assert found["first"] == plain["first"]
    assert found["third"].metrics["pearson"] == pytest.approx(-plain["third"].metrics["pearson"])


def test_weights_that_tasks_share_may_not_be_changed_in_place(score, suite):
    class Careless(CheckpointCandidate):
        @torch.no_grad()
        def adapt(self, model, task):
            model.bert.encoder.layer[0].output.dense.weight.mul_(1.0)
            return model

    with pytest.raises(RuntimeError, match=r"Careless\.adapt has changed weights in place for task 'first'"):
        score(Careless(suite.checkpoint()))
