"""How models are named."""

import pytest
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.system.references import HubModel, hub_model


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"hub": "owner/name"}, "owner/name"),
        ({"hub": "bert-base-uncased"}, "bert-base-uncased"),
        ({"hub": "owner/name", "revision": "v1"}, "hf://owner/name@v1"),
        ({"hub": "owner/name", "folder": "a/b"}, "hf://owner/name/a/b"),
        ({"hub": "owner/name", "revision": "refs/pr/2", "folder": "a"}, "hf://owner/name@refs%2Fpr%2F2/a"),
        ({"hub": "owner/name", "file": "m.Q4_0.gguf"}, "hf://owner/name/m.Q4_0.gguf"),
        ({"hub": "owner/name", "folder": "a", "file": "m.GGUF"}, "hf://owner/name/a/m.GGUF"),
    ],
)
def test_a_text_and_back(model, text):
    assert str(HubModel(**model)) == text
    if text.startswith("hf://"):
        assert hub_model(text) == HubModel(**model)


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://a b/c", "hf://a/b@", "hf://a/b/../c", "hf://a/b//c"])
def test_texts_that_name_nothing(text):
    with pytest.raises(PaveError, match=r"names no model of the hub; expected hf://OWNER/NAME@REVISION/FOLDER"):
        hub_model(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hub": "a/b/c"},
        {"hub": "../x"},
        {"hub": "a/b", "folder": "../c"},
        {"hub": "a/b", "folder": "/etc"},
        {"hub": "a/b", "folder": ""},
        {"hub": "a/b", "file": "model.bin"},
        {"hub": "a/b", "revision": ""},
        {"folder": "a"},
    ],
)
def test_parts_that_name_nothing(wrong):
    with pytest.raises(ValidationError):
        HubModel(**wrong)
