"""Heads whose last layer is fitted to another backbone's features."""

import pytest
import scipy.linalg
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from pave_lightning import Evaluator, Task
from pave_lightning.errors import PaveError
from pave_lightning.evaluation import CheckpointCandidate, ExpertsCandidate, SuiteData
from pave_lightning.evaluation.heads import FittedHeads, HeadRows, fit_head, head_rows, last_layer
from pave_lightning.evaluation.options import Heads
from pave_lightning.experts.trainers import build_trainer

TASK = Task(name="t", data={}, text="text", classes=3)
WORDS = Task(name="t", kind="token_classification", data={}, classes=3)
SIZES = {"vocab_size": 40, "pad_token_id": 0, "initializer_range": 0.5, "num_labels": 3}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


def batch_of(rows=8, seed=0, **more):
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(6) < torch.randint(2, 7, (rows, 1), generator=draw)).long()
    ids = torch.randint(3, 40, (rows, 6), generator=draw) * mask
    return {"input_ids": ids, "attention_mask": mask, **more}


MODELS = {
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**BERT, **SIZES), "classifier.out_proj"),
    "gpt2": (
        GPT2ForSequenceClassification,
        GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **SIZES),
        "score",
    ),
    "t5": (
        T5ForSequenceClassification,
        T5Config(
            d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=1, **SIZES
        ),
        "classification_head.out_proj",
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_the_features_are_those_of_the_outputs(family):
    """Whichever token a head lets speak, the last layer makes its outputs of the features that were noted."""
    kind, config, name = MODELS[family]
    torch.manual_seed(0)
    model = kind(config).eval()
    assert last_layer(TASK, model) == name
    batches = [batch_of(seed=0), batch_of(rows=5, seed=1)]
    if family == "t5":  # whose head reads where a text ends
        for batch in batches:
            batch["input_ids"][torch.arange(len(batch["input_ids"])), batch["attention_mask"].sum(1) - 1] = 1
    found = head_rows(TASK, model, batches)
    layer = model.get_submodule(name)
    with torch.no_grad():
        assert torch.allclose(layer(found.features), found.outputs, atol=1e-6)
        assert torch.equal(found.outputs, torch.cat([model(**batch).logits for batch in batches]))
    assert found.targets is None


def test_words_have_features_of_their_own():
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**BERT, **SIZES)).eval()
    batch = batch_of()
    batch["is_first"] = batch["attention_mask"]
    batch["labels"] = torch.where(batch["attention_mask"].bool(), 1, -100)
    found = head_rows(WORDS, model, [batch])
    assert len(found.features) == int(batch["attention_mask"].sum()) == len(found.targets)
    with torch.no_grad():
        assert torch.allclose(model.classifier(found.features), found.outputs, atol=1e-6)


def test_heads_without_a_linear_end_and_broken_features_are_told():
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**BERT, **SIZES)).eval()
    broken = RobertaForSequenceClassification(RobertaConfig(**BERT, **SIZES)).eval()
    model.classifier.out_proj = nn.Bilinear(16, 16, 3)
    with pytest.raises(PaveError, match="does not end in a linear layer, so it is kept as it is"):
        head_rows(TASK, model, [batch_of()])
    nn.init.constant_(broken.classifier.dense.bias, torch.nan)
    with pytest.raises(PaveError, match="NaN or infinity"):
        head_rows(TASK, broken, [batch_of()])
    with pytest.raises(PaveError, match="no rows"):
        head_rows(TASK, broken, [])


def rows_of(count=60, width=12, outputs=3, seed=0):
    torch.manual_seed(seed)
    layer, features = nn.Linear(width, outputs), torch.randn(count, width) @ torch.randn(width, width)
    with torch.no_grad():
        said = layer(features)
    return layer, HeadRows(features, said, said.argmax(1))


@pytest.mark.parametrize("fit", ["logits", "orthogonal"])
def test_an_expert_on_its_own_features_keeps_its_head(fit):
    layer, rows = rows_of()
    found = fit_head(TASK, Heads(fit=fit), rows, rows, layer)
    assert torch.allclose(found.weight, layer.weight.double(), atol=1e-5)
    assert torch.allclose(rows.features.double() @ found.weight.T + found.bias, rows.outputs.double(), atol=1e-4)


def test_a_turned_backbone_is_repaired():
    layer, rows = rows_of()
    turn = torch.tensor(scipy.linalg.qr(torch.randn(12, 12).double().numpy())[0])
    turned = HeadRows((rows.features.double() @ turn).float() + 1, torch.zeros_like(rows.outputs))
    found = fit_head(TASK, Heads(fit="orthogonal"), turned, rows, layer)
    assert torch.allclose(turned.features.double() @ found.weight.T + found.bias, rows.outputs.double(), atol=1e-4)


def test_probabilities_and_labels_need_no_logits_of_this_size():
    """Both give the classes of the expert on features that a linear layer can tell apart."""
    layer, rows = rows_of(count=200)
    mine = HeadRows(rows.features, 100 * rows.outputs, rows.targets)
    for fit in ("probabilities", "labels"):
        found = fit_head(TASK, Heads(fit=fit), mine, rows, layer)
        chosen = (rows.features.double() @ found.weight.T + found.bias).argmax(1)
        assert float((chosen == rows.targets).double().mean()) > 0.95


