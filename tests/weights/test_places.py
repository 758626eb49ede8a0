"""Where stored tensors lie in the model, against what transformers itself writes and loads."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from pave_lightning.weights import Architecture, ParameterKind
from pave_lightning.weights.matrices import Outputs
from pave_lightning.weights.places import Piece, Place, stored_places

TINY = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
MIXTRAL = {**TINY, "intermediate_size": 6, "num_local_experts": 3}


@pytest.fixture
def mixtral(tmp_path):
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTRAL))
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_places_give_back_the_model_that_was_saved(mixtral):
    folder, model = mixtral
    stored = load_file(folder / "model.safetensors")
    other = hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTRAL))
    parameters = {name: parameter.data for name, parameter in other.named_parameters()}
    places = stored_places(other)
    assert {name for name in stored if "experts" in name} <= places.keys()
    for name, value in stored.items():
        if name in places:
            places[name].copy_into(parameters, value)
        else:
            parameters[name].copy_(value)
    for name, value in model.named_parameters():
        assert torch.equal(parameters[name], value), name


def test_the_experts_of_a_file_are_matrices_of_layers_with_names_of_their_own(mixtral):
    architecture = Architecture.of_folder(mixtral[0])
    found = architecture.describe("model.layers.0.block_sparse_moe.experts.2.w3.weight", (6, 8))
    assert (found.kind, found.input_axis, found.layer) == (
        ParameterKind.LINEAR,
        1,
        "model.layers.0.mlp.experts.gate_up_proj.2",
    )
    assert found.of_layer == Outputs(6, 6)
    (matrix,) = found.matrices
    assert matrix.name == "model.layers.0.block_sparse_moe.experts.2.w3"
    down = architecture.describe("model.layers.0.block_sparse_moe.experts.1.w2.weight", (8, 6))
    assert down.layer == "model.layers.0.mlp.experts.down_proj.1"
    assert down.of_layer is None


def test_pieces_one_after_the_other_are_rows_of_the_stored_tensor():
    first, second = torch.zeros(2, 3), torch.zeros(1, 3)
    place = Place((Piece("first", (2, 3), (3, 1), 0), Piece("second", (1, 3), (3, 1), 0)))
    place.copy_into({"first": first, "second": second}, torch.arange(9.0).reshape(3, 3))
    assert torch.equal(first, torch.arange(6.0).reshape(2, 3))
    assert second.tolist() == [[6, 7, 8]]


def test_a_model_that_is_stored_as_it_is_has_no_places():
    assert stored_places(hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, intermediate_size=6))) == {}
