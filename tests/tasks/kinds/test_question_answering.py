"""The part of a text that answers a question: what is read, windows, what is scored, and a whole run."""

import csv
import json
import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForQuestionAnswering

from pave_lightning import Recipe, Task, TaskDataModule, load_merged, run_recipe
from pave_lightning.evaluation import Evaluator, ExpertsCandidate, SuiteData
from pave_lightning.experts.gradients import absolute_gradients, fisher_diagonal
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.reporting.resampled_metrics import ResampledTask
from pave_lightning.tasks.data import load_split
from pave_lightning.tasks.metrics import scores
from pave_lightning.tasks.predictions import read_predictions, write_predictions
from pave_lightning.weights import Checkpoint

OF_KIND = {"kind": "question_answering"}


def questions(drawn, count, longest=9):
    """The answer is the word, or two words, behind the one that is asked for."""
    rows = []
    for _ in range(count):
        words = [f"w{index}" for index in drawn.sample(range(96), drawn.randint(4, longest))]
        place = drawn.randrange(len(words) - 2)
        context, text = " ".join(words), " ".join(words[place + 1 : place + 1 + drawn.randint(1, 2)])
        start = len(" ".join(words[: place + 1])) + 1
        answers = {"text": [text], "answer_start": [start]}
        rows.append({"question": f"{words[place]} w0", "context": context, "answers": answers})
    return rows


@pytest.fixture
def rows():
    return questions(random.Random(1), 12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=100, max_position_embeddings=32, initializer_range=0.5)
    return BertForQuestionAnswering(config).eval()


def loaded(task, tmp_path):
    table = load_split(task, "train", seed=0, cache_dir=tmp_path / "cache")
    return [table.column(name).to_pylist() for name in task.answer]


def test_nested_and_flat_columns_mean_the_same(rows, task_of, problems_of, tmp_path):
    objects = [
        {**row, "answers": [{"text": row["answers"]["text"][0], "answer_start": row["answers"]["answer_start"][0]}]}
        for row in rows
    ]
    flat = [{**row, "text": row["answers"]["text"][0], "start": row["answers"]["answer_start"][0]} for row in rows]
    lists = [{**row, "text": row["answers"]["text"], "start": row["answers"]["answer_start"]} for row in rows]
    expected = [[row["answers"][key] for row in rows] for key in ("text", "answer_start")]
    for given, options in (
        (rows, {}),
        (rows, {"answer": "answers"}),
        (objects, {}),
        (flat, {"answer": ["text", "start"]}),
        (lists, {"answer": ["text", "start"]}),
    ):
        task = task_of(given, **OF_KIND, **options)
        assert problems_of(task) == ""
        assert loaded(task, tmp_path) == expected
    whole, single = pa.Table.from_pylist(rows), pa.Table.from_pylist(objects)
    for table in (whole, single):
        pq.write_table(table, tmp_path / "rows.parquet")
        data = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "rows.parquet"))
        task = Task(name="mine", data=data, **OF_KIND)
        assert problems_of(task) == ""
        assert loaded(task, tmp_path) == expected
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "context", "text", "start"])
        writer.writerows([row[key] for key in ("question", "context", "text", "start")] for row in flat)
    data = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "rows.csv"))
    task = Task(name="mine", data=data, **OF_KIND, answer=["text", "start"])
    assert problems_of(task) == ""
    assert loaded(task, tmp_path) == expected


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"text": ["w2"], "answer_start": [4]}, "'w2' is not at 4, it begins at 3"),
        ({"text": ["w9"], "answer_start": [3]}, "'w9' is not at 3, it is nowhere in it"),
        ({"text": [], "answer_start": []}, "column 'answers.text' has no answer in row 12"),
        ({"text": [""], "answer_start": [0]}, "set unanswerable: true if models may answer with nothing"),
        ({"text": ["w2", " "], "answer_start": [3, 5]}, "holds an empty answer beside others in row 12"),
        ({"text": ["w2"], "answer_start": [3, 0]}, "must hold as many entries, but hold 1 and 2 in row 12"),
        ({"text": ["w2"], "answer_start": [-1]}, "must hold whole numbers from 0"),
        ({"text": ["w2"], "answer_start": [2.5]}, "must hold whole numbers from 0"),
        ({"text": [3], "answer_start": [3]}, "column 'answers.text' must hold texts, but holds the number 3"),
        ({"text": ["w2"]}, "must hold as many entries, but hold 1 and 0 in row 12"),
        (None, "has no answer in row 12"),
    ],
)
def test_answers_that_cannot_be_used_are_told(rows, task_of, problems_of, answers, told):
    wrong = {"question": "w0", "context": "w1 w2 w3", "answers": answers}
    assert told in problems_of(task_of([*rows, wrong], **OF_KIND))


