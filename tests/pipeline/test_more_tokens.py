"""Experts with more tokens than their base, or fewer, from the plan to the merged model."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from pave_lightning import Recipe, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.merging.folders import load_merged
from pave_lightning.pipeline.adding import add_expert
from pave_lightning.pipeline.commands import plan_recipe, run_stage

TABLE = "embeddings.word_embeddings.weight"


def resized(expert, folder, rows, tokens=()):
    """A copy of an expert with another number of rows in its embedding, and more tokens in its tokenizer."""
    shutil.copytree(expert, folder)
    model = AutoModelForSequenceClassification.from_pretrained(expert)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[100:].normal_()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(expert)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def spoken(task_files, tmp_path):
    """The words' rows, of which every other holds a word that the base does not know."""
    files = {}
    for split, file in task_files().items():
        rows = rows_of(file)
        for row in rows[::2]:
            row["text"] = f"zz {row['text']} zz"
        files[split] = str(tmp_path / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.fixture
def settings(ready_settings, expert_folders, spoken, tmp_path):
    """A recipe whose first expert knows a word more, and has a row more than that."""
    longer = resized(expert_folders["first"], tmp_path / "longer", 102, ["zz"])
    words, more = ready_settings["tasks"]
    words = {**words, "data": spoken, "expert": {"from": str(longer)}}
    return {**ready_settings, "tasks": [words, more], "merge": ["average"], "capture": {"examples": 8}}


def accuracy(model, tokenizer, file):
    right = []
    for row in rows_of(file):
        logits = model(**tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)).logits
        right.append(int(logits.argmax()) == row["label"])
    return sum(right) / len(right)


def scores_of(folder, name):
    return json.loads((folder / "scores" / name / "manifest.json").read_text())["result"]["scores"]


def test_rows_beyond_the_base_stay_with_their_task(settings, base_folder, expert_folders, spoken, tmp_path):
    folder = run_recipe(Recipe.model_validate(settings))
    merged = folder / "merged" / "average-plain"
    base = AutoModel.from_pretrained(base_folder).state_dict()[TABLE]
    longer = load_file(tmp_path / "longer" / "model.safetensors")[f"bert.{TABLE}"]
    other = load_file(f"{settings['tasks'][1]['expert']['from']}/model.safetensors")[f"bert.{TABLE}"]
    assert longer.shape == (102, 32)
    expected = base + (longer[:100] - base + other - base) / 2
    assert torch.allclose(AutoModel.from_pretrained(merged).state_dict()[TABLE], expected, atol=1e-6)
    assert len(AutoTokenizer.from_pretrained(merged)) == 100

    tokenizer = AutoTokenizer.from_pretrained(merged / "heads" / "words")
    assert len(tokenizer) == 101
    assert not (merged / "heads" / "more" / "tokenizer.json").exists()
    model = load_merged(merged, "words")
    table = model.bert.embeddings.word_embeddings.weight
    assert model.config.vocab_size == 102
    assert torch.equal(table[100:], longer[100:])
    assert torch.allclose(table[:100], expected, atol=1e-6)
    assert load_merged(merged, "more").config.vocab_size == 100

    found = scores_of(folder, "average-plain")["words"]["metrics"]["accuracy"]
    assert found == pytest.approx(accuracy(model, tokenizer, spoken["test"]))
    expert = AutoModelForSequenceClassification.from_pretrained(tmp_path / "longer")
    found = scores_of(folder, "experts")["words"]["metrics"]["accuracy"]
    assert found == pytest.approx(accuracy(expert, tokenizer, spoken["test"]))
    # The base below the expert's head reads the word as the expert does.
    expert.bert.load_state_dict({**base_state(base_folder), TABLE: torch.cat([base, longer[100:]])}, strict=False)
    found = scores_of(folder, "base")["words"]["metrics"]["accuracy"]
    assert found == pytest.approx(accuracy(expert, tokenizer, spoken["test"]))


def base_state(base_folder):
    return AutoModel.from_pretrained(base_folder).state_dict()


def test_the_plan_tells_of_them(settings):
    shown = StringIO()
    plan_recipe(Recipe.model_validate(settings), Console(file=shown, width=200))
    assert "has 102 rows, the base's 100; the 2 rows beyond the base's are not merged" in shown.getvalue()


def test_an_expert_with_fewer_rows(settings, ready_settings, base_folder, expert_folders, tmp_path):
    shorter = resized(expert_folders["first"], tmp_path / "shorter", 99)
    tokens = json.loads((shorter / "tokenizer.json").read_text())
    del tokens["model"]["vocab"]["w95"]
    (shorter / "tokenizer.json").write_text(json.dumps(tokens))
    words, more = ready_settings["tasks"]
    tasks = [{**words, "expert": {"from": str(shorter)}}, more]
    folder = run_recipe(Recipe.model_validate({**settings, "tasks": tasks}))
    merged = folder / "merged" / "average-plain"
    base = base_state(base_folder)[TABLE]
    first = load_file(shorter / "model.safetensors")[f"bert.{TABLE}"]
    other = load_file(f"{more['expert']['from']}/model.safetensors")[f"bert.{TABLE}"]
    expected = (first + other[:99]) / 2
    found = AutoModel.from_pretrained(merged).state_dict()[TABLE]
    assert torch.allclose(found[:99], expected, atol=1e-6)
    assert torch.allclose(found[99], (base[99] + other[99]) / 2, atol=1e-6)
    assert load_merged(merged, "words").config.vocab_size == 99


