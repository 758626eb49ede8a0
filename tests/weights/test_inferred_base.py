"""The base that experts name."""

import json

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.system.references import HubModel
from pave_lightning.weights.inferred_base import inferred_base


@pytest.fixture
def adapter(tmp_path):
    def write(name, **settings):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        return tmp_path / name

    return write


@pytest.fixture
def model(tmp_path):
    def write(name, front):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if front is not None:
            (tmp_path / name / "README.md").write_text(f"---\n{front}\n---\n# {name}\n")
        return tmp_path / name

    return write


def test_adapters_and_cards_agree(adapter, model):
    experts = {
        "a": adapter("a", base_model_name_or_path="owner/base"),
        "b": model("b", "base_model: owner/base"),
        "c": model("c", "base_model: [owner/base]\nbase_model_relation: finetune"),
        "d": model("d", None),
    }
    assert inferred_base(experts) == "owner/base"


def test_the_revision_of_an_adapter(adapter):
    named = adapter("a", base_model_name_or_path="owner/base", revision="v2")
    assert inferred_base({"a": named}) == HubModel(hub="owner/base", revision="v2")
    assert inferred_base({"b": adapter("b", base_model_name_or_path="owner/base", revision="main")}) == "owner/base"


def test_different_bases(adapter, model):
    experts = {"a": adapter("a", base_model_name_or_path="x/one"), "b": model("b", "base_model: x/two")}
    with pytest.raises(PaveError, match=r"name different bases: 'x/one' \(task 'a'\), 'x/two' \(task 'b'\); name the"):
        inferred_base(experts)


@pytest.mark.parametrize("front", [None, "tags: [a]", "base_model: ''", "base_model: [", "base_model: 3"])
def test_no_base(model, front):
    with pytest.raises(PaveError, match=r"no expert says what its base is .*'a' \(.*; name the base"):
        inferred_base({"a": model("a", front)})
    with pytest.raises(PaveError, match="no task names one"):
        inferred_base({})


@pytest.mark.parametrize("front", ["base_model: [x/one, x/two]", "base_model: x/one\nbase_model_relation: merge"])
def test_models_that_were_not_fine_tuned(model, front):
    with pytest.raises(PaveError, match=r"the card of .* says that the model was made of x/one"):
        inferred_base({"a": model("a", front)})
