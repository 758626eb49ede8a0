"""What merging and purification leave out is listed by name and reason."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    ConvNextConfig,
    ElectraConfig,
    ResNetConfig,
    T5Config,
    ViTConfig,
    ViTMAEConfig,
    Wav2Vec2Config,
    XLNetConfig,
)

from pave_lightning.errors import PaveError
from pave_lightning.weights import Architecture, task_vectors
from pave_lightning.weights.coverage import BASE_HEAD, Coverage, reason_lines

T5 = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
XLNET = XLNetConfig(vocab_size=30, d_model=16, n_layer=2, n_head=2, d_inner=24)
RESNET = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
CONVNEXT = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)
BERT = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def coverage_of(config, folder, change=None, **options):
    AutoModel.from_config(config).save_pretrained(folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    architecture = Architecture.of_folder(folder)
    return Coverage.of(architecture.checkpoint(folder), architecture, **options)


def test_attention_that_is_no_linear_layer_is_listed(tmp_path):
    found = coverage_of(XLNET, tmp_path)
    lines = reason_lines(found.not_purified)
    (line,) = (line for line in lines if line.startswith("no linear layer multiplies with them as one matrix: "))
    for name in "qkvor":
        assert f"layer.*.rel_attn.{name} (2)" in line
    assert "embedding tables: word_embedding.weight" in lines
    assert not any(".ff." in name for name in found.not_purified)


def test_convolutions_are_listed_unless_they_are_captured(tmp_path):
    found = coverage_of(RESNET, tmp_path).not_purified
    assert "embedder.embedder.convolution.weight" in found
    assert set(found.values()) == {"convolutions, which capture.convolutions leaves out"}
    assert not coverage_of(RESNET, tmp_path / "captured", convolutions=True).not_purified


def test_convolutions_with_groups_are_listed(tmp_path):
    found = coverage_of(CONVNEXT, tmp_path, convolutions=True).not_purified
    assert set(found.values()) == {"grouped, depthwise or transposed convolutions"}
    assert set(found) == {f"encoder.stages.{stage}.layers.0.dwconv.weight" for stage in range(2)}


def test_what_is_not_merged_is_listed(tmp_path):
    def change(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["lm_head.weight"] = torch.zeros(3, 3)

    assert coverage_of(T5, tmp_path, change).not_merged == {
        "encoder.embed_tokens.weight": "tied to shared.weight, with which it is merged",
        "lm_head.weight": "not in the model of the experts, so that it stays as it is in the base",
    }


def test_statistics_and_weights_that_the_base_lacks_are_listed(tmp_path):
    lines = reason_lines(coverage_of(RESNET, tmp_path / "resnet").not_merged)
    assert all(line.startswith("running statistics, averaged over the experts: ") for line in lines)
    assert "embedder.embedder.normalization.running_var" in lines[0]

    def drop(tensors):
        for name in [name for name in tensors if name.startswith("pooler.")]:
            del tensors[name]

    found = coverage_of(BERT, tmp_path / "bert", drop).not_merged
    assert found == dict.fromkeys(
        ["pooler.dense.weight", "pooler.dense.bias"], "not in the base, so that each task keeps its own"
    )


def test_a_common_model_lists_its_embeddings_alone(tmp_path):
    found = coverage_of(BERT, tmp_path)
    assert found.sections() == {
        "weights that are not captured and purified": [
            "embedding tables: embeddings.word_embeddings.weight, embeddings.position_embeddings.weight, "
            "embeddings.token_type_embeddings.weight"
        ]
    }
    assert found.sections(captures=False) == {}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_formats_that_cannot_be_merged_are_refused(base_folder, expert_folders, tmp_path, dtype):
    names = ["encoder.layer.0.output.dense.weight", "encoder.layer.1.output.dense.weight"]
    folders = {}
    for role, folder, prefix in (("base", base_folder, ""), ("expert", expert_folders["first"], "bert.")):
        tensors = load_file(folder / "model.safetensors")
        tensors.update({prefix + name: tensors[prefix + name].to(dtype) for name in names})
        folders[role] = tmp_path / role
        folders[role].mkdir()
        save_file(tensors, folders[role] / "model.safetensors")
        (folders[role] / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(PaveError) as caught:
        task_vectors(str(folders["base"]), {"a": str(folders["expert"])})
    lines = str(caught.value).splitlines()[1:]
    stored = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8"}[dtype]
    for line, where, folder in zip(lines, ("base", "task 'a'"), folders.values(), strict=True):
        assert line.startswith(f"  - {where}: {folder}: 2 weights are stored as {stored}, such as {names[0]}; only ")


def test_names_are_grouped_by_number_and_many_are_counted():
    reasons = {f"layer.{block}.expert.{part}.w": "a" for block in range(3) for part in range(2)} | {"w2.3d": "a"}
    assert reason_lines(reasons) == ["a: layer.*.expert.*.w (6), w2.3d"]
    (line,) = reason_lines({f"name{letter}": "b" for letter in "abcdefghijklmno"})
    assert line.endswith("namel, and 3 more")


CONVOLVED = {"conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2}
QUANTISED = {"codevector_dim": 8, "proj_codevector_dim": 8, "num_codevectors_per_group": 4}
WAV2VEC2 = Wav2Vec2Config(
    **CONVOLVED,
    **QUANTISED,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    vocab_size=12,
)
VIT = ViTConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
    encoder_stride=4,
)
MAE = ViTMAEConfig(
    **{key: value for key, value in VIT.to_diff_dict().items() if key not in ("model_type", "encoder_stride")},
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=16,
)
ELECTRA = ElectraConfig(
    vocab_size=30,
    embedding_size=8,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
)
# Configuration, class of the base, class of the experts, and the submodules that are the head of the base.
PRETRAINED = {
    "masked words": (BERT, "BertForMaskedLM", "BertForSequenceClassification", {"cls"}),
    "masked words, next sentence": (BERT, "BertForPreTraining", "BertForSequenceClassification", {"cls"}),
    "next sentence": (BERT, "BertForNextSentencePrediction", "BertForSequenceClassification", {"cls"}),
    "discriminator": (
        ELECTRA,
        "ElectraForPreTraining",
        "ElectraForSequenceClassification",
        {"discriminator_predictions"},
    ),
    "generator": (
        ELECTRA,
        "ElectraForMaskedLM",
        "ElectraForSequenceClassification",
        {"generator_predictions", "generator_lm_head"},
    ),
    "autoencoder": (MAE, "ViTMAEForPreTraining", "ViTForImageClassification", {"decoder"}),
    "masked patches": (VIT, "ViTForMaskedImageModeling", "ViTForImageClassification", {"decoder"}),
    "contrasted sounds": (
        WAV2VEC2,
        "Wav2Vec2ForPreTraining",
        "Wav2Vec2ForSequenceClassification",
        {"quantizer", "project_q", "project_hid"},
    ),
}


def pretrained(folder, config, base_class, expert_class):
    """A base with a head of its pre-training, and two experts of another class on its backbone, slightly moved."""
    base = getattr(transformers, base_class)(config)
    base.save_pretrained(folder / "base")
    for task in "ab":
        config_class = getattr(transformers, expert_class).config_class
        own = config if isinstance(config, config_class) else VIT
        expert = getattr(transformers, expert_class)(own)
        expert.load_state_dict(base.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.01)
        expert.save_pretrained(folder / task)
    return str(folder / "base"), {task: str(folder / task) for task in "ab"}


@pytest.mark.parametrize("case", PRETRAINED)
def test_the_head_that_a_base_was_pretrained_with_is_left_out_and_told(tmp_path, case):
    config, base_class, expert_class, head = PRETRAINED[case]
    base, experts = pretrained(tmp_path, config, base_class, expert_class)
    vectors = task_vectors(base, experts)
    architecture = Architecture.of_folder(tmp_path / "a")
    found = Coverage.of(architecture.checkpoint(tmp_path / "base"), architecture).not_merged
    told = {name for name, reason in found.items() if reason == BASE_HEAD}
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert told == {name for name in stored if name.partition(".")[0] in head}
    assert told
    # Everything that the file holds is merged, or told.
    prefix = architecture.prefix
    merged = {parameter.name for parameter in vectors.parameters}
    assert {name.removeprefix(f"{prefix}.") for name in stored} <= merged | set(found)


@pytest.mark.parametrize("case", PRETRAINED)
def test_heads_of_language_models_are_merged_and_others_are_told_to_be_of_the_tasks(tmp_path, case):
    config, both, _, head = PRETRAINED[case]
    base, experts = pretrained(tmp_path, config, both, both)
    merged = {parameter.name for parameter in task_vectors(base, experts).parameters}
    architecture = Architecture.of_folder(tmp_path / "a")
    found = Coverage.of(architecture.checkpoint(tmp_path / "base"), architecture).not_merged
    of_head = {name for name in load_file(tmp_path / "base" / "model.safetensors") if name.partition(".")[0] in head}
    if getattr(transformers, both)(config).get_output_embeddings() is None:
        assert {found[name] for name in of_head} == {"heads, of which each task keeps its own"}
    else:
        assert of_head <= merged
    assert BASE_HEAD not in found.values()


def test_a_mask_token_that_experts_lack_stays_as_it_is_in_the_base(tmp_path):
    base, experts = pretrained(tmp_path, VIT, "ViTForMaskedImageModeling", "ViTForImageClassification")
    assert "embeddings.mask_token" not in {parameter.name for parameter in task_vectors(base, experts).parameters}
    architecture = Architecture.of_folder(tmp_path / "a")
    found = Coverage.of(architecture.checkpoint(tmp_path / "base"), architecture).not_merged
    assert found["embeddings.mask_token"].startswith("not in the model of the experts")
    # What no class has is refused as before.
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file({**tensors, "vit.embeddings.ghost": torch.zeros(3)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(PaveError, match=r"1 weight that no module of a ViTModel has \(embeddings.ghost\)"):
        task_vectors(base, experts)
