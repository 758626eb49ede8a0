"""Any number of classes for a text: what is read, what is scored, and a whole run beside another kind."""

import csv

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

from pave_lightning import Recipe, Task, TaskDataModule, load_merged, run_recipe
from pave_lightning.experts.gradients import fisher_diagonal
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.tasks.constants import constant_scores
from pave_lightning.tasks.data import load_split
from pave_lightning.tasks.metrics import scores

CLASSES = ["low", "even", "long"]


def of_kind(**options):
    return {"kind": "multi_label", "text": "text", "classes": CLASSES, **options}


def texts(drawn, count):
    rows = []
    for _ in range(count):
        first, words = drawn.randrange(96), drawn.randint(1, 8)
        holds = [first < 48, first % 2 == 0, words > 4]
        rows.append({"text": " ".join([f"w{first}", *["w1"] * (words - 1)]), "labels": holds})
    return rows


def named(rows):
    return [
        {**row, "labels": [name for name, holds in zip(CLASSES, row["labels"], strict=True) if holds]} for row in rows
    ]


def spread(rows):
    return [{"text": row["text"], **dict(zip(CLASSES, row["labels"], strict=True))} for row in rows]


@pytest.fixture
def rows():
    import random

    return texts(random.Random(1), 12)


def multi_hot(task, tmp_path):
    return task.answers(load_split(task, "train", seed=0, cache_dir=tmp_path / "cache")).tolist()


def test_lists_of_names_of_indices_and_columns_mean_the_same(rows, task_of, problems_of, tmp_path):
    expected = [[int(holds) for holds in row["labels"]] for row in rows]
    by_index = [{**row, "labels": [CLASSES.index(name) for name in row["labels"]]} for row in named(rows)]
    flags = [{key: int(value) if key in CLASSES else value for key, value in row.items()} for row in spread(rows)]
    for given, options in (
        (named(rows), of_kind()),
        (by_index, of_kind()),
        (spread(rows), of_kind(labels=CLASSES)),
        (flags, {"kind": "multi_label", "text": "text", "labels": CLASSES}),
    ):
        task = task_of(given, **options)
        assert problems_of(task) == ""
        assert multi_hot(task, tmp_path) == expected


@pytest.mark.parametrize("spelt", [("0", "1"), ("False", "True"), ("0.0", "1.0")])
def test_columns_of_a_csv_file(rows, tmp_path, problems_of, spelt):
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *CLASSES])
        writer.writerows([row["text"], *(spelt[holds] for holds in row["labels"])] for row in rows)
    data = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "rows.csv"))
    task = Task(name="mine", data=data, kind="multi_label", text="text", labels=CLASSES)
    assert problems_of(task) == ""
    assert multi_hot(task, tmp_path) == [[int(holds) for holds in row["labels"]] for row in rows]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["lwo"], "column 'labels' must hold one of the classes low, even, long, but holds 'lwo' in entry 0"),
        (["low", "even", "low"], "holds the same label twice in row 12"),
        (None, "column 'labels' has no list in row 12"),
    ],
)
def test_lists_that_cannot_be_used_are_told(rows, task_of, problems_of, labels, told):
    assert told in problems_of(task_of([*named(rows), {"text": "w1", "labels": labels}], **of_kind()))


def test_lists_of_0_and_1_are_told(rows, task_of, problems_of):
    given = [{**row, "labels": [int(holds) for holds in row["labels"]]} for row in rows]
    assert "not 0 or 1 for each class, which columns of their own may hold" in problems_of(task_of(given, **of_kind()))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (2, "column 'even' must hold 0 or 1, or false or true, for each row"),
        (None, "column 'even' has no label in row 12"),
    ],
)
def test_columns_that_cannot_be_used_are_told(rows, task_of, problems_of, value, told):
    flags = [{key: int(value) if key in CLASSES else value for key, value in row.items()} for row in spread(rows)]
    task = task_of([*flags, {"text": "w1", "low": 0, "even": value, "long": 1}], **of_kind(labels=CLASSES))
    assert told in problems_of(task)


def test_rows_that_all_carry_the_same_labels_are_told(task_of, problems_of):
    told = problems_of(task_of([{"text": "w1", "labels": ["low"]}] * 4, **of_kind()))
    assert "all 4 rows that are used carry the same label in column 'labels'" in told


def test_classes_without_examples_are_told(rows, task_of, problems_of, caplog):
    given = [{**row, "labels": [name for name in row["labels"] if name != "even"]} for row in named(rows)]
    assert problems_of(task_of(given, **of_kind())) == ""
    told = [record.message for record in caplog.records if "has the class even" in record.message]
    assert len(told) == 2
    assert "train split" in told[0]
    assert "none of the 12 rows that are used has the class even, so nothing is learned of it" in told[0]
    assert "no score says anything of it" in told[1]


