"""Adapters as peft writes them: their factors, and what has none. References come from peft's own merged weights."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, TaskType, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTModel,
)

from pave_lightning.errors import PaveError
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.weights import Adapter, Architecture, Checkpoint, ExpertTaskVectors, task_vectors
from pave_lightning.weights.adapters import adapter_folder

QUERY = "encoder.layer.0.attention.self.query"
VALUE = "encoder.layer.1.attention.self.value"


def adapted(base, config, seed=0, model_class=AutoModelForSequenceClassification):
    """A peft model around the base whose trained tensors are random, so that every update is there."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = get_peft_model(model_class.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude" not in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def write(model, folder, dtype=None):
    """The adapter, and the weights that it makes together with the base."""
    model.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload()
    (merged if dtype is None else merged.to(dtype)).save_pretrained(folder)
    return folder


def lora(**settings):
    return LoraConfig(task_type=TaskType.SEQ_CLS, **{"r": 3, "lora_alpha": 6, **settings})


@pytest.fixture
def make_source(base_folder, tmp_path):
    """Write one expert with the given adapter, and read it."""

    def build(config, base=base_folder, seed=0, **writing):
        folder = write(adapted(base, config, seed), tmp_path / f"expert{seed}", **writing)
        return task_vectors(str(base), {"a": str(folder)})

    return build


def named(source, layer):
    return next(p for p in source.parameters if p.is_matrix and p.layer == layer)


def edit(folder, **settings):
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def product(pair):
    return pair[0].numpy() @ pair[1].numpy()


def stored_difference(source, parameter):
    return (source.expert("a", parameter) - source.base(parameter)).numpy()


