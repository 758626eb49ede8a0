"""Language models: losses and scores against plain loops, packing, prompts that are cut, bad rows, and whole runs."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig

from pave_lightning import Recipe, Task, TaskDataModule, load_merged, run_recipe
from pave_lightning.callbacks import PaveCallback
from pave_lightning.errors import PaveError
from pave_lightning.evaluation import Evaluator, ExpertsCandidate, SuiteData
from pave_lightning.experts.gradients import absolute_gradients, fisher_diagonal
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.tasks.kinds.generative import PROMPT_CUT
from pave_lightning.tasks.predictions import FILE, read_predictions
from pave_lightning.weights.architecture import Architecture

LENGTHS = {"training": {"max_length": 16, "batch_size": 5}, "max_new_tokens": 6}
OF_KIND = {"kind": "causal_lm", **LENGTHS, "metrics": ["chrf", "exact_match", "contains", "perplexity"]}


def tokens_by_hand(row, tokenizer):
    prompt, response = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "response"))
    return prompt, [*response, tokenizer.eos_token_id][:6]


def losses_by_hand(model, row, tokenizer):
    """The loss of each token of the response, of one row alone."""
    prompt, response = tokens_by_hand(row, tokenizer)
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(response), reduction="none")


def module_of(task, tokenizer, tmp_path):
    return TaskDataModule(task, tokenizer, seed=0, cache_dir=tmp_path / "cache", batch_size=task.training.batch_size)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_the_loss_is_that_of_the_responses_tokens(
    task_of, exchanges, language_model, writing_tokenizer, tmp_path, family
):
    rows, model = exchanges(11), language_model(family)
    task = task_of(rows, **OF_KIND)
    loader = module_of(task, writing_tokenizer, tmp_path).val_dataloader()
    order, done = list(loader.sampler), 0
    for batch in loader:
        count = len(batch["labels"])
        own = [rows[place] for place in order[done : done + count]]
        expected = torch.cat([losses_by_hand(model, row, writing_tokenizer).detach() for row in own])
        found = functional.cross_entropy(task.outputs(model, batch), task.targets(batch), reduction="none")
        assert torch.allclose(found, expected, atol=1e-5)
        assert float(task.loss(model, batch).detach()) == pytest.approx(float(expected.mean()), abs=1e-5)
        done += count
    assert done == len(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_batches_have_the_same_loss(
    task_of, exchanges, language_model, writing_tokenizer, tmp_path, family, attention
):
    task = task_of(exchanges(20), **{**OF_KIND, "training": {"max_length": 24, "batch_size": 10}}, packing=True)
    model = language_model(family, attn_implementation=attention)
    module = module_of(task, writing_tokenizer, tmp_path)
    rows = list(module.dataset("train").remove_columns("length"))[:10]
    plain, packed = module.collate(rows), module.collate_training(rows)
    assert len(packed["input_ids"]) < len(plain["input_ids"]) == len(packed["labels"]) == 10
    losses = [float(task.loss(model, batch).detach()) for batch in (packed, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("family", "packing", "told"),
    [
        ("llama", True, None),
        ("bloom", False, None),
        ("bloom", True, "cannot be told where in a sequence another row begins"),
        ("t5", False, "has an encoder and a decoder"),
        ("bart", False, "has an encoder and a decoder"),
    ],
)
def test_bases_that_do_not_fit_are_told(task_of, exchanges, language_model, family, packing, told):
    found = task_of(exchanges(4), **OF_KIND, packing=packing).base_problem(language_model(family).config)
    assert found is None if told is None else told in found


def test_encoders_go_on_from_no_prompt(task_of, exchanges):
    task = task_of(exchanges(4), **OF_KIND)
    assert "reads words that come later" in task.base_problem(BertConfig())
    assert task.base_problem(BertConfig(is_decoder=True)) is None


def test_scores_are_those_of_generate_by_hand(
    task_of, exchanges, language_base, writing_tokenizer, tmp_path, monkeypatch
):
    folder, rows = language_base("llama"), exchanges(21)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts, losses = [], []
    for row in rows:
        prompt, _ = tokens_by_hand(row, writing_tokenizer)
        with torch.no_grad():
            told = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, pad_token_id=0)
            losses.append(losses_by_hand(model, row, writing_tokenizer))
        texts.append(writing_tokenizer.decode(told[0, len(prompt) :], skip_special_tokens=True))
    rows[3]["response"] = texts[3]  # or else none would be right
    losses[3] = losses_by_hand(model, rows[3], writing_tokenizer).detach()
    task = task_of(rows, **OF_KIND)
    checkpoint = Architecture.of_folder(folder, task.auto_model).checkpoint(folder)
    for size in (1, 16):
        module = TaskDataModule(task, writing_tokenizer, seed=0, cache_dir=tmp_path / "cache", batch_size=size)
        trainer = build_trainer({"accelerator": "cpu", "devices": 1}, root=tmp_path, enable_progress_bar=False)
        evaluator = Evaluator([task], {"mine": checkpoint}, checkpoint)
        candidate = ExpertsCandidate({"mine": checkpoint})
        score = evaluator.score(candidate, SuiteData([module], "test"), trainer, keep=True)["mine"]
        assert list(score.predictions.predictions) == texts
        assert list(score.predictions.targets) == [(row["response"],) for row in rows]
        assert score.metrics["exact_match"] == pytest.approx(
            sum(text.split() == row["response"].split() for text, row in zip(texts, rows, strict=True)) / 21
        )
        assert score.metrics["perplexity"] == pytest.approx(math.exp(float(torch.cat(losses).mean())), rel=1e-5)
        assert score.broken == 0


@pytest.mark.parametrize(("named", "more"), [(3, set()), ([3, 7, 8], {7, 8}), (None, set())])
def test_settings_beside_the_tokenizer_name_what_ends_texts(task_of, exchanges, language_base, named, more):
    folder = language_base("llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    task = task_of(exchanges(4), **OF_KIND)
    assert set(task.ends(task.load_processor(folder))) == {3, *more}


def test_gradients_are_those_of_one_row_at_a_time(task_of, exchanges, language_model, writing_tokenizer, tmp_path):
    rows, model = exchanges(5), language_model("llama")
    task = task_of(rows, **OF_KIND)
    name = "model.layers.1.mlp.down_proj.weight"
    found = absolute_gradients(model, task, module_of(task, writing_tokenizer, tmp_path).val_dataloader())[name]
    expected = torch.zeros_like(found, dtype=torch.float64)
    for row in rows:
        loss = losses_by_hand(model, row, writing_tokenizer).mean()
        expected += torch.autograd.grad(loss, model.get_parameter(name))[0].abs().double() / len(rows)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-9)
    fisher = fisher_diagonal(model, task, module_of(task, writing_tokenizer, tmp_path).val_dataloader())[name]
    assert bool((fisher >= 0).all())
    assert float(fisher.sum()) > 0


def test_capture_counts_every_token_and_writes_nothing(
    task_of, exchanges, language_model, writing_tokenizer, tmp_path, monkeypatch
):
    from pave_lightning.experts.task_expert import TaskExpert

    rows, model = exchanges(9), language_model("llama")
    task = task_of(rows, **OF_KIND)
    monkeypatch.setattr(type(model), "generate", None)
    callback = PaveCallback(backbone="model", mask=task.mask)
    trainer = build_trainer({"accelerator": "cpu"}, root=tmp_path, callbacks=[callback], enable_progress_bar=False)
    trainer.validate(
        TaskExpert(model, task), module_of(task, writing_tokenizer, tmp_path).val_dataloader(), verbose=False
    )
    inputs = []
    handle = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _, args, __: inputs.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(
                input_ids=torch.tensor([[token for part in tokens_by_hand(row, writing_tokenizer) for token in part]])
            )
    handle.remove()
    seen = torch.cat(inputs).double()
    found = callback.statistics["model.layers.0.mlp.gate_proj"]
    assert found.rows == len(seen)
    assert torch.allclose(found.matrix.double(), seen.T @ seen / len(seen), atol=1e-5)


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-10, None)), ("right", slice(10))])
def test_long_prompts_are_cut_and_told(task_of, writing_tokenizer, tmp_path, side, kept):
    words = [f"w{index}" for index in range(14)]
    rows = [{"prompt": "w1", "response": "w2"}, {"prompt": " ".join(words), "response": "w3 " * 8}]
    task = task_of(rows, **OF_KIND, prompt_cut=side)
    module = module_of(task, writing_tokenizer, tmp_path)
    table = module.encoded.table("train")
    assert table.column(PROMPT_CUT).to_pylist() == [0, 4]
    assert table.column("input_ids").to_pylist()[1][:10] == list(range(4, 18))[kept]
    told = "\n".join(module.encoded.remarks("train"))
    assert f"1 prompts have more than 10 tokens and are cut on the {side}, first in row 1" in told
    assert "1 responses have more than 6 tokens" in told


def test_chats_are_read_and_bad_ones_told(task_of, problems_of, writing_tokenizer, chat_template, tmp_path):
    def chat(*texts, roles=("user", "assistant")):
        return {"chat": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}

    good = [chat("w1 w2", "w3"), chat("w1", "w2", "w3", "w4", roles=["user", "assistant"] * 2)]
    of_kind = {**OF_KIND, "training": {"max_length": 32}, "messages": "chat"}
    task = task_of(good, **of_kind)
    assert "has no chat template" in task.processor_problem(writing_tokenizer)
    writing_tokenizer.chat_template = chat_template
    try:
        batch = next(iter(module_of(task, writing_tokenizer, tmp_path).val_dataloader()))
        found = {writing_tokenizer.decode(row[row != 0]) for row in batch["input_ids"]}
        expected = {writing_tokenizer.apply_chat_template(row["chat"], tokenize=False).strip() for row in good}
        assert found == expected
        assert sorted(writing_tokenizer.decode(own) for own in (task.targets(batch)[:2], task.targets(batch)[2:])) == [
            "w3 </s>",
            "w4 </s>",
        ]
    finally:
        writing_tokenizer.chat_template = None
    bad = [
        *good,
        chat("w1", roles=["user"]),
        chat("w1", "w2", roles=["assistant", "user"]),
        chat("w1", "w2", roles=["user", "bot"]),
    ]
    told = problems_of(task_of(bad, **of_kind))
    for part in (
        "has a single message in row 2",
        "ends with another role in 3 rows, first in row 2",
        "holds the role 'bot' in row 4",
    ):
        assert part in told
    assert "holds nothing in entry 1" in problems_of(task_of([*good, chat("w1", " ")], **of_kind))


def test_empty_texts_are_refused_with_their_rows(task_of, problems_of):
    rows = [{"prompt": "w1", "response": "w2"}, {"prompt": "w1", "response": "  "}, {"prompt": "", "response": "w3"}]
    told = problems_of(task_of(rows, **OF_KIND))
    assert "column 'response' holds an empty text in row 1 (counted from 0), line 2" in told
    assert "column 'prompt' holds an empty text in row 2" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"metrics": ["perplexity"]}, "better the lower it is"),
        ({"max_new_tokens": 16}, "leaves nothing of training.max_length"),
        ({"stop": [""]}, "must not hold an empty text"),
        ({"system": "w1"}, "only concerns chats"),
        ({"response": "prompt"}, "both name the column 'prompt'"),
        ({"metrics": ["accuracy"]}, "does not fit a causal_lm task"),
    ],
)
def test_keys_that_do_not_go_together(options, told):
    with pytest.raises(ValueError, match=told):
        Task(name="t", data={}, **{**OF_KIND, **options})


def test_a_tokenizer_without_an_end_is_told(task_of, exchanges, writing_tokenizer):
    task = task_of(exchanges(4), **OF_KIND)
    before, writing_tokenizer.eos_token = writing_tokenizer.eos_token, None
    try:
        assert "has no end-of-text token" in task.processor_problem(writing_tokenizer)
    finally:
        writing_tokenizer.eos_token = before


@pytest.fixture
def recipe_of_writers(language_base, exchanges, write_rows, tmp_path, tracking_uri):
    """Two tasks of a tiny language model."""

    def build(family, kind, **options):
        tasks = []
        for place in range(2):
            rows = exchanges(70, seed=place, first=40 * place)
            parts = {"train": rows[:48], "validation": rows[48:58], "test": rows[58:]}
            data = {split: write_rows(f"{place}-{split}", part) for split, part in parts.items()}
            tasks.append({**OF_KIND, "name": f"t{place}", "kind": kind, "data": data})
        return {
            "name": "writers",
            "base": str(language_base(family, **options.pop("config", {}))),
            "output": str(tmp_path / "runs"),
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
            "training": {"learning_rate": 3e-3, "batch_size": 8, "max_length": 16, **options.pop("training", {})},
            "tasks": [{**task, "training": {}} for task in tasks],
            "capture": {"examples": 16},
            "merge": [{"method": "task_arithmetic", "scale": 0.5}],
            "tracking": {"uri": tracking_uri},
            **options,
        }

    return build


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"training": {"lora": {"rank": 2}}, "config": {"tie_word_embeddings": True}}),
        pytest.param("llama", {"training": {"lora": {"rank": 2}}}, marks=pytest.mark.slow),
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
        pytest.param("bloom", {}, marks=pytest.mark.slow),
    ],
)
def test_a_whole_run(recipe_of_writers, tmp_path, family, options):
    recipe = Recipe.model_validate(recipe_of_writers(family, "causal_lm", **options))
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert all(np.isfinite(float(row[f"t{place}/chrf"])) for row in table for place in range(2))
    merged = folder / "merged" / "task_arithmetic-purified"
    alone, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    kept, _ = read_predictions(folder / "scores" / "task_arithmetic-purified" / FILE)
    for place, task in enumerate(recipe.tasks):
        rows = [json.loads(line) for line in Path(task.data.test).read_text().splitlines()]
        held = load_merged(merged, task.name)
        for row, written in zip(rows, kept[task.name].predictions, strict=True):
            prompt = torch.tensor([tokens_by_hand(row, tokenizer)[0]])
            with torch.no_grad():
                told = [
                    model.generate(prompt, do_sample=False, max_new_tokens=6, pad_token_id=0)[0, prompt.shape[1] :]
                    for model in (alone, held)
                ]
            assert torch.equal(*told)
            assert tokenizer.decode(told[0], skip_special_tokens=True) == written
        assert not list((merged / "heads" / task.name / "head.safetensors").parent.glob("*.bin")), place


def test_heads_that_are_to_be_fitted_are_refused(recipe_of_writers, tmp_path):
    recipe = Recipe.model_validate(recipe_of_writers("llama", "causal_lm", heads=["labels"]))
    with pytest.raises(PaveError, match="tasks of kind causal_lm \\('t0', 't1'\\) have no head to fit"):
        check_recipe(recipe, RunFolder(tmp_path / "plan"))