def test_keys_that_do_not_go_together():
    with pytest.raises(ValueError, match="names 2 columns, but there are 3 classes"):
        Task(name="t", data={}, **of_kind(labels=["low", "even"]))
    with pytest.raises(ValueError, match="both name the column 'text'"):
        Task(name="t", data={}, **of_kind(labels="text"))
    with pytest.raises(ValueError, match="'labels' names the column 'low' twice"):
        Task(name="t", data={}, **of_kind(labels=["low", "low", "even"]))
    with pytest.raises(ValueError, match="metric 'accuracy' does not fit a multi_label task"):
        Task(name="t", data={}, **of_kind(metrics="accuracy"))


def test_metrics_are_those_of_scikit_learn_and_no_constant_scores_better():
    drawn = torch.Generator().manual_seed(0)
    probabilities = torch.rand(40, 4, generator=drawn)
    labels = (torch.rand(40, 4, generator=drawn) < torch.tensor([0.2, 0.5, 0.7, 0.0])).long()
    probabilities[:, 3] *= 0.5
    task = Task(name="t", data={}, kind="multi_label", text="text", classes=4)
    metrics = task.build_metrics()
    for part in range(0, 40, 9):
        metrics.update(probabilities[part : part + 9], labels[part : part + 9])
    found, predicted, known = scores(metrics), (probabilities > 0.5).int(), slice(0, 3)  # the last class never occurs
    assert found == pytest.approx(
        {
            "micro_f1": f1_score(labels, predicted, average="micro"),
            "macro_f1": f1_score(labels[:, known], predicted[:, known], average="macro"),
            "exact_match": accuracy_score(labels, predicted),
            "mean_average_precision": average_precision_score(labels[:, known], probabilities[:, known]),
        },
        abs=1e-6,
    )
    best = dict.fromkeys(found, 0.0)
    for index in range(16):
        metrics.reset()
        answer = torch.tensor([float(index >> place & 1) for place in range(4)])
        metrics.update(answer.expand(40, 4), labels)
        best = {name: max(value, best[name]) for name, value in scores(metrics).items()}
    assert constant_scores(task, labels) == pytest.approx(best, abs=1e-6)


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=100, max_position_embeddings=32, initializer_range=0.5, num_labels=3)
    config.problem_type = "multi_label_classification"
    return BertForSequenceClassification(config).eval()


def test_loss_and_fisher_information(rows, task_of, tiny_tokenizer, tmp_path):
    """The loss of transformers; the sum over classes of p (1 - p) times the squared gradient of each logit."""
    task, model = task_of(named(rows), **of_kind()), tiny_model()
    module = TaskDataModule(task, tiny_tokenizer, seed=0, cache_dir=tmp_path / "cache", batch_size=5)
    batches = list(module.val_dataloader())
    for batch in batches:
        inputs = task.inputs(batch)
        assert torch.allclose(task.loss(model, batch), model(**inputs, labels=batch["labels"].float()).loss)
    found = fisher_diagonal(model, task, batches)["encoder.layer.0.output.dense.bias"]
    parameter, total = model.bert.get_parameter("encoder.layer.0.output.dense.bias"), 0
    for row in rows:
        logits = model(**tiny_tokenizer(row["text"], return_tensors="pt")).logits[0]
        for logit in logits:
            (gradient,) = torch.autograd.grad(logit, parameter, retain_graph=True)
            total = total + float(logit.sigmoid() * (1 - logit.sigmoid())) * gradient.double() ** 2
    assert torch.allclose(found.double(), total / len(rows), rtol=1e-4, atol=1e-8)


def test_experts_with_other_heads_are_told(task_of):
    task = task_of([], **of_kind())
    config = BertConfig(num_labels=3, id2label=dict(enumerate(CLASSES)), problem_type="single_label_classification")
    assert [found.accept for found in task.misfits(config, config.to_dict())] == ["problem_type"]
    config = BertConfig(num_labels=3, id2label=dict(enumerate(reversed(CLASSES))))
    assert "in the order" in next(task.misfits(config, config.to_dict())).message


def test_a_whole_run(recipe_beside_words, tmp_path):
    settings = recipe_beside_words(lambda drawn, count: named(texts(drawn, count)), **of_kind())
    recipe = Recipe.model_validate(settings)
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert all(np.isfinite(float(row["mine/micro_f1"])) for row in table)
    known = [row["mine/micro_f1/low"] for row in table if row["model"] != "expert"]
    assert any(known)
    expert = AutoModelForSequenceClassification.from_pretrained(folder / "experts" / "mine")
    assert expert.config.problem_type == "multi_label_classification"
    merged = load_merged(folder / "merged" / "task_arithmetic-purified", "mine")
    merged.save_pretrained(folder / "alone")
    tokenizer = AutoTokenizer.from_pretrained(folder / "experts" / "mine")
    said = pipeline("text-classification", model=str(folder / "alone"), tokenizer=tokenizer, top_k=None)(["w3 w1"])[0]
    with torch.no_grad():
        outputs = recipe.task("mine").outputs(merged, dict(tokenizer("w3 w1", return_tensors="pt")))
    expected = dict(zip(CLASSES, outputs[0].sigmoid().tolist(), strict=True))
    assert {one["label"]: one["score"] for one in said} == pytest.approx(expected, abs=1e-6)
