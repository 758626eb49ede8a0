"""Checkpoints whose names transformers changes when it loads them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, Wav2Vec2Config, Wav2Vec2Model

from pave_lightning import task_vectors
from pave_lightning.weights import Architecture

PART = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SPEECH = {
    **PART,
    "conv_dim": (8,),
    "conv_kernel": (5,),
    "conv_stride": (3,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}


@pytest.fixture
def clip_folder(tmp_path):
    vision, text = {**PART, "image_size": 8, "patch_size": 4}, {**PART, "vocab_size": 30, "max_position_embeddings": 9}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def noisy_copy(kind, origin, folder, rename=lambda name: name):
    model = kind.from_pretrained(origin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_experts_that_are_a_part_of_the_base(clip_folder, tmp_path, prefix):
    def rename(name):
        return prefix + name.removeprefix("vision_model.")

    models = {task: noisy_copy(CLIPVisionModel, clip_folder, tmp_path / task, rename) for task in ("a", "b")}
    source = task_vectors(str(clip_folder), {task: str(tmp_path / task) for task in models})
    base = CLIPVisionModel.from_pretrained(clip_folder)
    parameters = {parameter.name: parameter for parameter in source.parameters}
    assert set(parameters) == {name for name, _ in base.named_parameters()}
    for name, parameter in parameters.items():
        expected = models["b"].get_parameter(name) - base.get_parameter(name)
        torch.testing.assert_close(source.vector("b", parameter), expected.detach())
    matrices = {parameter.layer for parameter in source.parameters if parameter.is_matrix}
    assert matrices == {
        name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def test_names_of_older_releases(tmp_path):
    def old(name):
        return name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        )

    model = Wav2Vec2Model(Wav2Vec2Config(**SPEECH))
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    renamed = {old(name): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    architecture = Architecture.of_folder(tmp_path / "base")
    found = architecture.checkpoint(tmp_path / "old")
    assert set(found) == set(tensors)
    assert all(torch.equal(found.tensor(name), value) for name, value in tensors.items())
    assert {old(name) for name in found.own_names} == set(found.own_names.values())
    # Either may be the base of the other.
    for base, expert in (("base", "old"), ("old", "base")):
        names = {p.name for p in task_vectors(str(tmp_path / base), {"a": str(tmp_path / expert)}).parameters}
        assert names == set(tensors)