def test_a_column_that_is_not_there_is_told(rows, task_of, problems_of):
    told = problems_of(task_of(rows, **OF_KIND, answer=["answers.texts", "answers.answer_start"]))
    assert "there is no column 'answers.texts'" in told


def test_rows_without_an_answer_may_be_allowed(rows, task_of, problems_of, tmp_path):
    none = {"question": "w0", "context": "w1 w2", "answers": {"text": [], "answer_start": []}}
    task = task_of([*rows, none], **OF_KIND, unanswerable=True)
    assert problems_of(task) == ""
    assert loaded(task, tmp_path)[0][-1] == []
    flat = [{"question": "w0", "context": "w1 w2", "a": text, "s": start} for text, start in (("w1", 0), ("", -1))]
    task = task_of(flat, **OF_KIND, unanswerable=True, answer=["a", "s"])
    assert problems_of(task) == ""
    assert loaded(task, tmp_path) == [[["w1"], []], [[0], []]]


def test_keys_that_do_not_go_together():
    for options, told in (
        ({"question": "context"}, "the column 'context' is named twice"),
        ({"doc_stride": 64, "training": {"max_length": 128}}, "'doc_stride' is 64, but must be at most a quarter"),
        ({"metrics": "accuracy"}, "metric 'accuracy' does not fit a question_answering task"),
    ):
        with pytest.raises(ValueError, match=told):
            Task(name="t", data={}, **OF_KIND, **options)


def encoded_row(task, tokenizer, row):
    columns = {"question": [row["question"]], "context": [row["context"]]}
    columns |= {name: [row["answers"][key]] for name, key in zip(task.answer, ("text", "answer_start"), strict=True)}
    return {name: value[0] for name, value in task.encode(columns, tokenizer).items()}


def test_windows_overlap_and_hold_every_answer(task_of, tiny_tokenizer):
    """Each window is question and a part of the context; together they have all of it, and neighbours share tokens."""
    words = [f"w{index}" for index in range(40)]
    context = " ".join(words)
    task = task_of([], **OF_KIND, doc_stride=3, training={"max_length": 16})
    for place, word in enumerate(words):
        answers = {"text": [word], "answer_start": [context.index(f"{word} ") if place < 39 else len(context) - 3]}
        row = encoded_row(task, tiny_tokenizer, {"question": "w90 w91", "context": context, "answers": answers})
        parts = []
        for ids, begins, ends, first, last in zip(
            *(row[key] for key in ("input_ids", "span_begins", "span_ends", "first_tokens", "last_tokens")), strict=True
        ):
            text = tiny_tokenizer.convert_ids_to_tokens(ids)
            assert text[:4] == ["[CLS]", "w90", "w91", "[SEP]"]
            known = [index for index in range(len(ids)) if ends[index] > begins[index]]
            part = [context[begins[index] : ends[index]] for index in known]
            assert part == [text[index] for index in known] == text[4:-1]
            assert (begins[0], ends[0]) == (0, 0)
            assert first == last == (text.index(word) if word in text else 0)
            parts.append(part)
        assert all(one[-3:] == other[:3] for one, other in pairwise(parts))
        assert [*parts[0], *(token for part in parts[1:] for token in part[3:])] == words
        assert row["length"] == sum(map(len, row["input_ids"]))