@pytest.mark.parametrize(
    ("settings", "layer", "rank", "scaling"),
    [
        ({"target_modules": ["query"]}, QUERY, 3, 2.0),
        ({"target_modules": ["query"], "use_rslora": True}, QUERY, 3, 6 / 3**0.5),
        ({"target_modules": "all-linear", "lora_alpha": 5}, "encoder.layer.1.intermediate.dense", 3, 5 / 3),
        ({"target_modules": ["value"], "rank_pattern": {r"layer\.1\..*value": 2}}, VALUE, 2, 3.0),
        ({"target_modules": ["value"], "alpha_pattern": {"encoder.layer.1.attention.self.value": 9}}, VALUE, 3, 3.0),
        ({"target_modules": ["value"], "rank_pattern": {"self": 2, "value": 1}, "use_rslora": True}, VALUE, 1, 6.0),
        ({"target_modules": ["query"], "lora_bias": True, "bias": "lora_only"}, QUERY, 3, 2.0),
        ({"target_modules": ["query"], "init_lora_weights": "gaussian"}, QUERY, 3, 2.0),
        ({"target_modules": ["query"], "init_lora_weights": False}, QUERY, 3, 2.0),
        ({"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [1, 5]}}, QUERY, 3, 2.0),
        ({"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]}, QUERY, 3, 2.0),
    ],
)
def test_factors_make_up_what_peft_merged(make_source, settings, layer, rank, scaling):
    source = make_source(lora(**settings))
    parameter = named(source, layer)
    left, right = source.factors("a", parameter)
    assert left.dtype == right.dtype == torch.float64
    assert left.shape == (parameter.matrix_shape[0], rank)
    assert right.shape == (rank, parameter.matrix_shape[1])
    assert source.scaling("a", parameter) == pytest.approx(scaling)
    assert np.abs(product((left, right))).max() > 0.01
    assert np.allclose(product((left, right)), stored_difference(source, parameter), atol=3e-7)
    assert source.without_factors("a") is None


def test_the_task_vector_is_the_product_and_not_the_difference_of_rounded_weights(base_folder, tmp_path):
    model = adapted(base_folder, lora(target_modules=["query"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-5)
    source = task_vectors(str(base_folder), {"a": str(write(model, tmp_path / "expert"))})
    parameter = named(source, QUERY)
    stored = load_file(tmp_path / "expert" / "adapter" / "adapter_model.safetensors")
    key = f"base_model.model.bert.{QUERY}"
    exact = 2 * stored[f"{key}.lora_B.weight"].double().numpy() @ stored[f"{key}.lora_A.weight"].double().numpy()
    assert np.abs(source.vector("a", parameter).numpy() / exact - 1).max() < 1e-7
    assert np.abs(stored_difference(source, parameter) / exact - 1).max() > 1e-4
    base, read = source.read(parameter)
    assert torch.equal(base, source.base(parameter))
    assert torch.equal(read["a"], source.vector("a", parameter))


def test_rows_of_products(make_source):
    source = make_source(lora(target_modules=["query"]))
    parameter = named(source, QUERY)
    whole = source.vector("a", parameter)
    assert torch.equal(source.vector("a", parameter, slice(5, 9)), whole[5:9])
    assert torch.equal(source.read(parameter, slice(30, 32))[1]["a"], whole[30:])


def test_what_is_not_adapted_is_fine_tuned_minus_base(make_source):
    source = make_source(lora(target_modules=["query"], bias="all"))
    for parameter in source.parameters:
        if not parameter.is_matrix or not parameter.layer.endswith("query"):
            assert source.factors("a", parameter) is None
            assert source.scaling("a", parameter) == 1.0
            expected = source.expert("a", parameter) - source.base(parameter)
            assert torch.equal(source.vector("a", parameter), expected)
            assert torch.equal(source.read(parameter)[1]["a"], expected)
    assert source.vector("a", next(p for p in source.parameters if p.name == f"{QUERY}.bias")).any()


def test_an_adapted_table_is_fine_tuned_minus_base_beside_factors_of_layers(make_source):
    source = make_source(lora(target_modules=["query", "word_embeddings"]))
    table = next(p for p in source.parameters if p.name == "embeddings.word_embeddings.weight")
    assert source.factors("a", table) is None
    assert source.vector("a", table).any()
    assert source.factors("a", named(source, QUERY)) is not None


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_weights_that_are_stored_transposed(make_source, tmp_path, tiny_tokenizer, fan_in_fan_out):
    base = tmp_path / "base"
    torch.manual_seed(0)
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=100)).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    source = make_source(lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=fan_in_fan_out), base=base)
    for layer in ("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"):
        parameter = named(source, layer)
        assert parameter.input_axis == 0
        difference = stored_difference(source, parameter)
        assert np.allclose(product(source.factors("a", parameter)), difference.T, atol=3e-7)
        assert np.allclose(source.vector("a", parameter).numpy(), difference, atol=3e-7)
        assert torch.equal(source.vector("a", parameter, slice(2, 5)), source.vector("a", parameter)[2:5])


def test_convolutions_that_are_matrix_products_and_weights_that_checkpoints_name_otherwise(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["projection", "q_proj", "query"])
    model = adapted(tmp_path / "base", settings, model_class=AutoModelForImageClassification)
    write(model, tmp_path / "expert")
    source = task_vectors(str(tmp_path / "base"), {"a": str(tmp_path / "expert")})
    found = [parameter for parameter in source.parameters if source.factors("a", parameter)]
    assert {parameter.kind.value for parameter in found} == {"convolution", "linear"}
    for parameter in found:
        difference = stored_difference(source, parameter)
        assert np.allclose(product(source.factors("a", parameter)), difference.reshape(16, -1), atol=3e-7)
        assert np.allclose(source.vector("a", parameter).numpy(), difference, atol=3e-7)
        assert source.vector("a", parameter, slice(0, 3)).shape == (3, *parameter.shape[1:])


def test_an_adapter_of_the_bare_backbone_has_names_without_prefix(base_folder, tmp_path):
    folder = write(adapted(base_folder, lora(target_modules=["query"])), tmp_path / "expert")
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("model.bert.", "model."): value for name, value in load_file(file).items()}, file)
    source = task_vectors(str(base_folder), {"a": str(folder)})
    assert source.factors("a", named(source, QUERY)) is not None


def test_adapted_layers_of_the_head_and_of_parts_that_the_base_lacks_are_none_of_the_backbone(make_base, tmp_path):
    base = make_base(pooler=False)
    config = LoraConfig(r=2, target_modules=["query", "pooler.dense", "classifier"])
    source = task_vectors(str(base), {"a": str(write(adapted(base, config), tmp_path / "expert"))})
    layers = {parameter.layer for parameter in source.parameters if source.factors("a", parameter)}
    assert layers == {QUERY, QUERY.replace("0", "1")}


def test_an_adapter_beside_the_weights_in_the_same_folder(base_folder, tmp_path):
    folder = write(adapted(base_folder, lora(target_modules=["query"])), tmp_path / "expert")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(folder / "adapter" / file, folder / file)
    assert adapter_folder(folder) == folder
    checkpoints = [Checkpoint(path, "bert") for path in (base_folder, folder)]
    # transformers would load the adapter a second time, so the architecture is read from the base's configuration.
    config = tmp_path / "architecture"
    config.mkdir()
    shutil.copy(folder / "config.json", config)
    source = ExpertTaskVectors(checkpoints[0], {"a": checkpoints[1]}, Architecture.of_folder(config))
    assert source.factors("a", named(source, QUERY)) is not None


def test_an_expert_without_adapter(base_folder, expert_folders):
    source = task_vectors(str(base_folder), {"a": str(expert_folders["first"])})
    assert not any(source.factors("a", parameter) for parameter in source.parameters)
    lacking = list(Evidence().lacking({Need.LOW_RANK}, source))
    folder = expert_folders["first"]
    assert lacking == [
        f"task 'a' has no low-rank adapters: {folder} holds no adapter (looked for adapter/adapter_config.json)"
    ]
    assert adapter_folder(folder) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "the setting use_dora: DoRA rescales the updated weight"),
        ({"init_lora_weights": "pissa"}, "initialised with pissa, which changes the base's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "initialised with olora"),
        ({"peft_type": "LOHA"}, "of kind LOHA, and only LORA has low-rank factors"),
        ({"peft_type": "ADALORA"}, "of kind ADALORA"),
        ({"peft_type": "OFT"}, "of kind OFT"),
        ({"init_lora_weights": "corda"}, "initialised with corda"),
        ({"init_lora_weights": "loftq"}, "initialised with loftq"),
        ({"alora_invocation_tokens": [3]}, "some tokens only"),
        ({"target_parameters": ["query.weight"]}, "parameters are adapted instead of layers"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layers of the base are repeated"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {"beta": 1.0}}, "KaSA"),
        ({"monteclora_config": {"num_samples": 1}}, "MonteCLoRA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
    ],
)
def test_adapters_that_are_no_product_of_two_factors(base_folder, tmp_path, settings, reason):
    trained = {key: value for key, value in settings.items() if key == "use_dora" or value in ("pissa", "olora")}
    folder = write(adapted(base_folder, lora(target_modules=["query"], **trained)), tmp_path / "expert")
    edit(folder, **settings)
    source = task_vectors(str(base_folder), {"a": str(folder)})
    assert reason in source.without_factors("a")
    assert next(iter(Evidence().lacking({Need.LOW_RANK}, source))).startswith("task 'a' has no low-rank adapters: its")
    parameter = named(source, QUERY)
    assert source.factors("a", parameter) is None
    assert np.array_equal(source.vector("a", parameter).numpy(), stored_difference(source, parameter))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (IA3Config(task_type=TaskType.SEQ_CLS, target_modules=["value"], feedforward_modules=[]), "IA3"),
        (VeraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["value"]), "VERA"),
    ],
)
def test_other_kinds_as_peft_writes_them(make_source, config, kind):
    source = make_source(config)
    assert f"of kind {kind}" in source.without_factors("a")
    assert source.vector("a", named(source, VALUE)).any()


