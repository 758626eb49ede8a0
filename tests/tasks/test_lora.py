"""Which modules options of adapters mean; the reference is what peft makes of the same options."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from pave_lightning.experts.new_adapters import add_adapters
from pave_lightning.tasks.lora import adapter_ranks, saved_modules, trained_values
from pave_lightning.tasks.options import Lora
from pave_lightning.weights import Architecture

OPTIONS = [
    {},
    {"target_modules": ["query"]},
    {"target_modules": ["query", "word_embeddings", "output.dense"]},
    {"target_modules": ["encoder.layer.1.attention.self.key"]},
    {"layers_to_transform": [1]},
    {"target_modules": ["query", "output.dense"], "layers_to_transform": [1]},
    {"exclude_modules": ["dense", "key"]},
    {"rank_pattern": {"query": 2, r"layer\.1\..*": 4}},
    {"rank_pattern": {"self": 2, "attention.self.value": 5}},
    {"modules_to_save": ["intermediate.dense", "LayerNorm"]},
    {"modules_to_save": ["attention"], "bias": "all"},
    {"bias": "lora_only", "target_modules": ["query"]},
    {"trainable_token_indices": [3, 9], "target_modules": ["value"]},
]


def ranks_in(model):
    return {
        name.removeprefix("base_model.model.bert."): module.r["default"]
        for name, module in model.named_modules()
        if getattr(module, "r", None)
    }


@pytest.mark.parametrize("frozen", [[], ["embeddings", "encoder.layer.0"]])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_what_is_adapted_and_trained_is_what_peft_makes_of_it(base_folder, options, frozen):
    lora = Lora.model_validate({"rank": 3, **options})
    architecture = Architecture.of_folder(base_folder, "AutoModelForSequenceClassification")
    model = AutoModelForSequenceClassification.from_pretrained(base_folder)
    whole = ["classifier", *options.get("modules_to_save", ())]
    linear = ["query", "key", "value", "dense"]  # peft takes no all-linear beside numbers of layers
    settings = {
        "target_modules": linear,
        **{key: value for key, value in options.items() if key not in ("rank", "modules_to_save", "exclude_modules")},
        "exclude_modules": [
            *options.get("exclude_modules", ()),
            *(name for name, _ in model.named_modules() if any(f"bert.{one}." in f"{name}." for one in frozen)),
        ],
    }
    for name in frozen:
        model.bert.get_submodule(name).requires_grad_(False)
    wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=3, modules_to_save=whole, **settings))
    ours = add_adapters(
        AutoModelForSequenceClassification.from_pretrained(base_folder), lora, "SEQ_CLS", frozen=frozen, private=()
    )
    assert ranks_in(ours) == ranks_in(wrapped)
    found = ranks_in(wrapped)
    parameters = list(architecture.parameters.values())
    assert adapter_ranks(lora, parameters, "bert", frozen) == found
    assert found
    names = saved_modules(lora, parameters)
    inner = ours.get_base_model().bert
    of_backbone = {name: value for name, value in inner.named_parameters() if value.requires_grad}
    whole = {name.split(".modules_to_save.")[0] for name in of_backbone if ".modules_to_save." in name}
    assert whole <= set(names)
    assert bool(names) == bool(options.get("modules_to_save"))
    if not (frozen and options.get("trainable_token_indices")):  # which a plan refuses
        trained = sum(value.numel() for value in of_backbone.values())
        assert trained_values(lora, parameters, "bert", frozen) == trained


def test_a_parameter_that_is_no_module_has_no_rank():
    lora = Lora(target_modules=[], target_parameters=["experts.gate_up_proj"])
    assert adapter_ranks(lora, [], "model") == {}


def test_layers_of_another_kind_are_not_all_linear(base_folder):
    parameters = Architecture.of_folder(base_folder, "AutoModelForSequenceClassification").parameters.values()
    assert not any("embeddings" in name for name in adapter_ranks(Lora(), parameters, "bert"))