def test_long_questions_leave_half_of_a_window_to_the_context(task_of, tiny_tokenizer):
    task = task_of([], **OF_KIND, training={"max_length": 16})
    row = {"question": " ".join(["w1"] * 50), "context": "w5 w6 w7", "answers": {"text": ["w7"], "answer_start": [6]}}
    encoded = encoded_row(task, tiny_tokenizer, row)
    assert [len(ids) for ids in encoded["input_ids"]] == [6 + 3 + 3]
    assert encoded["first_tokens"] == [10]


def test_windows_without_room_are_refused(task_of, tiny_tokenizer, tmp_path):
    task = task_of([], **OF_KIND, doc_stride=2, training={"max_length": 8})
    assert task.processor_problem(tiny_tokenizer) == (
        "training.max_length 8 leaves no room for a question and 3 tokens of the context; raise it, or lower doc_stride"
    )


def module_of(task, tokenizer, tmp_path, batch_size=5):
    return TaskDataModule(task, tokenizer, seed=0, cache_dir=tmp_path / "cache", batch_size=batch_size)


def by_hand(model, tokenizer, row, most=30):
    """The best span of a short context, by trying all."""
    tokens = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
    offsets, parts = tokens.pop("offset_mapping")[0].tolist(), tokens.sequence_ids(0)
    with torch.no_grad():
        said = model(**tokens)
    first, last = said.start_logits[0].tolist(), said.end_logits[0].tolist()
    known = [index for index, part in enumerate(parts) if part == 1]
    spans = [(first[i] + last[j], i, j) for i in known for j in known if i <= j < i + most]
    value, i, j = max(spans)
    return row["context"][offsets[i][0] : offsets[j][1]], value, first[0] + last[0], said


@pytest.mark.parametrize("most", [30, 2])
def test_outputs_and_answers_are_those_of_transformers(rows, task_of, tiny_tokenizer, tmp_path, model, most):
    task = task_of(rows, **OF_KIND, max_answer_length=most)
    loader, found = (module := module_of(task, tiny_tokenizer, tmp_path)).val_dataloader(), []
    for batch in loader:
        with torch.no_grad():
            said, logits = task.predict(model, batch), task._logits(model, batch)
            outputs, targets = task.outputs(model, batch), task.targets(batch)
        assert int(said.broken) == 0
        assert len(outputs) == len(targets) == int(task.read_positions(batch).sum())
        found += list(zip(said.values, said.targets, logits, strict=True))
    assert len(found) == len(rows) == len(module.labels("validation"))
    for place, (value, targets, logits) in zip(loader.sampler, found, strict=True):
        text, _, _, whole = by_hand(model, tiny_tokenizer, rows[place], most)
        assert value == text
        assert targets == rows[place]["answers"]["text"]
        length = whole.start_logits.shape[1]
        expected = torch.stack([whole.start_logits[0], whole.end_logits[0]], dim=-1)
        assert torch.allclose(logits[:length], expected, atol=1e-6)


def test_the_best_span_of_all_windows_is_the_answer(task_of, tiny_tokenizer, tmp_path, model):
    """The larger sum of two logits over windows that are read one by one, whatever the batch."""
    rows = questions(random.Random(2), 9, longest=40)
    task = task_of(rows, **OF_KIND, doc_stride=4, training={"max_length": 16})
    answers = {}
    for size in (1, 4):
        loader, said = module_of(task, tiny_tokenizer, tmp_path, size).val_dataloader(), []
        for batch in loader:
            with torch.no_grad():
                said += task.predict(model, batch).values
        answers[size] = dict(zip(loader.sampler, said, strict=True))
    assert answers[1] == answers[4]
    for place, row in enumerate(rows):
        encoded, best = encoded_row(task, tiny_tokenizer, row), (-np.inf, "")
        for ids, types, begins, ends in zip(
            *(encoded[key] for key in ("input_ids", "token_type_ids", "span_begins", "span_ends")), strict=True
        ):
            with torch.no_grad():
                whole = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
            for i in range(len(ids)):
                for j in range(i, len(ids)):
                    if ends[i] > begins[i] and ends[j] > begins[j]:
                        value = float(whole.start_logits[0, i] + whole.end_logits[0, j])
                        best = max(best, (value, row["context"][begins[i] : ends[j]]))
        assert answers[1][place] == best[1]


