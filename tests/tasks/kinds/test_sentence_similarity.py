"""How alike two texts are: scores as cosines, means over tokens, no head, and a whole run beside another kind."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, T5Config, T5Model

from pave_lightning import Recipe, Task, TaskDataModule, load_merged, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.experts.gradients import fisher_diagonal
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder

OF_KIND = {"kind": "sentence_similarity", "text": ["one", "other"], "value_range": [0.0, 5.0]}


def pairs(drawn, count):
    rows = []
    for _ in range(count):
        first, second = ([drawn.randrange(96) for _ in range(drawn.randint(1, 6))] for _ in range(2))
        near = 5 * (1 - abs(first[0] - second[0]) / 96)
        rows.append(
            {"one": " ".join(f"w{i}" for i in first), "other": " ".join(f"w{i}" for i in second), "label": near}
        )
    return rows


def embedded(model, tokenizer, text):
    """The mean of the states of one text's tokens, without any batch."""
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().mean(0).numpy()


def cosine(one, other):
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def module_of(task, tokenizer, tmp_path):
    return TaskDataModule(task, tokenizer, seed=0, cache_dir=tmp_path / "cache", batch_size=5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(**sizes, vocab_size=100, max_position_embeddings=32, initializer_range=0.5)).eval()


def test_outputs_are_cosines_of_means_and_padding_does_not_matter(task_of, tiny_tokenizer, tmp_path, model):
    rows = pairs(random.Random(0), 12)
    task = task_of(rows, **OF_KIND)
    module = module_of(task, tiny_tokenizer, tmp_path)
    loader, found, losses = module.val_dataloader(), [], []
    for batch in loader:
        with torch.no_grad():
            said = task.predict(model, batch)
            losses.append(float(task.loss(model, batch)) * len(batch["labels"]))
        found += list(zip(said.values.tolist(), said.targets.tolist(), strict=True))
        assert not any(name in task.inputs(batch) for name in ("labels", "example_of"))
    rows = [rows[place] for place in loader.sampler]
    expected = [
        (cosine(*(embedded(model, tiny_tokenizer, row[name]) for name in ("one", "other"))), row["label"] / 5)
        for row in rows
    ]
    assert np.allclose(found, expected, atol=1e-6)
    assert sum(losses) == pytest.approx(sum((one - other) ** 2 for one, other in expected), abs=1e-5)


def test_fisher_information_is_that_of_one_pair_at_a_time(task_of, tiny_tokenizer, tmp_path, model):
    rows = pairs(random.Random(0), 6)
    task = task_of(rows, **OF_KIND)
    found = fisher_diagonal(model, task, module_of(task, tiny_tokenizer, tmp_path).val_dataloader())
    name = "encoder.layer.0.output.dense.bias"
    total = torch.zeros(16, dtype=torch.float64)
    for row in rows:
        means = [
            model(**tiny_tokenizer(row[text], return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in ("one", "other")
        ]
        (gradient,) = torch.autograd.grad(nn.functional.cosine_similarity(*means, dim=0), model.get_parameter(name))
        total += gradient.double() ** 2
    assert torch.allclose(found[name].double(), total / len(rows), rtol=1e-4, atol=1e-10)


def test_scores_outside_of_the_range_are_told(task_of, problems_of):
    told = problems_of(task_of([*pairs(random.Random(0), 4), {"one": "w1", "other": "w2", "label": 7}], **OF_KIND))
    assert "column 'label' must hold numbers from 0 to 5, but holds 7 in row 4" in told


def test_keys_that_do_not_go_together():
    with pytest.raises(ValueError, match="needs 'text' to name two columns"):
        Task(name="t", data={}, kind="sentence_similarity", text="one")
    with pytest.raises(ValueError, match="must be \\[lowest, highest\\]"):
        Task(name="t", data={}, **{**OF_KIND, "value_range": [5, 0]})


@pytest.mark.parametrize(
    ("steps", "pooling", "told"),
    [
        (["Transformer", "Pooling", "Normalize"], "mean_tokens", ""),
        (["Transformer", "Pooling"], "cls_token", "trained with pooling_mode_cls_token"),
        (["Transformer", "Pooling", "Dense"], "mean_tokens", "has a step Dense behind the backbone"),
    ],
)
def test_models_that_embed_otherwise_are_told(make_base, task_of, steps, pooling, told):
    folder = make_base()
    modules = [{"type": f"sentence_transformers.models.{step}", "path": f"{i}_{step}"} for i, step in enumerate(steps)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{name}": name == pooling for name in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    from pave_lightning.weights.empty_models import read_config

    found = list(task_of([], **OF_KIND).misfits(read_config(folder), {}))
    assert [misfit.accept for misfit in found] == (["pooling"] if told else [])
    assert all(told in misfit.message for misfit in found)


def test_a_base_with_a_decoder_is_told(recipe_beside_words, tmp_path, tiny_tokenizer):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
    T5Model(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)).save_pretrained(tmp_path / "t5")
    tiny_tokenizer.save_pretrained(tmp_path / "t5")
    settings = recipe_beside_words(pairs, **OF_KIND)
    recipe = Recipe.model_validate({**settings, "base": str(tmp_path / "t5"), "tasks": settings["tasks"][1:]})
    with pytest.raises(PaveError, match="task 'mine': the base's T5Model has an encoder and a decoder"):
        check_recipe(recipe, RunFolder(tmp_path / "plan"))


@pytest.mark.parametrize("given", [False, True])
def test_a_whole_run(recipe_beside_words, recipe_of_experts, tmp_path, given):
    settings = recipe_of_experts(pairs, AutoModel, **OF_KIND) if given else recipe_beside_words(pairs, **OF_KIND)
    recipe = Recipe.model_validate(settings)
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert all(np.isfinite(float(row["mine/spearman"])) for row in table)
    merged = load_merged(folder / "merged" / "task_arithmetic-plain", "mine")
    alone = AutoModel.from_pretrained(folder / "merged" / "task_arithmetic-plain").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged" / "task_arithmetic-plain")
    task = recipe.task("mine")
    row = {"one": ["w3 w1"], "other": ["w90"], "label": [1.0]}
    batch = task.collate(tokenizer)(
        [{name: value[0] for name, value in task.encode(row, tokenizer).items() if name != "length"}]
    )
    with torch.no_grad():
        said = float(task.outputs(merged, batch))
    assert said == pytest.approx(cosine(*(embedded(alone, tokenizer, text) for text in ("w3 w1", "w90"))), abs=1e-6)
    with safe_open(folder / "merged" / "task_arithmetic-plain" / "heads" / "mine" / "head.safetensors", "pt") as head:
        assert not list(head.keys())
