"""Configurations: which differences change what the weights compute."""

import json

import pytest
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
)

from pave_lightning.errors import PaveError
from pave_lightning.weights.configuration import (
    architecture_problem,
    config_differences,
    differences_in_function,
    merged_configuration,
)
from pave_lightning.weights.empty_models import read_config


def keys(first, second):
    return [one.key for one in differences_in_function(first, second)]


@pytest.mark.parametrize(
    ("kind", "changes", "differing"),
    [
        (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ["rope_parameters.rope_theta"]),
        (LlamaConfig, {"rms_norm_eps": 1e-5}, ["rms_norm_eps"]),
        (LlamaConfig, {"hidden_act": "gelu", "attention_bias": True}, ["hidden_act", "attention_bias"]),
        (BertConfig, {"hidden_act": "relu", "layer_norm_eps": 1e-5}, ["hidden_act", "layer_norm_eps"]),
        (BertConfig, {"is_decoder": True}, ["is_decoder"]),
        (GPT2Config, {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        (ModernBertConfig, {"local_attention": 64}, ["local_attention"]),
        (T5Config, {"eos_token_id": 5}, ["eos_token_id"]),
        (LlamaConfig, {"eos_token_id": 5, "pad_token_id": 0, "vocab_size": 7, "bos_token_id": None}, []),
        (BertConfig, {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2, "use_cache": False}, []),
        (BertConfig, {"id2label": {0: "a", 1: "b", 2: "c"}, "problem_type": "regression"}, []),
        (BertConfig, {"dtype": "bfloat16", "architectures": ["BertForSequenceClassification"]}, []),
        (GPT2Config, {"resid_pdrop": 0.3, "initializer_range": 0.5, "summary_type": "last"}, []),
        (ModernBertConfig, {"classifier_pooling": "mean", "classifier_activation": "relu"}, []),
        (BertConfig, {"some_note_of_an_older_release": "x"}, []),
    ],
)
def test_what_changes_the_function(kind, changes, differing):
    assert keys(kind(), kind(**changes)) == differing
    assert keys(kind(**changes), kind()) == differing


def write(folder, **values):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_defaults_and_old_names_are_no_differences(tmp_path):
    written = {"model_type": "llama", "rope_theta": 5e5, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    old = write(tmp_path / "old", **written)
    new = write(tmp_path / "new", model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 500000})
    assert config_differences("a", old, new) == []
    plain = write(tmp_path / "plain", model_type="llama")
    (problem,) = config_differences("a", old, plain)
    assert "rope_parameters.rope_theta is 10000.0 in the expert's config.json, 500000.0 in the base's" in problem
    assert "expert.accept: [rope_parameters.rope_theta]" in problem
    for accepted in ("rope_parameters.rope_theta", "rope_theta", "rope_parameters"):
        assert config_differences("a", old, plain, [accepted]) == []
    assert config_differences("a", old, plain, ["rms_norm_eps"]) == [problem]


def test_another_kind_of_model_is_told_alone(tmp_path):
    RobertaConfig(hidden_act="relu").save_pretrained(tmp_path / "roberta")
    BertConfig().save_pretrained(tmp_path / "bert")
    (problem,) = config_differences("a", tmp_path / "bert", tmp_path / "roberta", ["model_type"])
    assert "model_type is 'roberta' in the expert's config.json, 'bert' in the base's" in problem


def test_a_merged_model_computes_as_the_base_does_below_the_experts_head(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    LlamaConfig(rms_norm_eps=1e-5, rope_parameters=rope).save_pretrained(tmp_path / "base")
    own = LlamaConfig(id2label={0: "x", 1: "y", 2: "z"}, pad_token_id=3, rms_norm_eps=1e-3)
    own.save_pretrained(tmp_path / "expert")
    merged = merged_configuration(tmp_path / "base", tmp_path / "expert")
    assert merged.rms_norm_eps == 1e-5
    assert merged.rope_parameters == rope
    assert merged.pad_token_id == 3
    assert merged.id2label == {0: "x", 1: "y", 2: "z"}
    assert keys(read_config(tmp_path / "base"), merged) == []


@pytest.mark.parametrize(
    ("named", "fine"),
    [
        (None, True),
        (["BertForSequenceClassification"], True),
        (["TFBertForSequenceClassification"], True),
        (["BertForTokenClassification"], False),
        (["BertModel"], False),
    ],
)
def test_what_a_checkpoint_says_it_is(named, fine):
    found = architecture_problem(BertConfig(architectures=named), "BertForSequenceClassification")
    assert (found is None) is fine


def test_a_broken_configuration(tmp_path):
    with pytest.raises(PaveError, match=r"its config\.json gives no model"):
        read_config(write(tmp_path / "broken", model_type="no-such-model"))