def test_no_answer_where_it_is_the_likelier(rows, task_of, tiny_tokenizer, tmp_path, model):
    task = task_of(rows, **OF_KIND, unanswerable=True)
    loader, found = module_of(task, tiny_tokenizer, tmp_path).val_dataloader(), []
    for batch in loader:
        with torch.no_grad():
            found += task.predict(model, batch).values
    told = [by_hand(model, tiny_tokenizer, rows[place])[:3] for place in loader.sampler]
    assert found == ["" if none > value else text for text, value, none in told]
    assert 0 < found.count("") < len(found)


def test_loss_and_gradients_are_those_of_single_windows(rows, task_of, tiny_tokenizer, tmp_path, model):
    """Cross-entropy over context and first token; the Fisher information by autograd over all first and last tokens."""
    task = task_of(rows[:4], **OF_KIND)
    batches = list(module_of(task, tiny_tokenizer, tmp_path, 3).val_dataloader())
    fisher, magnitude = fisher_diagonal(model, task, batches), absolute_gradients(model, task, batches)
    name = "encoder.layer.0.output.dense.bias"
    parameter, lost, squares, sizes = model.bert.get_parameter(name), [], 0.0, 0.0
    for row in rows[:4]:
        encoded = encoded_row(task, tiny_tokenizer, row)
        tokens = tiny_tokenizer(row["question"], row["context"], return_tensors="pt")
        said, read = model(**tokens), [index for index, begin in enumerate(encoded["span_begins"][0]) if begin >= 0]
        logged = [logits[0][read].log_softmax(0) for logits in (said.start_logits, said.end_logits)]
        right = [read.index(encoded[key][0]) for key in ("first_tokens", "last_tokens")]
        loss = -(logged[0][right[0]] + logged[1][right[1]]) / 2
        lost.append(float(loss))
        sizes = sizes + torch.autograd.grad(loss, parameter, retain_graph=True)[0].double().abs()
        for part in logged:
            for one in part:
                (gradient,) = torch.autograd.grad(one, parameter, retain_graph=True)
                squares = squares + float(one.exp()) * gradient.double() ** 2
    whole = sum(float(task.loss(model, batch)) * len(batch["labels"]) for batch in batches)
    assert whole / 4 == pytest.approx(np.mean(lost), abs=1e-5)
    assert torch.allclose(fisher[name].double(), squares / 4, rtol=1e-4, atol=1e-8)
    assert torch.allclose(magnitude[name].double(), sizes / 4, rtol=1e-4, atol=1e-8)


def test_scores_are_those_of_squad():
    task = Task(name="t", data={}, **OF_KIND)
    metrics = task.build_metrics()
    metrics.update(["The cat!", "a big dog"], [["cat"], ["dog", "small big dog"]])
    metrics.update(["", "w"], [[""], [""]])
    # By hand: 1 and 1; 0 and 0.8 (two of two and of three words; articles do not count); 1 and 1; 0 and 0.
    assert scores(metrics) == pytest.approx({"exact_match": 0.5, "token_f1": 0.7}, abs=1e-6)


