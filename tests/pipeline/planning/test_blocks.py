"""Whether a model can be walked through block by block is found before anything runs, on a small copy of it."""

import json

import pandas as pd
import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    BloomConfig,
    DebertaV2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    NystromformerConfig,
    Phi3Config,
    Qwen3Config,
    T5Config,
)

from pave_lightning import Recipe, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.planning.blocks import LARGEST_COPY, block_problem, naming_problems, smaller
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.weights.empty_models import empty_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
WALKING = [
    "average",
    {"method": "featcal", "anchor": "average", "options": {"examples": 12}},
    {"method": "regmean_plus_plus", "options": {"examples": 12}},
    {"method": "distillation", "anchor": "average", "options": {"examples": 12, "epochs": 1}},
]

CLASSIFIER = "AutoModelForSequenceClassification"


def size(folder):
    return sum(parameter.numel() for parameter in empty_model(folder, CLASSIFIER).parameters())


@pytest.fixture
def settings_of(recipe_settings, tiny_tokenizer, tmp_path):
    """The tiny recipe on a base of a given configuration."""

    def build(config, **changes):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        return {**recipe_settings, "base": str(tmp_path / "base"), **changes}

    return build


def test_what_run_refuses_plan_has_refused(settings_of, tiny_tokenizer, tmp_path):
    config = AlbertConfig(**SIZES, vocab_size=len(tiny_tokenizer), embedding_size=16)
    settings = settings_of(config, merge=WALKING)
    with pytest.raises(PaveError) as told:
        check_recipe(Recipe.model_validate(settings), RunFolder(tmp_path / "checked"))
    lines = [line for line in str(told.value).splitlines() if "block" in line]
    reason = "AlbertModel cannot be calibrated block by block: it does not run each block"
    assert [line.strip().split(reason)[0] for line in lines] == [
        "- merge step 'featcal': ",
        "- merge step 'regmean_plus_plus': ",
    ]
    # Distillation runs the whole model, whatever it does inside.
    settings["merge"] = ["average", WALKING[3]]
    check_recipe(Recipe.model_validate(settings), RunFolder(tmp_path / "checked"))


def test_an_encoder_beside_a_decoder_is_refused_as_such(tmp_path):
    T5Config().save_pretrained(tmp_path)
    assert block_problem(tmp_path, CLASSIFIER) == (
        "T5Model cannot be calibrated block by block: it has an encoder beside a decoder, which is more than one stack "
        "of blocks; choose a method that does not work block by block"
    )


def test_a_model_that_cannot_be_tried_is_refused(tmp_path):
    """Its segments do not divide the lengths of our examples: neither would those of a task."""
    NystromformerConfig(**SIZES, num_landmarks=4, segment_means_seq_len=16).save_pretrained(tmp_path)
    assert "NystromformerModel cannot be calibrated block by block: a small copy" in block_problem(tmp_path, CLASSIFIER)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8),
        pytest.param(BloomConfig(hidden_size=4096, n_layer=30, n_head=32), marks=pytest.mark.slow),
        pytest.param(Gemma2Config(), marks=pytest.mark.slow),
        pytest.param(Gemma3Config(), marks=pytest.mark.slow),
        pytest.param(GPT2Config(n_embd=1600, n_layer=48, n_head=25), marks=pytest.mark.slow),
        pytest.param(Phi3Config(), marks=pytest.mark.slow),
        pytest.param(DebertaV2Config(relative_attention=True, share_att_key=True), marks=pytest.mark.slow),
    ],
    ids=lambda config: config.model_type,
)
def test_large_models_are_tried_as_small_ones(config, tmp_path):
    """7,000 million parameters are not made; what is made is some million."""
    config.save_pretrained(tmp_path)
    whole = sum(
        parameter.numel() for parameter in empty_model(tmp_path, "AutoModelForSequenceClassification").parameters()
    )
    (tmp_path / "config.json").write_text(type(config).from_dict(next(smaller(config))).to_json_string())
    assert sum(
        parameter.numel() for parameter in empty_model(tmp_path, "AutoModelForSequenceClassification").parameters()
    ) < min(1e7, whole / 100)
    assert LARGEST_COPY < 1e8
    config.save_pretrained(tmp_path)
    assert block_problem(tmp_path, CLASSIFIER) is None


def test_a_small_copy_keeps_heads_and_the_pattern_of_layers():
    config = Gemma3TextConfig()
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (26, 8, 256)
    small, shallow, whole = smaller(config)
    assert small["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    assert (small["num_hidden_layers"], small["num_attention_heads"], small["num_key_value_heads"]) == (6, 2, 1)
    assert small["head_dim"] == 256
    assert (shallow["num_hidden_layers"], shallow["hidden_size"]) == (6, config.hidden_size)
    assert (whole["num_hidden_layers"], whole["layer_types"]) == (26, config.layer_types)
    assert small["vocab_size"] == whole["vocab_size"] == 256
    assert max(whole[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")) < 256


def test_a_small_copy_has_no_more_than_the_model():
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "vocab_size": 40, "num_key_value_heads": 1})
    for values in smaller(config):
        assert values == json.loads(config.to_json_string(use_diff=False))


def test_names_that_the_model_does_not_know_are_told_of_steps_that_run_it(recipe_settings, base_folder):
    recipe = Recipe.model_validate({**recipe_settings, "merge": ["average", "tatr"]})
    (line,) = naming_problems(recipe, base_folder, ["embeddings.LayerNorm.gamma"])
    assert line.startswith(
        "merge step 'tatr': BertModel knows 1 weights by other names than checkpoints do, such as emb"
    )
    assert not list(naming_problems(recipe, base_folder, ["embeddings.LayerNorm.weight"]))
    plain = Recipe.model_validate({**recipe_settings, "merge": ["average"]})
    assert not list(naming_problems(plain, base_folder, ["embeddings.LayerNorm.gamma"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16, vocab_size=64),
        ModernBertConfig(**SIZES, global_attn_every_n_layers=2, local_attention=6, vocab_size=64),
        Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=16, sliding_window=4, vocab_size=64),
        T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_methods_that_run_models_work_on_the_family(config, settings_of, tiny_tokenizer):
    config.vocab_size, config.eos_token_id = max(64, len(tiny_tokenizer)), tiny_tokenizer.sep_token_id
    walking = [WALKING[0], WALKING[3]] if config.model_type == "t5" else WALKING
    settings = settings_of(
        config,
        trainer={"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        capture={"examples": 12, "moments": "input", "norms": True},
        merge=[*walking, "fisher", "tatr", "regmean", "lot", {"method": "ties", "vectors": ["purified"]}],
    )
    folder = run_recipe(Recipe.model_validate(settings))
    found = pd.read_csv(folder / "results.csv")
    assert set(found["model"]) >= {step if isinstance(step, str) else step["method"] for step in settings["merge"]}
    assert found["average"].notna().all()
    for place in (folder / "merged").iterdir():
        merged = AutoModel.from_pretrained(place)
        assert all(bool(parameter.isfinite().all()) for parameter in merged.parameters())
