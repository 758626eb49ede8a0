"""Options of a training that change how forward passes are run, and nothing of what they give."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from pave_lightning.experts.forward_options import apply_forward_options
from pave_lightning.tasks.options import Training
from pave_lightning.weights.backbones import backbone_of

TOKENS = torch.arange(12).reshape(2, 6) + 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("bert", vocab_size=20, hidden_dropout_prob=0.0, **sizes)
    config.attention_probs_dropout_prob = 0.0
    return AutoModelForSequenceClassification.from_config(config).train()


def gradients(model):
    model(input_ids=TOKENS).logits.square().sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"compile": {"backend": "eager"}}], ids=str)
def test_names_and_gradients_stay(model, options):
    other = copy.deepcopy(model)
    apply_forward_options([other], Training.model_validate(options))
    expected, found = gradients(model), gradients(other)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_activations_are_computed_anew(model):
    calls = []
    layer = backbone_of(model).encoder.layer[1].output.dense
    layer.register_forward_hook(lambda *_: calls.append(1))
    apply_forward_options([model], Training(activation_checkpointing=True))
    gradients(model)
    assert len(calls) == 2


def test_each_block_is_compiled_once_however_many_models_share_it(model, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: asked.append(options) or call)
    other = copy.copy(model)
    apply_forward_options([model, other], Training.model_validate({"compile": {"mode": "max-autotune"}}))
    assert asked == [{"backend": "inductor", "mode": "max-autotune", "dynamic": None, "fullgraph": False}] * 3
    apply_forward_options([model], Training(compile=True))
    assert asked[-1]["mode"] is None
