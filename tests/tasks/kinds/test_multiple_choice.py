"""One of several choices for a text: what is read, what is scored, and a whole run beside another kind."""

import csv
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForMultipleChoice, AutoTokenizer, BertConfig, BertForMultipleChoice

from pave_lightning import Recipe, Task, TaskDataModule, load_merged, run_recipe
from pave_lightning.experts.gradients import fisher_diagonal
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.tasks.data import load_split

ENDINGS = ["end0", "end1", "end2"]
OF_KIND = {"kind": "multiple_choice", "text": "text", "choices": "choices"}


def questions(drawn, count):
    """The right choice is the one that repeats the text's first word."""
    rows = []
    for _ in range(count):
        words = [f"w{index}" for index in drawn.sample(range(96), 3)]
        text = " ".join([drawn.choice(words), *["w1"] * drawn.randint(0, 4)])
        rows.append({"text": text, "choices": words, "label": words.index(text.split()[0])})
    return rows


def spread(rows):
    return [
        {"text": row["text"], **dict(zip(ENDINGS, row["choices"], strict=True)), "label": row["label"]} for row in rows
    ]


@pytest.fixture
def rows():
    return questions(random.Random(1), 12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=100, max_position_embeddings=32, initializer_range=0.5)
    return BertForMultipleChoice(config).eval()


def test_lists_columns_indices_and_names_mean_the_same(rows, task_of, problems_of, tmp_path):
    letters = [{**row, "label": "ABC"[row["label"]]} for row in rows]
    endings = [{**row, "label": ENDINGS[row["label"]]} for row in spread(rows)]
    texts = [{**row, "label": str(row["label"])} for row in spread(rows)]
    counted = [{**row, "label": row["label"] + 1} for row in rows]
    for given, options in (
        (rows, {}),
        (letters, {"choice_names": ["A", "B", "C"]}),
        (spread(rows), {"choices": ENDINGS}),
        (endings, {"choices": ENDINGS}),
        (texts, {"choices": ENDINGS}),
        (counted, {"choice_names": [1, 2, 3]}),
    ):
        task = task_of(given, **{**OF_KIND, **options})
        assert problems_of(task) == ""
        found = task.answers(load_split(task, "train", seed=0, cache_dir=tmp_path / "cache"))
        assert found.tolist() == [row["label"] for row in rows]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            {"text": "w1", "choices": ["w1", "w2"], "label": 0},
            "column 'choices' must hold 3 choices (as in row 0 (counted from 0), line 1), but holds 2 in row 12",
        ),
        ({"text": "w1", "choices": ["w1", "w2", ""], "label": 0}, "column 'choices' holds nothing in entry 2"),
        (
            {"text": "w1", "choices": ["w1", "w2", "w3"], "label": 3},
            "must hold one of the classes 0, 1, 2, but holds 3 in row 12",
        ),
        ({"text": "w1", "choices": ["w1", "w2", "w3"], "label": None}, "column 'label' has no label in row 12"),
        ({"text": None, "choices": ["w1", "w2", "w3"], "label": 1}, "column 'text' has no text in row 12"),
    ],
)
def test_rows_that_cannot_be_used_are_told(rows, task_of, problems_of, wrong, told):
    assert told in problems_of(task_of([*rows, wrong], **OF_KIND))


def test_a_number_of_choices_that_the_names_do_not_have(rows, task_of, problems_of):
    told = problems_of(task_of(rows, **OF_KIND, choice_names=["A", "B"]))
    assert "must hold 2 choices ('choice_names' names them), but holds 3 in 12 rows" in told


def test_keys_that_do_not_go_together():
    for options, told in (
        ({"choices": ["a", "a"]}, "'choices' names the column 'a', which is named a second time"),
        ({"choices": ["text", "a"]}, "'choices' names the column 'text'"),
        ({"choices": ["a"]}, "two columns or more"),
        ({"choices": ["a", "b"], "choice_names": ["A", "B", "C"]}, "holds 3 names for 2 columns"),
        ({"choices": "c", "metrics": "f1"}, "metric 'f1' does not fit a multiple_choice task"),
    ):
        with pytest.raises(ValueError, match=told):
            Task(name="t", data={}, **{**OF_KIND, **options})


def module_of(task, tokenizer, tmp_path):
    return TaskDataModule(task, tokenizer, seed=0, cache_dir=tmp_path / "cache", batch_size=5)


