"""What an expert says of itself is compared with what the recipe asks, before anything runs."""

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from pave_lightning import Recipe
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder


@pytest.fixture
def expert(expert_folders, tmp_path):
    shutil.copytree(expert_folders["first"], tmp_path / "expert")
    return tmp_path / "expert"


@pytest.fixture
def told(recipe_settings, tmp_path):
    """All that is told of a recipe whose first task has an expert of these files."""

    def check(folder, accept=(), classes=("low", "high"), **changes):
        words, numbers = recipe_settings["tasks"]
        words = {**words, "classes": list(classes), "expert": {"from": str(folder), "accept": list(accept)}}
        try:
            recipe = Recipe.model_validate({**recipe_settings, "tasks": [words, numbers], **changes})
            check_recipe(recipe, RunFolder(tmp_path / "checked"))
        except PaveError as error:
            return str(error)
        return ""

    return check


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})


def names(*labels):
    return {
        "id2label": {str(index): name for index, name in enumerate(labels)},
        "label2id": {name: index for index, name in enumerate(labels)},
    }


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("low", "high"), ("low", "high")),
        (("LOW", "High"), ("low", "high")),
        (("LABEL_0", "LABEL_1"), ("low", "high")),
        (("0", "1"), ("low", "high")),
        (("low", "high"), ("0", "1")),
        (("HIGH", "high"), ("HIGH", "high")),
    ],
)
def test_heads_whose_names_agree_or_say_nothing(told, expert, labels, classes):
    edit(expert, **names(*labels))
    # Rows of other class names are another matter.
    assert "id2label" not in told(expert, classes=classes)
    assert "in the order" not in told(expert, classes=classes)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(("HIGH", "LOW"), ("low", "high")), (("high", "HIGH"), ("HIGH", "high")), (("1", "0"), ("0", "1"))],
)
def test_a_head_in_another_order_is_never_taken(told, expert, labels, classes):
    edit(expert, **names(*labels))
    for accept in ((), ("id2label", "label2id")):
        text = told(expert, accept, classes)
        assert f"classes in the order {list(labels)}, the task in the order {list(classes)}" in text


@pytest.mark.parametrize("labels", [("small", "large"), ("low", "low"), ("low", "medium"), ("1", "0")])
def test_other_class_names_are_accepted_where_that_is_said(told, expert, labels):
    edit(expert, **names(*labels))
    text = told(expert)
    assert f"its head has the classes {list(labels)} (id2label), and the task ['low', 'high']" in text
    assert "expert.accept: [id2label]" in text
    assert "id2label" not in told(expert, ["id2label"])


def test_names_that_are_shared_must_be_in_their_places_even_then(told, expert):
    edit(expert, **names("high", "medium"))
    assert "in the order" in told(expert, ["id2label"])


def test_indices_that_contradict_the_names(told, expert):
    edit(expert, **{**names("low", "high"), "label2id": {"low": 1, "high": 0}})
    text = told(expert)
    assert "contradicts itself: label2id gives 'low' the index 1, id2label 0" in text
    assert told(expert, ["label2id"]) == ""


@pytest.mark.parametrize(
    ("key", "values", "part"),
    [
        ("architectures", {"architectures": ["BertForTokenClassification"]}, "is a BertForTokenClassification"),
        ("problem_type", {"problem_type": "multi_label_classification"}, "problem_type multi_label_classification"),
        ("problem_type", {"problem_type": "regression"}, "problem_type regression"),
        ("hidden_act", {"hidden_act": "relu"}, "hidden_act is 'relu' in the expert's config.json, 'gelu' in the base"),
        ("layer_norm_eps", {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
    ],
)
def test_other_kinds_and_other_functions(told, expert, key, values, part):
    edit(expert, **values)
    text = told(expert)
    assert part in text
    assert f"expert.accept: [{key}]" in text
    assert told(expert, [key]) == ""


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_dropout_prob": 0.5, "use_cache": False, "dtype": "bfloat16"},
        {"architectures": None, "problem_type": None},
        {"transformers_version": "4.1.0", "_name_or_path": "x", "finetuning_task": "y"},
    ],
)
def test_what_does_not_matter(told, expert, values):
    edit(expert, **values)
    assert told(expert) == ""


def test_what_is_accepted_and_does_not_differ_is_told(told, expert, caplog):
    with caplog.at_level(logging.WARNING, "pave_lightning"):
        assert told(expert, ["rope_theta"]) == ""
    assert "expert.accept names rope_theta, of which nothing differs" in caplog.text


def test_heads_that_are_more_or_less_than_the_model(told, expert):
    edit_weights(expert, lambda tensors: {**tensors, "dense.weight": torch.ones(2, 2)})
    text = told(expert)
    assert "no place for (dense.weight)" in text
    assert told(expert, ["unused_weights"]) == ""
    edit_weights(expert, lambda tensors: {n: t for n, t in tensors.items() if n != "classifier.bias"})
    assert "lacks 1 weight of a" in told(expert, ["unused_weights"])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "base_model.model."])
def test_a_prefix_is_told_and_nothing_that_follows_from_it(told, expert, base_folder, tmp_path, prefix):
    edit_weights(expert, lambda tensors: {f"{prefix}{name}": value for name, value in tensors.items()})
    text = told(expert)
    assert f"'{prefix}' in them" in text
    assert len(text.splitlines()) == 2
    shutil.copytree(base_folder, tmp_path / "base")
    edit_weights(tmp_path / "base", lambda tensors: {f"{prefix}{name}": value for name, value in tensors.items()})
    text = told(expert, base=str(tmp_path / "base"))
    assert f"base: the names of 39 of its weights have '{prefix}' in them" in text


def test_a_base_that_lacks_weights(told, expert, base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "base")
    name = "encoder.layer.1.output.dense.weight"
    edit_weights(tmp_path / "base", lambda tensors: {n: t for n, t in tensors.items() if n != name})
    assert f"base: 1 weight of the model cannot be filled from its files ({name} is not there)" in told(
        expert, base=str(tmp_path / "base")
    )


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300])
def test_values_of_a_head_are_read_by_plan(told, expert, value):
    wrong = torch.tensor([0.0, value], dtype=torch.float64)
    edit_weights(expert, lambda tensors: {**tensors, "classifier.bias": wrong})
    assert "classifier.bias" in told(expert)


@pytest.fixture
def make_adapter(tmp_path):
    def build(base, **options):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
            adapted = get_peft_model(model, LoraConfig(r=2, **{"task_type": TaskType.SEQ_CLS, **options}))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return build


def test_an_adapter_of_another_base(told, base_folder, make_base, make_adapter):
    assert told(make_adapter(base_folder)) == ""
    folder = make_adapter(make_base(seed=4))
    text = told(folder)
    assert "was trained on" in text
    assert "expert.accept: [base]" in text
    assert told(folder, ["base"]) == ""


def test_an_adapter_for_another_kind_of_task(told, base_folder, make_adapter):
    folder = make_adapter(base_folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "TOKEN_CLS"}))
    text = told(folder)
    assert "was trained with task_type TOKEN_CLS" in text
    assert told(folder, ["task_type"]) == ""


def test_an_adapter_of_the_head_alone(told, base_folder, make_adapter):
    folder = make_adapter(base_folder, target_modules=["pooler.dense"])
    assert told(folder) == ""
    folder = make_adapter(base_folder, task_type=None, target_modules=["classifier"])
    assert "holds no head" in told(folder)
