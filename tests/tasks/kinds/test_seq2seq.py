"""Models with encoder and decoder: losses and texts against plain loops, capture of both, and whole runs."""

import csv

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from pave_lightning import Recipe, TaskDataModule, run_recipe
from pave_lightning.callbacks import PaveCallback
from pave_lightning.experts.gradients import absolute_gradients
from pave_lightning.experts.task_expert import TaskExpert
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.tasks.predictions import FILE, read_predictions

OF_KIND = {
    "kind": "seq2seq",
    "training": {"max_length": 12, "batch_size": 4},
    "max_new_tokens": 6,
    "metrics": ["chrf", "exact_match", "perplexity"],
}
START, END = 0, 3


def tokens_by_hand(row, tokenizer):
    prompt, response = (tokenizer(row[name])["input_ids"] for name in ("prompt", "response"))
    return prompt, [*response, END]


def losses_by_hand(model, row, tokenizer):
    prompt, response = tokens_by_hand(row, tokenizer)
    decoder = torch.tensor([[START, *response[:-1]]])
    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
    return functional.cross_entropy(logits, torch.tensor(response), reduction="none")


def module_of(task, tokenizer, tmp_path):
    return TaskDataModule(task, tokenizer, seed=0, cache_dir=tmp_path / "cache", batch_size=4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_losses_gradients_and_texts_are_those_of_single_rows(
    task_of, exchanges, language_model, writing_tokenizer, tmp_path, family
):
    rows, model = exchanges(9), language_model(family)
    model.generation_config.forced_eos_token_id = None
    task = task_of(rows, **OF_KIND)
    loader = module_of(task, writing_tokenizer, tmp_path).val_dataloader()
    order, done, written = list(loader.sampler), 0, {}
    for batch in loader:
        own = [rows[place] for place in order[done : done + len(batch["labels"])]]
        expected = torch.cat([losses_by_hand(model, row, writing_tokenizer) for row in own])
        found = task.outputs(model, batch)
        losses = functional.cross_entropy(found, task.targets(batch), reduction="none")
        assert torch.allclose(losses, expected, atol=1e-5)
        said = task.respond(model, batch, writing_tokenizer)
        assert torch.allclose(said.further["losses"], expected, atol=1e-5)
        written |= dict(zip(order[done : done + len(own)], said.values, strict=True))
        done += len(own)
    for place, row in enumerate(rows):
        prompt = torch.tensor([tokens_by_hand(row, writing_tokenizer)[0]])
        told = model.generate(prompt, do_sample=False, num_beams=1, max_new_tokens=6)[0]
        assert writing_tokenizer.decode(told, skip_special_tokens=True) == written[place]
    name = (
        next(name for name, _ in model.named_parameters() if "decoder" in name and name.endswith("fc1.weight"))
        if (family == "bart")
        else "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    )
    total = torch.zeros_like(model.get_parameter(name), dtype=torch.float64)
    for row in rows:
        loss = losses_by_hand(model, row, writing_tokenizer).mean()
        total += torch.autograd.grad(loss, model.get_parameter(name))[0].abs().double() / len(rows)
    taken = absolute_gradients(model, task, module_of(task, writing_tokenizer, tmp_path).val_dataloader())[name]
    assert torch.allclose(taken.double(), total, rtol=1e-3, atol=1e-8)


def test_capture_counts_prompts_in_the_encoder_and_responses_in_the_decoder(
    task_of, exchanges, language_model, writing_tokenizer, tmp_path
):
    rows, model = exchanges(9), language_model("t5")
    task = task_of(rows, **OF_KIND)
    callback = PaveCallback(backbone="model", mask=task.mask)
    trainer = build_trainer({"accelerator": "cpu"}, root=tmp_path, callbacks=[callback], enable_progress_bar=False)
    loader = module_of(task, writing_tokenizer, tmp_path).val_dataloader()
    trainer.validate(TaskExpert(model, task), loader, verbose=False)
    lengths = [list(map(len, tokens_by_hand(row, writing_tokenizer))) for row in rows]
    prompts, responses = map(sum, zip(*lengths, strict=True))
    expected = {
        "encoder.block.1.layer.0.SelfAttention.q": prompts,
        "decoder.block.1.layer.0.SelfAttention.q": responses,
        "decoder.block.1.layer.1.EncDecAttention.q": responses,
        "decoder.block.1.layer.1.EncDecAttention.k": prompts,
        "decoder.block.1.layer.2.DenseReluDense.wi": responses,
    }
    assert {name: callback.statistics[name].rows for name in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize(("family", "training"), [("t5", {}), ("t5", {"lora": {"rank": 2}}), ("bart", {})])
def test_a_whole_run(language_base, exchanges, write_rows, tmp_path, tracking_uri, family, training):
    tasks = []
    for place in range(2):
        rows = exchanges(70, seed=place, first=40 * place)
        parts = {"train": rows[:48], "validation": rows[48:58], "test": rows[58:]}
        data = {split: write_rows(f"{place}-{split}", part) for split, part in parts.items()}
        tasks.append({**OF_KIND, "name": f"t{place}", "data": data, "training": training})
    recipe = Recipe.model_validate(
        {
            "name": "writers",
            "base": str(language_base(family)),
            "output": str(tmp_path / "runs"),
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
            "training": {"learning_rate": 3e-3, "batch_size": 8, "max_length": 12},
            "tasks": tasks,
            "capture": {"examples": 16},
            "merge": [{"method": "task_arithmetic", "scale": 0.5}],
            "tracking": {"uri": tracking_uri},
        }
    )
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert all(np.isfinite(float(row[f"t{place}/chrf"])) for row in table for place in range(2))
    merged = folder / "merged" / "task_arithmetic-purified"
    alone, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    kept, _ = read_predictions(folder / "scores" / "task_arithmetic-purified" / FILE)
    rows = exchanges(70)[58:]
    for row, written in zip(rows, kept["t0"].predictions, strict=True):
        prompt = torch.tensor([tokens_by_hand(row, tokenizer)[0]])
        told = alone.generate(prompt, do_sample=False, num_beams=1, max_new_tokens=6)[0]
        assert tokenizer.decode(told, skip_special_tokens=True) == written
