"""Adapters as experts of the public task vectors: what peft merges, kind by kind, and what is refused."""

import gc
import json
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    DeloraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    RandLoraConfig,
    TaskType,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from pave_lightning import merge, task_vectors
from pave_lightning.errors import PaveError
from pave_lightning.weights.adapter_models import adapter_problems

QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def save(tmp_path):
    """As a user of peft would: noise on all that is trained, saved; gives the folder and peft's dense weights."""

    def run(base, config, name="adapter", kind=AutoModelForSequenceClassification, seed=1, edit=None):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            adapted = get_peft_model(kind.from_pretrained(base), config)
            if edit is not None:
                edit(adapted)
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / name)
        fresh = kind.from_pretrained(base)
        return tmp_path / name, PeftModel.from_pretrained(fresh, tmp_path / name).merge_and_unload().state_dict()

    return run


def lora(**options):
    return LoraConfig(task_type=TaskType.SEQ_CLS, **{"r": 3, "lora_alpha": 6, "target_modules": ["query"], **options})


def other(kind, **options):
    return kind(task_type=TaskType.SEQ_CLS, **{"target_modules": ["query", "value"], **options})


def is_dense(source, dense, prefix=""):
    """Whether experts are exactly peft's dense weights, and task vectors these minus the base to 1e-6."""
    moved = []
    for parameter in source.parameters:
        expected = dense[prefix + parameter.name]
        assert torch.equal(source.expert("a", parameter), expected), parameter.name
        difference = expected - source.base(parameter)
        torch.testing.assert_close(source.vector("a", parameter), difference, rtol=0, atol=1e-6)
        if difference.any():
            moved.append(parameter.name)
    return moved


KINDS = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "patterns": lora(rank_pattern={"layer.1.*query": 5}, alpha_pattern={"layer.0.*query": 9}),
    "modules_to_save": lora(modules_to_save=["classifier", "LayerNorm"]),
    "biases": lora(bias="all"),
    "embeddings": lora(target_modules=["word_embeddings"]),
    "tokens": lora(trainable_token_indices=[3, 9]),
    "ia3": other(IA3Config, feedforward_modules=[]),
    "adalora": other(AdaLoraConfig, init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1),
    "vera": other(VeraConfig, r=4),
    "vera without projections": other(VeraConfig, r=4, save_projection=False),
    "loha": other(LoHaConfig),
    "lokr": other(LoKrConfig),
    "oft": other(OFTConfig, r=0, oft_block_size=4),
    "boft": other(BOFTConfig, boft_block_size=4),
    "hra": other(HRAConfig),
    "norms": other(LNTuningConfig, target_modules=["LayerNorm"]),
    "delora": other(DeloraConfig),
    "miss": other(MissConfig, r=4),
    "randlora": other(RandLoraConfig, r=4),
    "fourier": other(FourierFTConfig, n_frequency=20),
    "vblora": other(VBLoRAConfig, num_vectors=4, vector_length=8, topk=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_the_dense_weights_of_peft(base_folder, save, kind):
    folder, dense = save(base_folder, KINDS[kind])
    assert adapter_problems(folder) == []
    source = task_vectors(str(base_folder), {"a": str(folder)})
    assert is_dense(source, dense, "bert.")
    assert source.tasks == ("a",)
    low_rank = kind in ("plain", "rslora", "patterns", "modules_to_save", "biases", "tokens")
    assert (source.without_factors("a") is None) is low_rank


def test_ranks_that_adalora_has_pruned(base_folder, save):
    def prune(adapted):
        kept = {
            name.removeprefix("model.").removesuffix(".lora_E.default"): [True, False, True, index % 2 == 0]
            for index, name in enumerate(n for n, _ in adapted.base_model.named_parameters() if "lora_E" in n)
        }
        adapted.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in kept.items()}

    folder, dense = save(base_folder, KINDS["adalora"], edit=prune)
    shapes = {len(value) for name, value in load_file(folder / "adapter_model.safetensors").items() if "lora_E" in name}
    assert shapes == {2, 3}
    assert is_dense(task_vectors(str(base_folder), {"a": str(folder)}), dense, "bert.")


def test_the_base_is_named_by_the_adapters(base_folder, make_base, save):
    first, dense = save(base_folder, lora(), "first")
    second, _ = save(base_folder, lora(), "second", seed=2)
    source = task_vectors(experts={"a": str(first), "b": str(second)})
    is_dense(source, dense, "bert.")
    merged = merge("task_arithmetic", source)
    parameter = next(one for one in source.parameters if one.name == QUERY)
    torch.testing.assert_close(
        merged.vectors[QUERY], source.vector("a", parameter) + source.vector("b", parameter), rtol=0, atol=1e-6
    )
    foreign, _ = save(make_base(seed=9), lora(), "foreign")
    with pytest.raises(PaveError, match="the experts name different bases"):
        task_vectors(experts={"a": str(first), "b": str(foreign)})
    with pytest.raises(PaveError, match=r"weights are not those of the base .*; name the adapter's own base"):
        task_vectors(str(base_folder), {"a": str(foreign)})
    assert task_vectors(str(base_folder), {"a": str(foreign)}, accept=["base"]).parameters


