"""Gradients of single examples, against plain autograd and finite differences."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModel,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from pave_lightning.errors import PaveError
from pave_lightning.experts.gradients import absolute_gradients, fisher_diagonal
from pave_lightning.merging import Evidence, Need
from pave_lightning.merging.passes import load_parameters
from pave_lightning.statistics.gradients import TaskGradients
from pave_lightning.tasks.likelihood import covariance_factor
from pave_lightning.tasks.task import Task
from pave_lightning.weights import task_vectors

SENTENCES = ([2, 9, 41, 7, 3], [2, 60, 3], [2, 9, 9, 30, 31, 32, 3], [2, 77, 12, 3])


def task_of(files, outputs):
    head = {"kind": "regression"} if outputs == 1 else {"classes": outputs}
    return Task.model_validate({"name": "words", "data": files, "text": "text", **head})


@pytest.fixture
def make_task(task_files):
    def build(outputs):
        return task_of(task_files(), outputs)

    return build


@pytest.fixture
def bert(expert_folders):
    def build(outputs):
        folder = expert_folders[{1: "third", 2: "first", 3: "second"}[outputs]]
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()

    return build


def albert(outputs):
    torch.manual_seed(5)
    config = AlbertConfig(
        vocab_size=100,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=outputs,
    )
    return AlbertForSequenceClassification(config).eval()


def gpt2(outputs):
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=outputs, pad_token_id=0
    )
    return GPT2ForSequenceClassification(config).eval()


def padded(sentences, labels=None, length=9):
    rows = [row + [0] * (length - len(row)) for row in sentences]
    batch = {"input_ids": torch.tensor(rows), "attention_mask": (torch.tensor(rows) != 0).long()}
    return batch if labels is None else {**batch, "labels": torch.tensor(labels)}


def backbone_of(model):
    return dict(getattr(model, model.base_model_prefix).named_parameters())


def gradient(model, value):
    """The gradient of a scalar by every parameter of the backbone, dense, float64."""
    parameters = backbone_of(model)
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {
        name: np.zeros(parameter.shape) if value is None else value.double().numpy()
        for (name, parameter), value in zip(parameters.items(), found, strict=True)
    }


def added(totals, gradients, measure, weight):
    for name, value in gradients.items():
        totals[name] = totals.get(name, 0.0) + weight * measure(value)


def plain_fisher(model, sentences):
    """Sum over classes of p (d log p)^2, sentence by sentence without padding."""
    totals = {}
    for row in sentences:
        logits = model(input_ids=torch.tensor([row])).logits[0]
        if len(logits) == 1:
            added(totals, gradient(model, logits[0]), np.square, 1 / len(sentences))
            continue
        for log_p in logits.log_softmax(0):
            added(totals, gradient(model, log_p), np.square, log_p.detach().exp().item() / len(sentences))
    return totals


def plain_absolute(model, sentences, labels):
    totals = {}
    for row, label in zip(sentences, labels, strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0]
        value = (logits[0] - label) ** 2 if len(logits) == 1 else -logits.log_softmax(0)[label]
        added(totals, gradient(model, value), np.abs, 1 / len(sentences))
    return totals


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-3, atol=2e-5 * abs(value).max() + 1e-12)


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_fisher_is_the_mean_over_examples_and_classes_of_squared_gradients(bert, make_task, outputs):
    model = bert(outputs)
    batches = [padded(SENTENCES[:3]), padded(SENTENCES[3:])]
    assert_close(fisher_diagonal(model, make_task(outputs), batches), plain_fisher(model, SENTENCES))


@pytest.mark.parametrize(("outputs", "labels"), [(1, [0.5, -1.0, 2.0, 0.0]), (2, [0, 1, 1, 0]), (3, [2, 0, 2, 1])])
def test_absolute_gradients_are_taken_example_by_example(bert, make_task, outputs, labels):
    model = bert(outputs)
    batches = [padded(SENTENCES[:1], labels[:1]), padded(SENTENCES[1:], labels[1:])]
    expected = plain_absolute(model, SENTENCES, labels)
    assert_close(absolute_gradients(model, make_task(outputs), batches), expected)


@pytest.mark.parametrize("family", [albert, gpt2])
def test_families_with_shared_layers_and_transposed_weights(family, make_task):
    model, labels = family(3), [2, 0, 0, 1]
    batches, task = [padded(SENTENCES, labels)], make_task(3)
    assert_close(fisher_diagonal(model, task, batches), plain_fisher(model, SENTENCES))
    assert_close(absolute_gradients(model, task, batches), plain_absolute(model, SENTENCES, labels))


def test_fisher_against_finite_differences(bert, make_task):
    model = bert(3).double()
    found = fisher_diagonal(model, make_task(3), [padded(SENTENCES)])
    parameters = backbone_of(model)
    places = {
        "embeddings.word_embeddings.weight": (9, 4),
        "encoder.layer.0.attention.self.query.weight": (3, 7),
        "encoder.layer.1.output.LayerNorm.bias": (11,),
        "pooler.dense.weight": (30, 2),
    }
    step = 1e-5
    for name, place in places.items():
        expected = 0.0
        for row in SENTENCES:
            shifted = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameters[name][place] += sign * step
                    shifted.append(model(input_ids=torch.tensor([row])).logits[0].log_softmax(0).numpy())
                    parameters[name][place] -= sign * step
            p = np.exp((shifted[0] + shifted[1]) / 2)
            expected += (p * ((shifted[0] - shifted[1]) / (2 * step)) ** 2).sum() / len(SENTENCES)
        assert expected > 0
        assert float(found[name][place]) == pytest.approx(expected, rel=1e-5)


def test_padding_and_batches_do_not_matter(bert, make_task):
    model, task, labels = bert(3), make_task(3), [2, 0, 1, 1]
    single = [padded([row], [label], len(row)) for row, label in zip(SENTENCES, labels, strict=True)]
    together = [padded(SENTENCES, labels, 20)]
    for take in (fisher_diagonal, absolute_gradients):
        first, second = take(model, task, single), take(model, task, together)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_fisher_does_not_look_at_labels(bert, make_task):
    model, task = bert(2), make_task(2)
    plain = fisher_diagonal(model, task, [padded(SENTENCES)])
    labelled = fisher_diagonal(model, task, [padded(SENTENCES, [1, 1, 0, 1])])
    assert all(torch.equal(plain[name], labelled[name]) for name in plain)


def test_rows_of_the_embedding_that_no_example_uses_are_zero(bert, make_task):
    found = fisher_diagonal(bert(2), make_task(2), [padded(SENTENCES)])["embeddings.word_embeddings.weight"]
    used = sorted({word for row in SENTENCES for word in row})
    assert found.any(dim=1).nonzero().flatten().tolist() == used


def test_two_classes_take_one_gradient_an_example(bert, make_task, monkeypatch):
    passes = []
    backward = torch.autograd.backward
    monkeypatch.setattr(
        torch.autograd, "backward", lambda *given, **named: (passes.append(1), backward(*given, **named))
    )
    fisher_diagonal(bert(2), make_task(2), [padded(SENTENCES)])
    assert len(passes) == len(SENTENCES)


class Multiplied(nn.Module):
    """One weight times one number."""

    base_model_prefix = "body"

    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.weight = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x):
        return SimpleNamespace(logits=self.body.weight * x)


def test_small_contributions_beside_large_ones_are_not_lost(make_task):
    # In float32, 1 + 2^-26 is 1, however often it is added.
    numbers = torch.tensor([[1.0]] + [[2.0**-13]] * 512)
    found = fisher_diagonal(Multiplied(), make_task(1), [{"x": numbers}])
    assert float(found["weight"]) * 513 == pytest.approx(1 + 2.0**-17, rel=1e-7)
    # The slope of the squared error at 3x and label 0 is 6 x^2.
    labelled = {"x": numbers, "labels": torch.zeros(513)}
    found = absolute_gradients(Multiplied(), make_task(1), [labelled])
    assert float(found["weight"]) * 513 == pytest.approx(6 * (1 + 2.0**-17), rel=1e-7)


def test_examples_that_pull_in_opposite_directions_do_not_cancel(make_task):
    # The slopes are 2 x (3 x - y): 2 and -2 for x = 1 and y = 2, 4.
    batch = {"x": torch.tensor([[1.0], [1.0]]), "labels": torch.tensor([2.0, 4.0])}
    assert absolute_gradients(Multiplied(), make_task(1), [batch])["weight"].tolist() == [2.0]


def test_the_model_is_left_as_it_was(bert, make_task):
    model = bert(2).train()
    parameters = dict(model.named_parameters())
    parameters["bert.encoder.layer.0.output.dense.weight"].requires_grad_(False)
    parameters["classifier.weight"].grad = torch.ones_like(parameters["classifier.weight"])
    model.bert.pooler.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    with torch.no_grad():
        found = fisher_diagonal(model, make_task(2), [padded(SENTENCES)])
        assert not torch.is_grad_enabled()
    assert found["encoder.layer.0.output.dense.weight"].any()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in parameters.items()} == flags
    assert not any(module.sparse for module in model.modules() if isinstance(module, nn.Embedding))
    assert [name for name, parameter in parameters.items() if parameter.grad is not None] == ["classifier.weight"]
    model(**padded(SENTENCES)).logits.sum().backward()
    assert parameters["bert.embeddings.word_embeddings.weight"].grad is not None


def test_dropout_is_off(bert, make_task):
    model, task = bert(2).train(), make_task(2)
    first, second = (fisher_diagonal(model, task, [padded(SENTENCES)]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_confident_model_leaves_zeros(bert, make_task):
    model = bert(3)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([2000.0, 0.0, -2000.0]))
    assert not any(value.any() for value in fisher_diagonal(model, make_task(3), [padded(SENTENCES)]).values())


def test_no_examples(bert, make_task):
    with pytest.raises(PaveError, match="task 'words': there are no examples"):
        fisher_diagonal(bert(2), make_task(2), [])


def test_no_labels(bert, make_task):
    with pytest.raises(PaveError, match=r"task 'words': labels are needed"):
        absolute_gradients(bert(2), make_task(2), [padded(SENTENCES)])


def test_broken_weights(bert, make_task):
    model = bert(2)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[0] = torch.nan
    for take in (fisher_diagonal, absolute_gradients):
        with pytest.raises(PaveError, match="task 'words': the outputs are not finite; look for broken weights"):
            take(model, make_task(2), [padded(SENTENCES, [0, 0, 1, 1])])


def test_squares_that_float32_cannot_hold(make_task):
    with pytest.raises(PaveError, match="task 'words': the gradients of weight are too large for float32"):
        fisher_diagonal(Multiplied(), make_task(1), [{"x": torch.tensor([[1e30]])}])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=2, max_size=9))
@example([0.0, 0.0])
@example([1000.0, 0.0, 0.0])
@example([0.0, 700.0, 690.0, -700.0])
def test_the_factor_is_one_of_the_covariance_of_a_drawn_class(logits):
    factor = covariance_factor(torch.tensor(logits, dtype=torch.float64)).numpy()
    p = np.exp(np.array(logits) - max(logits))
    p /= p.sum()
    covariance = np.diag(p) - np.outer(p, p)
    assert len(factor) < len(logits)
    assert np.isfinite(factor).all()
    np.testing.assert_allclose(factor.T @ factor, covariance, atol=1e-15)
    # Where p is nearly one, 1 - p is only known from the others.
    exact = p * np.array([np.delete(p, index).sum() for index in range(len(p))])
    np.testing.assert_allclose((factor**2).sum(axis=0), exact, rtol=1e-9, atol=1e-300)


def test_names_and_shapes_are_those_of_task_vectors(base_folder, expert_folders, bert, make_task, tmp_path):
    folders = {"words": str(expert_folders["first"]), "more": str(expert_folders["second"])}
    vectors = task_vectors(str(base_folder), folders)
    task = make_task(2)
    expert = bert(2)
    of_expert = fisher_diagonal(expert, task, [padded(SENTENCES)])
    TaskGradients("fisher", of_expert, examples=len(SENTENCES)).save(tmp_path / "words.safetensors")
    given = TaskGradients.load(tmp_path / "words.safetensors")
    evidence = Evidence(fisher={"words": given, "more": given})
    assert len(given) == len(vectors.parameters)
    assert not list(evidence.lacking({Need.FISHER}, vectors))
    # The base's backbone below the expert's head.
    load_parameters(expert.bert, {parameter.name: vectors.base(parameter) for parameter in vectors.parameters})
    at_base = absolute_gradients(expert, task, [padded(SENTENCES, [0, 1, 1, 0])])
    expected = plain_absolute(expert, SENTENCES, [0, 1, 1, 0])
    assert_close(at_base, expected)
    assert torch.equal(expert.bert.pooler.dense.weight, AutoModel.from_pretrained(base_folder).pooler.dense.weight)
