"""Experts whose tokens have other numbers than the base's, from the plan to the merged model."""

import json
import random
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from pave_lightning import Recipe, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.merging.folders import load_merged
from pave_lightning.pipeline.adding import add_expert
from pave_lightning.pipeline.commands import plan_recipe

TABLE = "embeddings.word_embeddings.weight"


def renumbered(expert, folder, *, seed, drop=(), new=()):
    """An expert that knows other tokens, under other numbers; it reads texts without those exactly as before."""
    shutil.copytree(expert, folder)
    draw = random.Random(seed)
    tensors = load_file(folder / "model.safetensors")
    content = json.loads((folder / "tokenizer.json").read_text())
    before = content["model"]["vocab"]
    tokens = [token for token in before if token not in drop] + list(new)
    draw.shuffle(tokens)
    old = tensors[f"bert.{TABLE}"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        table = torch.randn(len(tokens), old.shape[1])
    for row, token in enumerate(tokens):
        if token in before:
            table[row] = old[before[token]]
    numbers = {token: row for row, token in enumerate(tokens)}
    content["model"]["vocab"] = numbers
    for entry in content["added_tokens"]:
        entry["id"] = numbers[entry["content"]]
    for entry in content["post_processor"]["special_tokens"].values():
        entry["ids"] = [numbers[entry["id"]]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": len(tokens), "pad_token_id": numbers["[PAD]"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | {f"bert.{TABLE}": table}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, numbers, table


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.fixture
def spoken(task_files, tmp_path):
    """The words' rows, of which every other holds words that the base does not know."""
    files = {}
    for split, file in task_files().items():
        rows = rows_of(file)
        for row in rows[::2]:
            row["text"] = f"zz {row['text']} yy"
        files[split] = str(tmp_path / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture
def experts(ready_settings, tmp_path):
    """Two renumbered experts: one lacks w95 and has two words more, the other has one of those."""
    places = [task["expert"]["from"] for task in ready_settings["tasks"]]
    first = renumbered(places[0], tmp_path / "first", seed=7, drop=["w95"], new=["zz", "yy"])
    return first, renumbered(places[1], tmp_path / "second", seed=8, new=["zz"])


@pytest.fixture
def settings(ready_settings, experts, spoken):
    tasks = [
        {**task, "data": spoken, "expert": {"from": str(folder)}}
        for task, (folder, _, _) in zip(ready_settings["tasks"], experts, strict=True)
    ]
    return {**ready_settings, "tasks": tasks, "merge": ["average"], "capture": {"examples": 8}}


@pytest.fixture
def known(base_folder):
    """The base's tokens and their numbers, and its table."""
    numbers = json.loads((base_folder / "tokenizer.json").read_text())["model"]["vocab"]
    return numbers, AutoModel.from_pretrained(base_folder).state_dict()[TABLE]


def accuracy(model, tokenizer, file):
    model.eval()
    right = []
    for row in rows_of(file):
        logits = model(**tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)).logits
        right.append(int(logits.argmax()) == row["label"])
    return sum(right) / len(right)


def score(folder, name, task):
    scores = json.loads((folder / "scores" / name / "manifest.json").read_text())["result"]["scores"]
    return scores[task]["metrics"]["accuracy"]


def average_by_token(known, experts):
    """The table that averaging gives, token by token."""
    numbers, base = known
    expected = base.clone()
    for token, row in numbers.items():
        vectors = [table[own[token]] - base[row] if token in own else 0 * base[row] for _, own, table in experts]
        expected[row] = base[row] + sum(vectors) / len(vectors)
    return expected


def test_error_is_the_default_and_names_the_ways_out(settings):
    with pytest.raises(PaveError, match=r"its vocabulary is not the base's: .* or set vocabulary: base_rows or union"):
        plan_recipe(Recipe.model_validate(settings))


def test_the_rows_of_the_base(settings, experts, known, base_folder):
    folder = run_recipe(Recipe.model_validate({**settings, "vocabulary": "base_rows"}))
    merged = folder / "merged" / "average-plain"
    assert torch.allclose(AutoModel.from_pretrained(merged).state_dict()[TABLE], average_by_token(known, experts))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.get_vocab() == known[0]
    assert not list((merged / "heads").rglob("tokenizer.json"))
    assert not list((merged / "heads").rglob("tokens.safetensors"))
    for task, (place, _, _) in zip(("words", "more"), experts, strict=True):
        test = settings["tasks"][0]["data"]["test"]
        model = load_merged(merged, task)
        assert model.config.pad_token_id == known[0]["[PAD]"]
        assert score(folder, "average-plain", task) == pytest.approx(accuracy(model, tokenizer, test))
        # Each expert by itself, with its own tokenizer.
        expert, own = AutoModelForSequenceClassification.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        assert score(folder, "experts", task) == pytest.approx(accuracy(expert, own, test))


def test_the_tokens_of_all(settings, experts, known, tmp_path):
    folder = run_recipe(Recipe.model_validate({**settings, "vocabulary": "union"}))
    merged = folder / "merged" / "average-plain"
    table = AutoModel.from_pretrained(merged).state_dict()[TABLE]
    assert table.shape == (102, 32)
    assert torch.allclose(table[:100], average_by_token(known, experts))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    (_, first, own), (_, second, other) = experts
    order = sorted(("zz", "yy"), key=first.__getitem__)
    assert tokenizer.get_vocab() == known[0] | {token: 100 + place for place, token in enumerate(order)}
    numbers = tokenizer.get_vocab()
    assert torch.allclose(table[numbers["zz"]], (own[first["zz"]] + other[second["zz"]]) / 2)
    assert torch.allclose(table[numbers["yy"]], own[first["yy"]])
    assert tokenizer("zz w3")["input_ids"] == [2, numbers["zz"], numbers["w3"], 3]
    test = settings["tasks"][0]["data"]["test"]
    for task, (place, _, _) in zip(("words", "more"), experts, strict=True):
        assert score(folder, "average-plain", task) == pytest.approx(
            accuracy(load_merged(merged, task), tokenizer, test)
        )
        expert, reads = AutoModelForSequenceClassification.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        assert score(folder, "experts", task) == pytest.approx(accuracy(expert, reads, test))
    with pytest.raises(PaveError, match=r"has tokens of its experts beside the base's \(vocabulary: union\)"):
        add_expert(merged, "new", str(experts[0][0]), tmp_path / "added")


@pytest.mark.parametrize("vocabulary", ["base_rows", "union"])
def test_experts_that_read_as_the_base_does_are_taken_as_they_are(ready_settings, vocabulary):
    changed = {**ready_settings, "merge": ["average"], "capture": {"examples": 8}}
    folder = run_recipe(Recipe.model_validate({**changed, "vocabulary": vocabulary}))
    noted = json.loads((folder / "aligned" / "words" / "manifest.json").read_text())
    assert noted["result"]["folder"] == str(ready_settings["tasks"][0]["expert"]["from"])
    plain = run_recipe(Recipe.model_validate({**changed, "name": "plain"}))
    tables = [load_file(one / "merged" / "average-plain" / "model.safetensors") for one in (folder, plain)]
    assert tables[0].keys() == tables[1].keys()
    assert all(torch.equal(tables[0][name], tables[1][name]) for name in tables[0])


def test_the_plan_counts_them(settings):
    told = {}
    for vocabulary in ("base_rows", "union"):
        shown = StringIO()
        plan_recipe(Recipe.model_validate({**settings, "vocabulary": vocabulary}), Console(file=shown, width=300))
        told[vocabulary] = [line for line in shown.getvalue().splitlines() if line.startswith("note: ")]
    first, second = told["base_rows"]
    assert "task 'words': rows of its expert are matched by token: " in first
    assert "2 tokens dropped ('" in first
    assert "1 token of the base missing, whose rows count as unchanged" in first
    assert "1 token dropped ('zz')" in second
    assert "the merged model has 2 new tokens: '" in told["union"][-1]
    assert not any("dropped" in line for line in told["union"])


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["base_rows", "union"])
def test_every_way_through_the_recipe(settings, vocabulary):
    merge = [
        {"method": "task_arithmetic", "vectors": ["plain", "purified"], "scale": {"search": [0.2, 0.6], "points": 2}},
        "emr",
        "fisher",
        "tatr",
        "regmean",
        {"method": "featcal", "anchor": "fisher", "options": {"examples": 8}},
        {"method": "distillation", "anchor": "fisher", "options": {"examples": 8, "epochs": 1}},
    ]
    changed = {
        **settings,
        "vocabulary": vocabulary,
        "merge": merge,
        "capture": {"examples": 8, "moments": "input"},
        "heads": ["expert", {"fit": "logits", "rows": 16}],
        "evaluate": {"purified_experts": True},
    }
    folder = run_recipe(Recipe.model_validate(changed))
    for place in sorted((folder / "merged").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(place)
        found = accuracy(load_merged(place, "words"), tokenizer, settings["tasks"][0]["data"]["test"])
        assert score(folder, place.name, "words") == pytest.approx(found), place.name


@pytest.mark.slow
def test_an_expert_that_is_trained_here_gets_the_tokens_of_the_others(settings, experts, known):
    existing, other = settings["tasks"]
    trained = {**other, "expert": None}
    recipe = {**settings, "vocabulary": "union", "tasks": [existing, trained], "trainer": {"max_epochs": 1}}
    folder = run_recipe(Recipe.model_validate({**recipe, "training": {"max_length": 16}}))
    merged = folder / "merged" / "average-plain"
    tokenizer, table = AutoTokenizer.from_pretrained(merged), AutoModel.from_pretrained(merged).state_dict()[TABLE]
    _, numbers, own = experts[0]
    for token in ("zz", "yy"):
        assert torch.allclose(table[tokenizer.get_vocab()[token]], own[numbers[token]])
    fitted = AutoModelForSequenceClassification.from_pretrained(folder / "experts" / "more")
    assert fitted.config.vocab_size == 100
    found = accuracy(fitted, AutoTokenizer.from_pretrained(folder / "experts" / "more"), trained["data"]["test"])
    assert score(folder, "experts", "more") == pytest.approx(found)
    assert score(folder, "average-plain", "more") == pytest.approx(
        accuracy(load_merged(merged, "more"), tokenizer, trained["data"]["test"])
    )