def test_without_a_base_and_without_adapters(expert_folders):
    with pytest.raises(PaveError, match="no expert says what its base is"):
        task_vectors(experts={"a": str(expert_folders["first"])})
    with pytest.raises(PaveError, match="no experts are given"):
        task_vectors(experts={})


def test_adapters_beside_whole_models(base_folder, expert_folders, save):
    folder, dense = save(base_folder, lora())
    experts = {"whole": str(expert_folders["first"]), "a": str(folder)}
    source = task_vectors(str(base_folder), experts)
    is_dense(source, dense, "bert.")
    plain = task_vectors(str(base_folder), {"whole": experts["whole"]})
    for parameter in plain.parameters:
        assert torch.equal(source.vector("whole", parameter), plain.vector("whole", parameter))


def test_nothing_is_left_behind(base_folder, save):
    source = task_vectors(str(base_folder), {"a": str(save(base_folder, lora())[0])})
    place = source.checkpoint("a").folder
    assert place.is_dir()
    del source
    gc.collect()
    assert not place.exists()


def test_bare_backbones_whole_bases_and_adapters_of_either(tmp_path, base_folder, save):
    folder, dense = save(base_folder, LoraConfig(r=2, target_modules=["query"]), kind=AutoModel)
    assert is_dense(task_vectors(str(base_folder), {"a": str(folder)}), dense)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path / "whole")
    folder, dense = save(tmp_path / "whole", lora(), "of-classifier")
    assert is_dense(task_vectors(str(tmp_path / "whole"), {"a": str(folder)}), dense, "bert.")
    folder, dense = save(tmp_path / "whole", LoraConfig(r=2, target_modules=["query"]), "of-backbone", AutoModel)
    assert is_dense(task_vectors(str(tmp_path / "whole"), {"a": str(folder)}), dense)


def test_language_models(tmp_path, save):
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    options = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", modules_to_save=["embed_tokens"])
    folder, dense = save(tmp_path / "base", options, kind=AutoModelForCausalLM)
    moved = is_dense(task_vectors(experts={"a": str(folder)}), dense)
    assert "model.embed_tokens.weight" in moved


def test_experts_of_a_mixture_are_parameters_and_no_modules(tmp_path, save):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    options = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    folder, dense = save(tmp_path / "base", options, kind=AutoModelForCausalLM)
    source = task_vectors(str(tmp_path / "base"), {"a": str(folder)})
    assert "parameters are adapted instead of layers" in source.without_factors("a")
    model = AutoModelForCausalLM.from_pretrained(source.checkpoint("a").folder).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    for name, value in dense.items():
        assert torch.equal(model[name], value), name
    assert not torch.equal(base["model.layers.0.mlp.experts.down_proj"], dense["model.layers.0.mlp.experts.down_proj"])


def test_named_adapters_in_folders_of_their_own(base_folder, tmp_path, save):
    folder, dense = save(base_folder, lora(), "several/first")
    several = folder.parent
    assert is_dense(task_vectors(str(base_folder), {"a": str(several)}), dense, "bert.")
    save(base_folder, lora(), "several/second", seed=2)
    with pytest.raises(PaveError, match=r"expert of 'a': .*several holds several adapters; name one of first, second"):
        task_vectors(str(base_folder), {"a": str(several)})
    assert is_dense(task_vectors(str(base_folder), {"a": str(several / "first")}), dense, "bert.")


def note(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "is of kind PROMPT_TUNING, which adds to a model's inputs or states"),
        ({"peft_type": "PREFIX_TUNING"}, "changes no weights, so there is nothing to merge"),
        ({"peft_type": "P_TUNING"}, "changes no weights, so there is nothing to merge"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "changes no weights, so there is nothing to merge"),
        ({"peft_type": "ADAPTION_PROMPT"}, "changes no weights, so there is nothing to merge"),
        ({"peft_type": "LOORA"}, "a kind that the installed peft does not know (LOORA; did you mean 'LORA'?)"),
        ({"peft_type": None}, "its peft_type says none"),
        ({"init_lora_weights": "pissa_niter_4"}, "was initialised with pissa_niter_4, which took a part of the base"),
        ({"init_lora_weights": "corda"}, "save it once more with path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 1]]}, "layers of the base are repeated"),
    ],
)
def test_what_gives_no_dense_weights_is_refused_by_name(base_folder, save, settings, told):
    folder, _ = save(base_folder, lora())
    note(folder, **settings)
    (problem,) = adapter_problems(folder)
    assert told in problem
    with pytest.raises(PaveError, match="expert of 'a'"):
        task_vectors(str(base_folder), {"a": str(folder)})


def test_what_does_not_fit_is_refused(base_folder, make_base, save):
    folder, _ = save(base_folder, lora())
    wider = make_base(hidden_size=48)
    with pytest.raises(PaveError, match="does not fit the base"):
        task_vectors(str(wider), {"a": str(folder)}, accept=["base"])
    file = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    save_file({**tensors, name.replace("layer.0", "layer.7"): tensors[name].clone()}, file)
    with pytest.raises(PaveError, match=r"it has no bert\.encoder\.layer\.7"):
        task_vectors(str(base_folder), {"a": str(folder)})
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(PaveError, match=r"the adapter lacks bert\.encoder\.layer\.0"):
        task_vectors(str(base_folder), {"a": str(folder)})