def test_what_single_answers_score_is_kept(rows, task_of, tiny_tokenizer, tmp_path, model):
    """So that means over rows are the scores, and rows can be drawn again; also from the file."""
    task = task_of(rows, **OF_KIND)
    model.save_pretrained(tmp_path / "expert")
    tiny_tokenizer.save_pretrained(tmp_path / "expert")
    expert = Checkpoint(tmp_path / "expert", "bert")
    trainer = build_trainer({"accelerator": "cpu", "devices": 1}, root=tmp_path, precision="32-true")
    data = SuiteData([module_of(task, tiny_tokenizer, tmp_path)], "test")
    scored = Evaluator([task], {"mine": expert}, expert).score(
        ExpertsCandidate({"mine": expert}), data, trainer, keep=True
    )["mine"]
    write_predictions(tmp_path / "kept.parquet", {"mine": scored.predictions}, {})
    kept = read_predictions(tmp_path / "kept.parquet")[0]["mine"]
    assert kept.means == ("token_f1", "exact_match")
    assert kept.rows.tolist() == [row for row in range(12) for _ in range(2)]
    texts = [by_hand(model, tiny_tokenizer, row)[0] for row in rows]
    exact = [text == row["answers"]["text"][0] for text, row in zip(texts, rows, strict=True)]
    assert kept.predictions.reshape(-1, 2)[:, 1].tolist() == exact
    again = ResampledTask([kept], 12, list(kept.means)).values(np.arange(12)[None])[0, :, 0]
    assert dict(zip(kept.means, again, strict=True)) == pytest.approx(scored.metrics, abs=1e-6)


def test_answers_that_no_window_has_whole_are_told(task_of, tiny_tokenizer, tmp_path):
    words = " ".join(f"w{index}" for index in range(30))
    row = {"question": "w1", "context": words, "answers": {"text": [words], "answer_start": [0]}}
    rows = [row, {**row, "answers": {"text": ["w0"], "answer_start": [0]}}]
    task = task_of(rows, **OF_KIND, training={"max_length": 16})
    (remark,) = module_of(task, tiny_tokenizer, tmp_path).encoded.remarks("train")
    assert "1 answers, first in row 0 (counted from 0), lie whole in no window" in remark


def test_random_examples_have_tokens_to_answer_with(task_of, tiny_tokenizer):
    task = task_of([], **OF_KIND, training={"max_length": 9})
    drawn = task.random_examples(tiny_tokenizer, 5, seed=1)
    rows = [{name: values[row] for name, values in drawn.items() if name != "length"} for row in range(5)]
    batch = task.collate(tiny_tokenizer)(rows)
    assert torch.equal(task.read_positions(batch), batch["input_ids"] > 3)
    assert task.predict(BertForQuestionAnswering(BertConfig(hidden_size=12, vocab_size=100)), batch).targets is None


@pytest.mark.parametrize("given", [False, True])
def test_a_whole_run(recipe_beside_words, recipe_of_experts, tmp_path, given):
    if given:
        settings = recipe_of_experts(questions, AutoModelForQuestionAnswering, **OF_KIND)
    else:
        settings = recipe_beside_words(questions, **OF_KIND)
    recipe = Recipe.model_validate(settings)
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert all(np.isfinite(float(row["mine/token_f1"])) for row in table)
    merged = load_merged(folder / "merged" / "task_arithmetic-plain", "mine")
    merged.save_pretrained(folder / "alone")
    alone = AutoModelForQuestionAnswering.from_pretrained(folder / "alone").eval()
    tokenizer, task = AutoTokenizer.from_pretrained(folder / "merged" / "task_arithmetic-plain"), recipe.task("mine")
    row = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])
    encoded = encoded_row(task, tokenizer, row)
    del encoded["length"]
    with torch.no_grad():
        batch = task.collate(tokenizer)([encoded])
        logits, said = task._logits(merged, batch)[0], task.predict(merged, batch).values
    text, _, _, whole = by_hand(alone, tokenizer, row)
    assert torch.allclose(logits, torch.stack([whole.start_logits[0], whole.end_logits[0]], dim=-1), atol=1e-6)
    assert said == [text]