@pytest.mark.slow
def test_every_way_through_the_recipe(settings, spoken, tmp_path):
    merge = [
        "average",
        {"method": "task_arithmetic", "vectors": ["plain", "purified"], "scale": 0.4},
        "emr",
        "fisher",
        "doge_ta",
        "tatr",
        "regmean",
        {"method": "regmean_plus_plus", "options": {"examples": 8}},
        {"method": "featcal", "anchor": "average", "options": {"examples": 8}},
        {"method": "distillation", "anchor": "average", "options": {"examples": 8, "epochs": 1}},
    ]
    changed = {
        **settings,
        "merge": merge,
        "capture": {"examples": 8, "moments": "input"},
        "evaluate": {"purified_experts": True},
    }
    folder = run_recipe(Recipe.model_validate(changed))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "longer")
    for name in sorted(path.name for path in (folder / "merged").iterdir()):
        model = load_merged(folder / "merged" / name, "words")
        assert model.config.vocab_size == 102
        found = scores_of(folder, name)["words"]["metrics"]["accuracy"]
        assert found == pytest.approx(accuracy(model, tokenizer, spoken["test"])), name
    run_stage(Recipe.model_validate(changed), "purify")
    exported = next((folder / "purified-experts").iterdir()) / "words"
    assert AutoModelForSequenceClassification.from_pretrained(exported).config.vocab_size == 102


def test_adding_an_expert_that_knows_a_word_more(settings, ready_settings, expert_folders, tmp_path):
    changed = {**ready_settings, "merge": [{"method": "opcm"}], "capture": {"examples": 8}}
    folder = run_recipe(Recipe.model_validate(changed))
    added = add_expert(folder / "merged" / "opcm-plain", "new", str(tmp_path / "longer"), tmp_path / "added")
    longer = load_file(tmp_path / "longer" / "model.safetensors")[f"bert.{TABLE}"]
    assert torch.equal(load_merged(added, "new").bert.embeddings.word_embeddings.weight[100:], longer[100:])
    assert load_merged(added, "words").config.vocab_size == 100
    assert len(AutoTokenizer.from_pretrained(added)) == 100

    foreign = tmp_path / "foreign"
    shutil.copytree(tmp_path / "longer", foreign)
    text = (foreign / "tokenizer.json").read_text().replace('"w7"', '"other"')
    (foreign / "tokenizer.json").write_text(text)
    with pytest.raises(PaveError, match="first 'other', which is token 11 there, but not known, and token 11 is 'w7'"):
        add_expert(folder / "merged" / "opcm-plain", "strange", str(foreign), tmp_path / "strange")


@pytest.fixture
def adapter(base_folder, tiny_tokenizer, tmp_path):
    """A peft adapter of the base that brings along an embedding with one token more, and its tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model.resize_token_embeddings(101, mean_resizing=False)
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.add_(0.1 * torch.randn(101, 32))
        wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.1)
    folder = tmp_path / "adapter"
    wrapped.save_pretrained(folder, save_embedding_layers=True)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(folder)
    return folder, wrapped.merge_and_unload().eval()


def test_an_adapter_that_brings_an_embedding_along(adapter, settings, spoken):
    folder, expected = adapter
    words, more = settings["tasks"]
    tasks = [{**words, "expert": {"from": str(folder)}}, more]
    changed = Recipe.model_validate({**settings, "tasks": tasks})
    shown = StringIO()
    plan_recipe(changed, Console(file=shown, width=200))
    assert "has 101 rows, the base's 100; the 1 row beyond the base's is not merged" in shown.getvalue()
    run = run_recipe(changed)
    made = AutoModelForSequenceClassification.from_pretrained(run / "experts" / "words").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "experts" / "words")
    read = tokenizer("zz w3 w50 zz", return_tensors="pt")
    assert int(read["input_ids"].max()) == 100
    with torch.no_grad():
        torch.testing.assert_close(made(**read).logits, expected(**read).logits, rtol=0, atol=1e-5)
    merged = load_merged(run / "merged" / "average-plain", "words")
    table = expected.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(merged.bert.embeddings.word_embeddings.weight[100:], table[100:])
    found = scores_of(run, "experts")["words"]["metrics"]["accuracy"]
    assert found == pytest.approx(accuracy(expected, tokenizer, spoken["test"]))