def test_regression_is_fitted_to_numbers():
    task = Task(name="t", kind="regression", data={}, text="text")
    layer, rows = rows_of(outputs=1)
    rows = HeadRows(rows.features, rows.outputs, 2 * rows.outputs[:, 0] + 1)
    for fit in ("logits", "probabilities"):
        found = fit_head(task, Heads(fit=fit), rows, rows, layer)
        assert torch.allclose(rows.features.double() @ found.weight.T + found.bias, rows.outputs.double(), atol=1e-4)
    found = fit_head(task, Heads(fit="labels"), rows, rows, layer)
    assert torch.allclose(
        (rows.features.double() @ found.weight.T + found.bias)[:, 0], rows.targets.double(), atol=1e-4
    )


@pytest.mark.parametrize("fit", ["probabilities", "labels"])
def test_labels_that_hold_by_themselves_are_fitted_one_by_one(fit):
    """As scikit-learn's logistic regression of each of them, to labels that are drawn or known."""
    draw = torch.Generator().manual_seed(0)
    features, layer = torch.randn(400, 4, generator=draw), nn.Linear(4, 3)
    outputs = 2 * features[:, :3] - 1
    holds = (torch.rand(400, 3, generator=draw) < outputs.sigmoid()).long()
    task = Task(name="t", kind="multi_label", data={}, text="text", classes=3)
    rows = HeadRows(features, outputs, holds)
    found = fit_head(task, Heads(fit=fit, strength=1e-6), rows, rows, layer)
    if fit == "probabilities":
        expected = torch.cat([2 * torch.eye(3), torch.zeros(3, 1)], dim=1).double()
        assert torch.allclose(found.weight, expected, atol=1e-2)
        assert torch.allclose(found.bias, -torch.ones(3).double(), atol=1e-2)
    else:
        for place in range(3):
            alone = LogisticRegression(C=1e6, tol=1e-8, max_iter=1000).fit(features.double(), holds[:, place])
            assert torch.allclose(found.weight[place], torch.from_numpy(alone.coef_[0]), atol=1e-2)
            assert float(found.bias[place]) == pytest.approx(alone.intercept_[0], abs=1e-2)


def test_choices_are_fitted_by_least_squares():
    draw = torch.Generator().manual_seed(0)
    features, targets = torch.randn(40, 4, generator=draw), torch.zeros(40, 2, dtype=torch.int64)
    targets[::4, 0] = 1
    targets[:, 1] = torch.arange(40) // 4
    task = Task(name="t", kind="multiple_choice", data={}, text="text", choices="choices")
    rows = HeadRows(features, features @ torch.randn(4, 1, generator=draw), targets)
    found = fit_head(task, Heads(fit="labels", strength=1e-9), rows, rows, nn.Linear(4, 1))
    wide = torch.cat([features, torch.ones(40, 1)], dim=1).double()
    expected = torch.linalg.lstsq(wide, targets[:, :1].double()).solution[:, 0]
    assert torch.allclose(torch.cat([found.weight[0], found.bias]), expected, atol=1e-6)


def test_what_cannot_be_fitted_is_told():
    layer, rows = rows_of(count=4)
    with pytest.raises(PaveError, match="takes at least 5 rows, found 4"):
        fit_head(TASK, Heads(fit="logits"), rows, rows, layer)
    layer, rows = rows_of()
    still = HeadRows(torch.ones(60, 12), rows.outputs)
    with pytest.raises(PaveError, match="the same features"):
        fit_head(TASK, Heads(fit="logits"), still, rows, layer)
    with pytest.raises(PaveError, match="labels are needed"):
        fit_head(TASK, Heads(fit="labels"), HeadRows(rows.features, rows.outputs), rows, layer)


def test_fitted_heads_are_scored(make_suite, tmp_path):
    """The base under heads that were fitted to the experts, against the same heads put to the features by hand."""
    suite = make_suite()
    evaluator = Evaluator(suite.tasks, suite.checkpoints(), suite.checkpoint())
    data = SuiteData([suite.data(task) for task in suite.tasks], "test")
    batches = {task.name: list(suite.data(task).test_dataloader()) for task in suite.tasks}
    base = CheckpointCandidate(suite.checkpoint())
    mine = evaluator.head_rows(base, batches)
    theirs = evaluator.head_rows(ExpertsCandidate(suite.checkpoints()), batches)
    heads = {
        task.name: fit_head(
            task, Heads(fit="logits"), mine[task.name], theirs[task.name], evaluator.last_layer(task.name)[1]
        )
        for task in suite.tasks
    }
    trainer = build_trainer({"accelerator": "cpu", "devices": 1}, root=tmp_path, precision="32-true")
    candidate = FittedHeads(base, heads, {task.name: task for task in suite.tasks})
    found, before = evaluator.score(candidate, data, trainer), evaluator.score(base, data, trainer)
    first = suite.tasks[0]
    said = mine["first"].features @ heads["first"].weight.float().T + heads["first"].bias.float()
    right = (first.chosen(said) == mine["first"].targets).float().mean()
    assert found["first"].metrics["accuracy"] == pytest.approx(float(right), abs=1e-6)
    assert evaluator.score(base, data, trainer) == before
    kept = FittedHeads(base, {}, {task.name: task for task in suite.tasks})
    assert evaluator.score(kept, data, trainer) == before