def test_tensors_of_which_nothing_is_known(base_folder, tmp_path):
    folder = write(adapted(base_folder, lora(target_modules=["query"])), tmp_path / "expert")
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.bert.{QUERY}.lora_diag": torch.ones(3)}, file)
    source = task_vectors(str(base_folder), {"a": str(folder)})
    assert source.without_factors("a") == f"its adapter holds bert.{QUERY}.lora_diag, of which nothing is known here"


def test_an_adapter_of_tables_alone(make_source):
    source = make_source(lora(target_modules=["word_embeddings"]))
    assert source.without_factors("a") == "its adapter has no low-rank factors of any layer"


def test_an_adapter_of_the_head_alone(make_source):
    source = make_source(LoraConfig(r=2, target_modules=["classifier"]))
    assert source.without_factors("a") == "its adapter is for no layer that the experts share with the base"


def test_half_precision_agrees_to_within_its_rounding(make_source):
    source = make_source(lora(target_modules=["query"]), dtype=torch.bfloat16)
    parameter = named(source, QUERY)
    assert np.abs(product(source.factors("a", parameter)) - stored_difference(source, parameter)).max() > 1e-5


def replaced(folder, change):
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def refused(base_folder, folder, message):
    with pytest.raises(PaveError, match=re.escape(message)):
        task_vectors(str(base_folder), {"a": str(folder)})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_adapter_of_another_run_is_refused(base_folder, tmp_path, dtype):
    folder = write(adapted(base_folder, lora(target_modules=["query"])), tmp_path / "one", dtype)
    other = write(adapted(base_folder, lora(target_modules=["query"]), seed=1), tmp_path / "other", dtype)
    shutil.rmtree(folder / "adapter")
    shutil.copytree(other / "adapter", folder / "adapter")
    refused(
        base_folder,
        folder,
        f"task 'a': {folder / 'adapter'} is not the adapter of these weights: base plus B A is not what {folder} "
        f"holds of {QUERY}.weight",
    )


