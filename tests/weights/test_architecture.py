import json

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, CLIPConfig, GPT2Config, ViTConfig, ViTForImageClassification

from pave_lightning.callbacks import PaveCallback
from pave_lightning.errors import PaveError
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors, Parameter, ParameterKind
from pave_lightning.weights.backbones import backbone_of, name_prefix, with_backbone
from pave_lightning.weights.empty_models import empty_model
from pave_lightning.weights.matrices import Outputs, Part

IMAGES = "AutoModelForImageClassification"


@pytest.fixture
def gpt2_folder(tmp_path):
    GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8, eos_token_id=0, bos_token_id=0
    ).save_pretrained(tmp_path)
    return tmp_path


def test_bert(base_folder):
    found = Architecture.of_folder(base_folder)
    assert found.prefix == "bert"
    assert found.config["hidden_size"] == 32
    layer = "encoder.layer.1"
    expected = {
        "embeddings.word_embeddings.weight": (ParameterKind.EMBEDDING, (100, 32), None),
        "embeddings.LayerNorm.weight": (ParameterKind.NORM_SCALE, (32,), None),
        "embeddings.LayerNorm.bias": (ParameterKind.NORM_SHIFT, (32,), None),
        f"{layer}.attention.self.query.weight": (ParameterKind.LINEAR, (32, 32), 1),
        f"{layer}.attention.self.query.bias": (ParameterKind.BIAS, (32,), None),
        f"{layer}.intermediate.dense.weight": (ParameterKind.LINEAR, (64, 32), 1),
        f"{layer}.output.dense.weight": (ParameterKind.LINEAR, (32, 64), 1),
        "pooler.dense.weight": (ParameterKind.LINEAR, (32, 32), 1),
    }
    for name, (kind, shape, axis) in expected.items():
        assert found.parameters[name] == Parameter(name, kind, shape, axis)
    assert not any("classifier" in name for name in found.parameters)


def test_it_agrees_with_the_model_that_transformers_builds(base_folder):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(base_folder)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert {name: p.shape for name, p in Architecture.of_folder(base_folder).parameters.items()} == shapes


def test_gpt2_holds_its_linear_weights_transposed(gpt2_folder):
    found = Architecture.of_folder(gpt2_folder)
    assert found.prefix == "transformer"
    parts = tuple(Part(name, Outputs(8 * place, 8)) for place, name in enumerate(("query", "key", "value")))
    assert found.parameters["h.0.attn.c_attn.weight"] == Parameter(
        "h.0.attn.c_attn.weight", ParameterKind.LINEAR, (8, 24), 0, parts=parts
    )
    assert found.parameters["h.0.mlp.c_proj.weight"].input_axis == 0
    assert found.parameters["h.0.mlp.c_proj.weight"].shape == (32, 8)
    assert found.parameters["h.0.ln_1.weight"].kind == ParameterKind.NORM_SCALE
    assert found.parameters["wte.weight"].kind == ParameterKind.EMBEDDING


def test_convolutions_and_bare_parameters(tmp_path):
    from pave_lightning.weights.parameters import kind_of

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8)
    config.patch_size = 4
    from transformers import ViTModel

    model = ViTModel(config, add_pooling_layer=False)
    patch = model.embeddings.patch_embeddings.projection
    assert kind_of(patch, "weight") == (ParameterKind.CONVOLUTION, 1)
    assert kind_of(patch, "bias") == (ParameterKind.BIAS, None)
    assert kind_of(model.embeddings, "cls_token") == (ParameterKind.OTHER, None)
    assert kind_of(torch.nn.LSTM(2, 2), "weight_ih_l0") == (ParameterKind.OTHER, None)


class ImageExpert(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def validation_step(self, batch, _):
        self.model(pixel_values=batch["pixel_values"])


@pytest.fixture
def vit_config():
    return ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        num_labels=3,
    )


def test_an_image_classifier(tmp_path, vit_config):
    vit_config.save_pretrained(tmp_path)
    found = Architecture.of_folder(tmp_path, IMAGES)
    assert found.prefix == "vit"
    assert (found.vocabulary, found.positions) == (None, None)
    assert found.head == {"classifier.weight", "classifier.bias"}
    patches = found.parameters["embeddings.patch_embeddings.projection.weight"]
    assert (patches.kind, patches.shape) == (ParameterKind.CONVOLUTION, (8, 3, 4, 4))
    assert (patches.is_matrix, patches.matrix_shape) == (True, (8, 48))
    model = ViTForImageClassification(vit_config)
    assert set(found.parameters) == {name for name, _ in model.vit.named_parameters()}


