"""Words with a class each: what is read, what a model is given, what is scored, and a whole run beside another kind."""

import copy
import csv
import json
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
)

from pave_lightning import Recipe, Task, TaskDataModule, load_merged, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.evaluation import Evaluator, ExpertsCandidate, SuiteData
from pave_lightning.experts.gradients import fisher_diagonal
from pave_lightning.experts.task_expert import TaskExpert
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.tasks.constants import constant_answer
from pave_lightning.tasks.data import check_task, load_split
from pave_lightning.tasks.metrics import scores
from pave_lightning.weights import Checkpoint

CLASSES = ["low", "middle", "high"]


def class_of(word):
    return CLASSES[min(int(word[1:]) // 32, 2)]


def sentences(seed, count, longest=6):
    drawn = random.Random(seed)
    for _ in range(count):
        words = [f"w{drawn.randrange(96)}" for _ in range(drawn.randint(1, longest))]
        yield {"words": words, "labels": [class_of(word) for word in words]}


@pytest.fixture
def make_task(tmp_path):
    """A task over rows that are given, written as .jsonl, .json or .parquet; the same rows for all splits."""

    def build(rows, ending=".jsonl", **options):
        path = tmp_path / f"rows{ending}"
        if ending == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif ending == ".json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = dict.fromkeys(("train", "validation", "test"), str(path))
        return Task.model_validate(
            {"name": "tags", "kind": "token_classification", "data": data, "classes": CLASSES, **options}
        )

    return build


def problems_of(task, tmp_path):
    return check_task(task, seed=0, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("by_index", [False, True])
def test_rows_are_read_alike_from_every_format(make_task, tmp_path, ending, by_index):
    rows = list(sentences(0, 5))
    given = [
        {**row, "labels": [CLASSES.index(label) for label in row["labels"]] if by_index else row["labels"]}
        for row in rows
    ]
    task = make_task(given, ending)
    assert problems_of(task, tmp_path) == []
    loaded = load_split(task, "train", seed=0, cache_dir=tmp_path / "cache")
    assert loaded["words"].to_pylist() == [row["words"] for row in rows]
    assert task.answers(loaded).tolist() == [CLASSES.index(label) for row in rows for label in row["labels"]]


def test_class_names_of_a_dataset_that_was_saved_as_parquet(make_task, tmp_path):
    """As `datasets` writes lists of a ClassLabel: its own names count, whatever the case."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "words": datasets.List(datasets.Value("string")),
            "labels": datasets.List(datasets.ClassLabel(names=["LOW", "MIDDLE", "HIGH"])),
        }
    )
    rows = {"words": [["w1", "w90"], ["w40"]], "labels": [[0, 2], [1]]}
    task = make_task([])
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "named.parquet")
    data = task.data.model_copy(update=dict.fromkeys(("train", "validation", "test"), str(tmp_path / "named.parquet")))
    task = task.model_copy(update={"data": data})
    assert problems_of(task, tmp_path) == []
    assert task.answers(load_split(task, "train", seed=0, cache_dir=tmp_path / "cache")).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (pa.list_(pa.string_view()), pa.large_list(pa.string_view())),
        (pa.large_list(pa.large_string()), pa.list_(pa.large_string())),
        (pa.list_(pa.string(), 2), pa.list_(pa.string_view(), 2)),
        (pa.list_(pa.dictionary(pa.int32(), pa.string())), pa.large_list(pa.dictionary(pa.int8(), pa.string()))),
    ],
)
def test_lists_in_every_form_that_parquet_files_hold(make_task, tmp_path, words, labels):
    """Texts as views, lists of one fixed length, and entries that are categories, as other programs write them."""
    rows = {"words": [["w1", "w90"], ["w40", "w41"]], "labels": [["low", "high"], ["middle", "middle"]]}
    task = make_task([], ".parquet")
    columns = [pa.array(rows["words"]), pa.array(rows["labels"])]
    table = pa.table([column.cast(kind) for column, kind in zip(columns, (words, labels), strict=True)], list(rows))
    pq.write_table(table, task.data.train)
    assert problems_of(task, tmp_path) == []
    loaded = load_split(task, "train", seed=0, cache_dir=tmp_path / "cache")
    assert loaded["words"].to_pylist() == rows["words"]
    assert task.answers(loaded).tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"words": ["w1", "w2"], "labels": ["low"]}, "lists of one length, but have 2 and 1 entries in row 2"),
        ({"words": ["w1"], "labels": ["lwo"]}, r"holds 'lwo' in entry 0 \(counted from 0\) of row 2.*mean 'low'"),
        ({"words": [], "labels": []}, "has an empty list in row 2"),
        ({"words": None, "labels": ["low"]}, "column 'words' has no list in row 2"),
        ({"words": ["w1", " "], "labels": ["low", "low"]}, "column 'words' holds nothing in entry 1"),
        ({"words": ["w1", None], "labels": ["low", "low"]}, r"column 'words' holds (a list with null|nothing)"),
        ({"words": ["w1"], "labels": [None]}, r"column 'labels' holds (a list with null|nothing)"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_rows_that_cannot_be_used_are_told(make_task, tmp_path, wrong, told, ending):
    found = problems_of(make_task([*sentences(0, 2), wrong], ending), tmp_path)
    assert any(re.search(told, problem) for problem in found), found
    assert all("task 'tags'" in problem for problem in found)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"words": "w1 w2", "labels": ["low"]}, "must hold lists"),
        ({"words": [1, 2], "labels": ["low", "low"]}, "must hold (lists of )?texts"),
        ({"words": ["w1"], "labels": "low"}, "must hold lists"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_columns_of_something_else_are_told(make_task, tmp_path, row, told, ending):
    found = problems_of(make_task([row, row], ending), tmp_path)
    assert any(re.search(told, problem) for problem in found), found


def test_a_csv_file_has_no_lists(tmp_path):
    (tmp_path / "a.csv").write_text("words,labels\nw1,low\n")
    data = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "a.csv"))
    task = Task(name="t", kind="token_classification", data=data, classes=CLASSES)
    assert any("must hold lists, which .csv files cannot" in problem for problem in problems_of(task, tmp_path))


def module_of(task, tokenizer, tmp_path, **options):
    return TaskDataModule(task, tokenizer, seed=0, cache_dir=tmp_path / "cache", **{"batch_size": 3, **options})


def test_a_words_first_token_carries_its_label(make_task, tmp_path):
    """With a tokenizer that cuts words into pieces."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "w", "##1", "##2", "##9", "##0"]
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    task = make_task([{"words": ["w12", "w", "w90"], "labels": ["low", "middle", "high"]}] * 3)
    batch = next(iter(module_of(task, tokenizer, tmp_path).val_dataloader()))
    assert batch["input_ids"][0].tolist() == [4, 5, 6, 4, 4, 7, 8]
    assert batch["labels"][0].tolist() == [0, -100, -100, 1, 2, -100, -100]
    assert task.read_positions(batch)[0].tolist() == [True, False, False, True, True, False, False]


def test_byte_level_tokenizers_put_a_space_before_each_word(tmp_path, make_task):
    backend = Tokenizer(models.BPE({"<pad>": 0, "<unk>": 1, "Ġ": 2, "w": 3, "1": 4, "Ġw": 5, "2": 6}, [("Ġ", "w")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path / "roberta"
    RobertaTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta", "vocab_size": 16, "pad_token_id": 0}))
    task = make_task([{"words": ["w1", "w2"], "labels": ["low", "high"]}] * 2)
    tokenizer = task.load_processor(folder)
    encoded = task.encode({"words": [["w1", "w2"]], "labels": [["low", "high"]]}, tokenizer)
    ids = [index for index in encoded["input_ids"][0] if index in (2, 3, 4, 5, 6)]
    assert ids == [5, 4, 5, 6]
    assert [label for label in encoded["labels"][0] if label != -100] == [0, 2]


def test_what_is_cut_off_is_not_scored(make_task, tmp_path, tiny_tokenizer):
    task = make_task([{"words": ["w1"] * 30, "labels": ["low"] * 30}], training={"max_length": 12})
    batch = next(iter(module_of(task, tiny_tokenizer, tmp_path).val_dataloader()))
    assert batch["input_ids"].shape == (1, 12)
    assert len(task.targets(batch)) == 10


def test_a_constant_answer_counts_the_words_that_are_scored(make_task, tmp_path, tiny_tokenizer):
    """Of the words that are cut off most are of another class than of those that are left."""
    rows = [{"words": ["w1"] * 3 + ["w90"] * 9, "labels": ["low"] * 3 + ["high"] * 9}]
    rows += [{"words": ["w90"], "labels": ["high"]}]
    task = make_task(rows, training={"max_length": 5})
    module = module_of(task, tiny_tokenizer, tmp_path)
    targets = torch.cat([task.targets(batch) for batch in module.test_dataloader()])
    assert module.labels("test").tolist() == [0, 0, 0, 2]
    assert sorted(module.labels("test").tolist()) == sorted(targets.tolist())
    best = {}
    for answer in range(3):
        metrics = task.build_metrics()
        metrics.update(torch.full_like(targets, answer), targets)
        best = {name: max(value, best.get(name, 0)) for name, value in scores(metrics).items()}
    assert constant_answer(module.encoded, "test") == pytest.approx(best)
    assert best["accuracy"] == 0.75


def test_rows_of_which_no_word_is_left_are_refused(make_task, tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("w1", "")
    task = make_task([{"words": ["w1", "w1"], "labels": ["low", "high"]}] * 2)
    module = module_of(task, tokenizer, tmp_path)
    with pytest.raises(
        PaveError, match=r"task 'tags', test split .*leaves no word of any row within training\.max_length"
    ):
        module.labels("test")
    assert len(module_of(task, tiny_tokenizer, tmp_path).labels("test")) == 4


def test_a_plan_tells_labels_that_are_the_same_once_texts_are_cut(make_task, recipe_settings, tmp_path):
    def told(length):
        row = {"words": ["w1"] * 6 + ["w90"], "labels": ["low"] * 6 + ["high"]}
        task = make_task([row, row], training={"max_length": length}).model_dump(by_alias=True)
        recipe = Recipe.model_validate({**recipe_settings, "tasks": [task], "merge": []})
        try:
            check_recipe(recipe, RunFolder(tmp_path / "run"))
        except PaveError as error:
            return str(error)
        return ""

    assert told(9) == ""
    assert "task 'tags', test split (" in told(8)
    assert "of 14 labels 12 are left once texts are cut (training.max_length is 8), all the same" in told(8)


def model_of(**options):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=100,
        max_position_embeddings=32,
        initializer_range=0.5,
        num_labels=3,
        **options,
    )
    return BertForTokenClassification(config).eval()


def test_outputs_loss_and_predictions_are_those_of_the_words(make_task, tmp_path, tiny_tokenizer):
    task, model = make_task(list(sentences(0, 7))), model_of()
    for batch in module_of(task, tiny_tokenizer, tmp_path).val_dataloader():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            whole = model(**inputs, labels=batch["labels"])
            outputs, found = task.outputs(model, batch), task.predict(model, batch)
            unlabelled = {name: value for name, value in batch.items() if name != "labels"}
            assert torch.equal(task.outputs(model, unlabelled), outputs)
            assert torch.allclose(task.loss(model, batch), whole.loss, atol=1e-6)
        expected = whole.logits[batch["labels"] != -100]
        assert torch.equal(outputs, expected)
        assert torch.equal(found.values, expected.argmax(-1))
        assert torch.equal(found.targets, batch["labels"][batch["labels"] != -100])
        assert int(found.broken) == 0
        assert task.predict(model, unlabelled).targets is None


def test_broken_outputs_count_by_row_and_padding_does_not_matter(make_task, tmp_path, tiny_tokenizer):
    task = make_task([{"words": ["w1"], "labels": ["low"]}, {"words": ["w1", "w2"], "labels": ["low", "low"]}])
    batch = next(iter(module_of(task, tiny_tokenizer, tmp_path).val_dataloader()))

    class Broken(nn.Module):
        def forward(self, **inputs):
            logits = torch.zeros(*inputs["input_ids"].shape, 3)
            logits[inputs["attention_mask"] == 0] = torch.nan
            logits[inputs["input_ids"] == tiny_tokenizer.convert_tokens_to_ids("w2")] = torch.inf
            return type("Output", (), {"logits": logits})

    assert int(task.predict(Broken(), batch).broken) == 1


def test_batches_of_which_a_tokenizer_leaves_no_word(make_task, tmp_path, tiny_tokenizer):
    """They cost nothing and count for nothing."""
    rows = [{"words": ["w1", "w2"], "labels": ["low", "high"]}]
    gone = [{"words": ["\u200b"], "labels": ["high"]}]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    model = model_of()
    model.config.id2label = dict(enumerate(CLASSES))
    model.save_pretrained(tmp_path / "expert")
    tokenizer.save_pretrained(tmp_path / "expert")
    expert = Checkpoint(tmp_path / "expert", "bert")
    scored, validated = [], []
    for given in (rows, [*gone, *rows, *gone]):
        task = make_task(given)
        data = module_of(task, tokenizer, tmp_path, batch_size=1)
        evaluator = Evaluator([task], {"tags": expert}, expert)
        trainer = build_trainer({"accelerator": "cpu", "devices": 1}, root=tmp_path, precision="32-true")
        found = evaluator.score(ExpertsCandidate({"tags": expert}), SuiteData([data], "test"), trainer)
        scored.append(found["tags"].metrics)
        trainer = build_trainer({"accelerator": "cpu", "devices": 1}, root=tmp_path, precision="32-true")
        validated.append(trainer.validate(TaskExpert(model, task), data, verbose=False))
    assert scored[0] == scored[1]
    assert validated[0] == validated[1]
    model.requires_grad_(True)
    empty = [batch for batch in data.val_dataloader() if not task.read_positions(batch).any()]
    assert len(empty) == 2
    loss = task.loss(model, empty[0])
    loss.backward()
    assert loss == 0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_metrics_are_over_words(make_task, tmp_path, tiny_tokenizer, make_base):
    """By their definitions, whatever the batches."""
    rows = list(sentences(3, 23))
    task, model = make_task(rows), model_of()
    model.config.id2label = dict(enumerate(CLASSES))
    model.save_pretrained(tmp_path / "expert")
    tiny_tokenizer.save_pretrained(tmp_path / "expert")
    expert = Checkpoint(tmp_path / "expert", "bert")
    evaluator = Evaluator([task], {"tags": expert}, expert)
    trainer = build_trainer({"accelerator": "cpu", "devices": 1}, root=tmp_path, precision="32-true")
    data = SuiteData([module_of(task, tiny_tokenizer, tmp_path, batch_size=5)], "test")
    found = evaluator.score(ExpertsCandidate({"tags": expert}), data, trainer, keep=True)["tags"]
    predicted, right, places = [], [], []
    for index, row in enumerate(rows):
        places += [(index, word) for word in range(len(row["words"]))]
        inputs = tiny_tokenizer([row["words"]], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            predicted += model(**inputs).logits[0, 1:-1].argmax(-1).tolist()
        right += [CLASSES.index(label) for label in row["labels"]]
    assert found.examples == 23
    pairs = list(zip(right, predicted, strict=True))
    assert found.metrics["accuracy"] == pytest.approx(np.mean([one == other for one, other in pairs]), abs=1e-6)
    f1 = [2 * pairs.count((c, c)) / (right.count(c) + predicted.count(c)) for c in set(right) | set(predicted)]
    assert found.metrics["macro_f1"] == pytest.approx(np.mean(f1), abs=1e-6)
    kept = found.predictions
    assert list(zip(kept.rows, kept.positions, strict=True)) == places
    assert kept.predictions.tolist() == predicted
    assert kept.targets.tolist() == right


def test_the_fisher_information_is_that_of_all_words(make_task, tmp_path, tiny_tokenizer):
    """The sum over words and classes of p (d log p)^2, cross terms of a row's words included, by autograd."""
    task, model = make_task(list(sentences(5, 3, longest=3))), model_of()
    batches = list(module_of(task, tiny_tokenizer, tmp_path, batch_size=2).val_dataloader())
    found = fisher_diagonal(model, task, batches)
    name = "encoder.layer.0.output.dense.bias"
    parameter = model.bert.get_parameter(name)
    total = torch.zeros_like(parameter, dtype=torch.float64)
    count = 0
    for batch in batches:
        for row in range(len(batch["labels"])):
            real = batch["attention_mask"][row].bool()
            inputs = {key: batch[key][row : row + 1, real] for key in ("input_ids", "attention_mask", "token_type_ids")}
            words = (batch["labels"][row][real] != -100).nonzero().flatten().tolist()
            logits = model(**inputs).logits[0].double()
            jacobians = [
                torch.stack([torch.autograd.grad(logits[w, c], parameter, retain_graph=True)[0] for c in range(3)])
                for w in words
            ]
            for place, jacobian in zip(words, jacobians, strict=True):
                p = logits[place].softmax(-1).detach()
                middle = torch.diag(p) - torch.outer(p, p)
                total += torch.einsum("ci,cd,di->i", jacobian.double(), middle, jacobian.double())
            count += 1
    assert torch.allclose(found[name].double(), total / count, rtol=1e-4, atol=1e-8)


def test_random_examples_have_words_between_the_special_tokens(make_task, tiny_tokenizer):
    task = make_task([], training={"max_length": 9})
    drawn = task.random_examples(tiny_tokenizer, 20, seed=1)
    assert drawn == task.random_examples(tiny_tokenizer, 20, seed=1)
    for ids, first in zip(drawn["input_ids"], drawn["is_first"], strict=True):
        assert first == [0, *[1] * (len(ids) - 2), 0]
        assert len(ids) <= 9


def test_heads_that_do_not_fit_are_told(make_task):
    task = make_task([])
    config = BertConfig(num_labels=3, id2label=dict(enumerate(["high", "middle", "low"])))
    (misfit,) = task.misfits(config, config.to_dict())
    assert "classes in the order" in misfit.message
    assert misfit.accept is None
    (misfit,) = task.misfits(BertConfig(num_labels=5), {})
    assert "5 outputs, but the task needs 3" in misfit.message


def test_keys_that_do_not_go_together():
    with pytest.raises(ValueError, match="both name the column 'x'"):
        Task(name="t", kind="token_classification", data={}, classes=2, words="x", label="x")
    with pytest.raises(ValueError, match="metric 'f1' does not fit a token_classification task"):
        Task(name="t", kind="token_classification", data={}, classes=2, metrics="f1")


@pytest.fixture
def mixed_recipe(recipe_settings, tmp_path):
    """Text classification and token classification of one base, whose pooler the second kind of model has not."""
    for split, (seed, count) in {"train": (1, 96), "validation": (2, 24), "test": (3, 24)}.items():
        rows = "".join(json.dumps(row) + "\n" for row in sentences(seed, count))
        (tmp_path / f"tags-{split}.jsonl").write_text(rows)
    tags = {
        "name": "tags",
        "kind": "token_classification",
        "classes": CLASSES,
        "data": {split: str(tmp_path / f"tags-{split}.jsonl") for split in ("train", "validation", "test")},
    }
    settings = json.loads(json.dumps(recipe_settings))
    words = next(task for task in settings["tasks"] if task["name"] == "words")
    return {**settings, "tasks": [words, tags]}


def test_a_run_beside_text_classification(mixed_recipe):
    folder = run_recipe(Recipe.model_validate(mixed_recipe))
    expert = AutoModelForTokenClassification.from_pretrained(folder / "experts" / "tags")
    assert expert.config.id2label == dict(enumerate(CLASSES))
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert all(np.isfinite(float(row["tags/accuracy"])) for row in rows)
    for name in ("task_arithmetic-plain", "emr-purified"):
        tags, words = (load_merged(folder / "merged" / name, task) for task in ("tags", "words"))
        assert isinstance(tags, BertForTokenClassification)
        trained = dict(expert.bert.named_parameters())
        shared = dict(tags.bert.named_parameters())
        assert trained.keys() == shared.keys()
        # What only one kind of model has is that kind's own.
        own = type(words).from_pretrained(folder / "experts" / "words").bert.pooler.dense.weight
        assert torch.equal(words.bert.pooler.dense.weight, own)


def test_an_expert_without_its_labels_is_refused(mixed_recipe, tmp_path, make_expert):
    wrong = make_expert(mixed_recipe["base"], num_labels=3)
    mixed_recipe["tasks"][1]["expert"] = {"from": str(wrong)}
    with pytest.raises(PaveError, match="BertForTokenClassification"):
        run_recipe(Recipe.model_validate(mixed_recipe))