@pytest.mark.parametrize("second", [False, True])
def test_outputs_loss_and_predictions_are_those_of_transformers(rows, task_of, tiny_tokenizer, tmp_path, model, second):
    rows = [{**row, "start": "w7 w8"} for row in rows]
    task = task_of(rows, **{**OF_KIND, **({"text": ["text", "start"]} if second else {})})
    module = module_of(task, tiny_tokenizer, tmp_path)
    loader, found, lost = module.val_dataloader(), [], 0.0
    for batch in loader:
        with torch.no_grad():
            said = task.predict(model, batch)
            lost += float(task.loss(model, batch)) * len(batch["labels"])
            outputs = task.outputs(model, batch).reshape(-1, 3)
        assert int(said.broken) == 0
        found += list(zip(outputs.tolist(), said.values.tolist(), said.targets.tolist(), strict=True))
    expected = 0.0
    for place, (outputs, chosen, target) in zip(loader.sampler, found, strict=True):
        row = rows[place]
        choices = [f"w7 w8 {choice}" if second else choice for choice in row["choices"]]
        tokens = tiny_tokenizer([row["text"]] * 3, choices, padding=True, return_tensors="pt")
        with torch.no_grad():
            whole = model(**{name: value[None] for name, value in tokens.items()}, labels=torch.tensor([row["label"]]))
        assert outputs == pytest.approx(whole.logits[0].tolist(), abs=1e-6)
        assert (chosen, target) == (int(whole.logits.argmax()), row["label"])
        expected += float(whole.loss)
    assert lost == pytest.approx(expected, abs=1e-4)


def test_broken_outputs_count_by_row(rows, task_of, tiny_tokenizer, tmp_path):
    task = task_of(rows, **OF_KIND)
    batch = next(iter(module_of(task, tiny_tokenizer, tmp_path).val_dataloader()))

    class Broken(nn.Module):
        def forward(self, **inputs):
            logits = torch.zeros(len(inputs["input_ids"]), 1)
            logits[0], logits[1], logits[7] = torch.nan, torch.nan, -torch.inf
            return type("Output", (), {"logits": logits})

    assert int(task.predict(Broken(), batch).broken) == 2


def test_fisher_information_is_that_of_the_softmax_over_choices(rows, task_of, tiny_tokenizer, tmp_path, model):
    task = task_of(rows, **OF_KIND)
    found = fisher_diagonal(model, task, module_of(task, tiny_tokenizer, tmp_path).val_dataloader())
    name, total = "encoder.layer.0.output.dense.bias", torch.zeros(16, dtype=torch.float64)
    for row in rows:
        tokens = tiny_tokenizer([row["text"]] * 3, row["choices"], padding=True, return_tensors="pt")
        logged = model(**{key: value[None] for key, value in tokens.items()}).logits[0].log_softmax(0)
        for one in logged:
            (gradient,) = torch.autograd.grad(one, model.bert.get_parameter(name), retain_graph=True)
            total += float(one.exp()) * gradient.double() ** 2
    assert torch.allclose(found[name].double(), total / len(rows), rtol=1e-4, atol=1e-9)


def test_random_examples_have_as_many_choices(tiny_tokenizer):
    for options, count in (({"choices": ENDINGS}, 3), ({}, 4)):
        task = Task(name="t", data={}, **{**OF_KIND, **options}, training={"max_length": 9})
        drawn = task.random_examples(tiny_tokenizer, 5, seed=1)
        assert [len(row) for row in drawn["input_ids"]] == [count] * 5
        assert drawn["length"] == [max(map(len, row)) for row in drawn["input_ids"]]


@pytest.mark.parametrize("given", [False, True])
def test_a_whole_run(recipe_beside_words, recipe_of_experts, tmp_path, given):
    if given:
        settings = recipe_of_experts(questions, AutoModelForMultipleChoice, **OF_KIND)
    else:
        settings = recipe_beside_words(questions, **OF_KIND)
    recipe = Recipe.model_validate(settings)
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert all(np.isfinite(float(row["mine/accuracy"])) for row in table)
    merged = load_merged(folder / "merged" / "task_arithmetic-plain", "mine")
    assert isinstance(merged, BertForMultipleChoice)
    merged.save_pretrained(folder / "alone")
    alone = AutoModelForMultipleChoice.from_pretrained(folder / "alone").eval()
    tokenizer, task = AutoTokenizer.from_pretrained(folder / "merged" / "task_arithmetic-plain"), recipe.task("mine")
    rows = {"text": ["w3 w1"], "choices": [["w3", "w5", "w6"]], "label": [0]}
    encoded = task.encode(rows, tokenizer)
    batch = task.collate(tokenizer)([{name: value[0] for name, value in encoded.items() if name != "length"}])
    tokens = tokenizer(["w3 w1"] * 3, ["w3", "w5", "w6"], padding=True, return_tensors="pt")
    with torch.no_grad():
        said = task.outputs(merged, batch)[:, 0].tolist()
        expected = alone(**{name: value[None] for name, value in tokens.items()}).logits[0].tolist()
    assert said == pytest.approx(expected, abs=1e-6)
