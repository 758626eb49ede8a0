"""Quantised checkpoints are refused by name."""

import json

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.weights import Architecture


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_the_method_is_named(tmp_path, settings, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "quantization_config": settings}))
    with pytest.raises(PaveError) as told:
        Architecture.of_folder(tmp_path)
    assert str(told.value).startswith(
        f"{tmp_path}: its weights are quantised ({name}; quantization_config in config.json)"
    )
    assert "name the model that it was made of, or load it where" in str(told.value)


def test_the_card_says_of_what_it_was_made(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    (tmp_path / "README.md").write_text("---\nbase_model: owner/whole\n---\n")
    with pytest.raises(PaveError, match=r"name the model that it was made of \(owner/whole, by its card\), or load it"):
        Architecture.of_folder(tmp_path)


def test_models_that_are_not_quantised(base_folder):
    assert Architecture.of_folder(base_folder).model_class == "BertModel"