def test_another_scaling_is_another_adapter(base_folder, tmp_path):
    folder = write(adapted(base_folder, lora(target_modules=["query"])), tmp_path / "expert")
    edit(folder, lora_alpha=7)
    refused(base_folder, folder, "is not the adapter of these weights")


def test_the_weights_of_a_layer_that_the_base_has_not(base_folder, tmp_path):
    folder = write(adapted(base_folder, lora(target_modules=["query"])), tmp_path / "expert")
    replaced(folder, lambda named: {name.replace("layer.1", "layer.7"): value for name, value in named.items()})
    layer = QUERY.replace("0", "7")
    refused(base_folder, folder, f"the adapter has a layer {layer}, which the base has not")


def test_factors_of_another_width(base_folder, tmp_path):
    folder = write(adapted(base_folder, lora(target_modules=["query"])), tmp_path / "expert")
    replaced(folder, lambda named: {n: v[:, :30].contiguous() if "lora_A" in n else v for n, v in named.items()})
    refused(base_folder, folder, f"the adapter of {QUERY} is for a weight of [32, 30], but {QUERY}.weight is [32, 32]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: {n: v for n, v in named.items() if "lora_A" not in n}, "has only one of its two factors"),
        (lambda named: {n: v[:2].contiguous() if "lora_A" in n else v for n, v in named.items()}, "gives them rank 3"),
        (lambda named: {n: v * float("nan") for n, v in named.items()}, f"the adapter of {QUERY} holds NaN"),
    ],
)
def test_broken_factors(base_folder, tmp_path, change, message):
    folder = write(adapted(base_folder, lora(target_modules=["query"])), tmp_path / "expert")
    replaced(folder, change)
    refused(base_folder, folder, message)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", b"{", "adapter_config.json cannot be read"),
        ("adapter_config.json", b"[]", "adapter_config.json holds a list, expected an object"),
        ("adapter_model.safetensors", b"no", "is truncated or no safetensors file"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors; save the adapter again"),
    ],
)
def test_broken_files(tmp_path, file, content, message):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.bert.x.lora_A.weight": torch.ones(8, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(PaveError, match=message):
        Adapter(tmp_path, "bert")


def test_purified_and_other_sources_have_no_factors():
    from pave_lightning.weights import Parameter, ParameterKind, TaskVectors

    class Plain(TaskVectors):
        tasks = ("a",)
        parameter = Parameter("w", ParameterKind.LINEAR, (2, 2), 1)
        parameters = (parameter,)

        def base(self, parameter, rows=None):
            return torch.ones(2, 2)

        def expert(self, task, parameter, rows=None):
            return torch.full((2, 2), 3.0)

    source = Plain()
    assert source.factors("a", source.parameter) is None
    assert source.scaling("a", source.parameter) == 1.0
    assert source.without_factors("a") == "these task vectors are no products of adapters"
    base, vectors = source.read(source.parameter)
    assert base.tolist() == [[1, 1], [1, 1]]
    assert vectors["a"].tolist() == [[2, 2], [2, 2]]