def test_task_vectors_of_image_classifiers(tmp_path, vit_config):
    models = {name: ViTForImageClassification(vit_config) for name in ("base", "first", "second")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    checkpoints = {name: Checkpoint(tmp_path / name, "vit") for name in models}
    base = checkpoints.pop("base")
    source = ExpertTaskVectors(base, checkpoints, Architecture.of_folder(tmp_path / "first"))
    own = dict(models["base"].vit.named_parameters())
    assert len(source.parameters) == len(own)
    matrices = {parameter.layer: parameter for parameter in source.parameters if parameter.is_matrix}
    linear = {name for name, module in models["base"].vit.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(matrices) == linear | {"embeddings.patch_embeddings.projection"}
    # Whatever name a file gives it, a parameter belongs to the module that multiplies with it.
    for layer, parameter in matrices.items():
        weights = {name: model.vit.get_submodule(layer).weight.detach() for name, model in models.items()}
        assert torch.equal(source.vector("second", parameter), weights["second"] - weights["base"])


def test_moments_of_an_image_classifier_fit_its_parameters(tmp_path, vit_config):
    vit_config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config)
    images = [{"pixel_values": torch.randn(6, 3, 12, 12)} for _ in range(2)]
    callback = PaveCallback(backbone="model.vit", convolutions=True)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callback,
    )
    trainer.validate(ImageExpert(model), DataLoader(images, batch_size=None), verbose=False)
    captured, parameters = callback.statistics, Architecture.of_folder(tmp_path, IMAGES).parameters.values()
    matrices = {parameter.layer: parameter for parameter in parameters if parameter.is_matrix}
    assert set(captured) == set(matrices)
    for layer, parameter in matrices.items():
        height, width = parameter.matrix_shape
        assert captured.kind(layer) == ("cross" if width > height else "input")
        assert captured.shape(layer) == ((height, width) if width > height else (width, width))
    # Each patch as the weight sees it: channels first, then its rows, then its columns.
    patches = torch.stack(
        [
            image[:, top : top + 4, left : left + 4].flatten()
            for batch in images
            for image in batch["pixel_values"]
            for top in (0, 4, 8)
            for left in (0, 4, 8)
        ]
    ).double()
    layer = "embeddings.patch_embeddings.projection"
    weight = model.vit.get_parameter(f"{layer}.weight").detach().reshape(8, 48).double()
    expected = weight @ patches.T @ patches / len(patches)
    torch.testing.assert_close(captured[layer].matrix.double(), expected, atol=1e-5, rtol=1e-4)
    assert captured.rows(layer) == 2 * 6 * 9


def test_an_image_model_whose_backbone_is_not_where_its_prefix_says(tmp_path):
    CLIPConfig(
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ).save_pretrained(tmp_path)
    with pytest.raises(PaveError, match="CLIPForImageClassification has no backbone named 'clip'"):
        Architecture.of_folder(tmp_path, IMAGES)


def test_nothing_is_allocated(tmp_path):
    BertConfig(hidden_size=4096, num_attention_heads=32, intermediate_size=4096, vocab_size=2_000_000).save_pretrained(
        tmp_path
    )  # the embeddings alone would take 32 GB
    assert Architecture.of_folder(tmp_path).parameters["embeddings.word_embeddings.weight"].elements == 2_000_000 * 4096


def test_layer_and_elements_of_a_parameter():
    parameter = Parameter("encoder.layer.0.output.dense.weight", ParameterKind.LINEAR, (3, 4), 1)
    assert parameter.layer == "encoder.layer.0.output.dense"
    assert parameter.elements == 12
    assert Parameter("scale", ParameterKind.OTHER, ()).layer == ""
    assert Parameter("scale", ParameterKind.OTHER, ()).elements == 1


def test_a_tensor_that_the_class_does_not_know_is_other(base_folder):
    found = Architecture.of_folder(base_folder)
    assert found.describe("something.new", (3, 2)) == Parameter("something.new", ParameterKind.OTHER, (3, 2))


def test_no_configuration(tmp_path):
    with pytest.raises(PaveError, match=r"config\.json cannot be read: No such file"):
        Architecture.of_folder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "unheard-of"}, {"model_type": "marian"}, {"hidden_size": 33}, {"hidden_size": "wide"}],
    ids=["unknown type", "no classifier", "impossible size", "size of another type"],
)
def test_a_configuration_that_gives_no_model(tmp_path, base_folder, changes):
    config = json.loads((base_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(PaveError, match=r"config\.json gives no (sequence-classification )?model: \S"):
        Architecture.of_folder(tmp_path, "AutoModelForSequenceClassification")


def test_broken_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PaveError, match=r"config\.json cannot be read as JSON"):
        Architecture.of_folder(tmp_path)


def test_the_empty_model_is_on_the_device_asked_for(base_folder):
    assert all(value.is_meta for value in empty_model(base_folder, "AutoModelForSequenceClassification").parameters())
    model = empty_model(base_folder, "AutoModelForSequenceClassification", device="cpu")
    assert not any(value.is_meta for value in model.parameters())
    assert type(backbone_of(model)).__name__ == "BertModel"


def test_a_model_without_backbone_is_told():
    model = torch.nn.Linear(1, 1)
    model.base_model_prefix = "weight"
    with pytest.raises(PaveError, match="Linear has no backbone named 'weight'"):
        backbone_of(model)


def test_models_on_another_backbone(base_folder):
    """A model with a head is changed in place; of a bare one there is nothing but the backbone."""
    other = empty_model(base_folder, "AutoModel")
    headed, bare = (empty_model(base_folder, f"AutoModel{end}") for end in ("ForSequenceClassification", ""))
    assert (name_prefix(headed), name_prefix(bare)) == ("bert.", "")
    assert with_backbone(headed, other) is headed
    assert headed.bert is other
    assert with_backbone(bare, other) is other
