"""Weights in parts: how they are found, and trainings that end where those of one process do."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from pave_lightning import Task
from pave_lightning.errors import Interrupted
from pave_lightning.experts.fitting import fit_expert, save_expert
from pave_lightning.experts.sharding import block_stacks, blocks
from pave_lightning.experts.task_expert import TaskExpert
from several_processes import run_together

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
FAMILIES = {
    "bert": (SMALL, ["encoder.layer"]),
    "llama": ({**SMALL, "num_key_value_heads": 2}, ["layers"]),
    "gpt2": ({"n_embd": 16, "n_layer": 3, "n_head": 2}, ["h"]),
    "vit": ({**SMALL, "image_size": 8, "patch_size": 4}, ["layers"]),
    # A mixture's experts are chosen by the data, so no list inside of a block counts.
    "mixtral": ({**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}, ["layers"]),
    "t5": ({"d_model": 16, "num_layers": 3, "num_heads": 2, "d_kv": 8, "d_ff": 16}, ["encoder.block", "decoder.block"]),
    "bart": (
        {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        ["encoder.layers", "decoder.layers"],
    ),
    # One group of layers that is run again and again.
    "albert": ({**SMALL, "embedding_size": 8}, []),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_by_structure(family):
    options, expected = FAMILIES[family]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **options))
    assert list(block_stacks(model)) == expected
    assert len(blocks(model)) == sum(len(model.get_submodule(name)) for name in expected)


def test_lists_of_single_layers_are_no_blocks():
    model = nn.ModuleDict({"tables": nn.ModuleList([nn.Embedding(2, 2), nn.Embedding(2, 2)])})
    assert block_stacks(model) == {}


@pytest.fixture(scope="session")
def still_base(make_base):
    """A base that drops nothing out, so that processes need not draw what one process draws."""
    return make_base(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture
def make_task(task_files):
    def build(world, strategy=None, trainer=(), **training):
        strategy = strategy or ("fsdp2" if world > 1 else "auto")
        return Task.model_validate(
            {
                "name": "words",
                "data": task_files(),
                "text": "text",
                "classes": ["low", "high"],
                "trainer": {
                    **{"accelerator": "cpu", "devices": world, "strategy": strategy},
                    **{"max_epochs": 2, "enable_progress_bar": False},
                    **dict(trainer),
                },
                "training": {
                    **{"learning_rate": 3e-3, "batch_size": 16 // world, "max_length": 16, "warmup_share": 0.0},
                    **training,
                },
            }
        )

    return build


def fit(rank, task, base, folder, stops=False):
    """Fit and save as the stage does; where it stops, in the second epoch, and then once more."""
    if stops:
        begin = TaskExpert.on_train_epoch_start

        def stop(self):
            if self.current_epoch == 1:
                raise KeyboardInterrupt
            begin(self)

        TaskExpert.on_train_epoch_start = stop
        try:
            fit_expert(task, base, seed=0, work_folder=folder / "work", cache_folder=folder / "cache")
        except Interrupted:
            (folder / f"stopped{rank}").touch()
        TaskExpert.on_train_epoch_start = begin
    model, metrics = fit_expert(task, base, seed=0, work_folder=folder / "work", cache_folder=folder / "cache")
    (folder / f"metrics{rank}.json").write_text(json.dumps(metrics))
    if rank == 0:
        (folder / "expert").mkdir()
        save_expert(model, base, folder / "expert", work_folder=folder / "work")


def fitted(make_task, base, folder, world, *, stops=False, **options):
    """The weights that several processes train, and the metrics that they are told."""
    folder.mkdir()
    if world == 1:
        fit(0, make_task(1, **options), base, folder)
    else:
        run_together(fit, world, make_task(world, **options), base, folder, stops)
    metrics = [json.loads((folder / f"metrics{rank}.json").read_text()) for rank in range(world)]
    assert metrics == [metrics[0]] * world
    return load_file(folder / "expert" / "model.safetensors"), metrics[0]


CASES = {
    "plain": {},
    # Scores of a constant answer are 0.5, of which no better one is to be expected after few steps.
    "economical": {
        "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        "activation_checkpointing": True,
        "compile": {"backend": "eager"},
    },
    "lora": {"lora": {"rank": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_divided_weights_are_trained_as_whole_ones(make_task, still_base, tmp_path, case):
    alone, score = fitted(make_task, still_base, tmp_path / "one", 1, **CASES[case])
    found, other = fitted(make_task, still_base, tmp_path / "two", 2, **CASES[case])
    assert other == pytest.approx(score, abs=1e-6)
    assert list(found) == list(alone)
    before = load_file(still_base / "model.safetensors")
    moved = [name for name, value in before.items() if not torch.equal(value, alone.get(f"bert.{name}", value))]
    assert moved
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two" / "expert")
    assert type(model).__name__ == "BertForSequenceClassification"
    if case == "lora":
        assert (tmp_path / "two" / "expert" / "adapter").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain"])
def test_four_processes_train_as_one(make_task, still_base, tmp_path, case):
    alone, score = fitted(make_task, still_base, tmp_path / "one", 1, **CASES[case])
    found, other = fitted(make_task, still_base, tmp_path / "four", 4, **CASES[case])
    assert other == pytest.approx(score, abs=1e-6)
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)


def test_a_training_with_divided_weights_goes_on_where_it_stopped(make_task, still_base, tmp_path):
    whole, score = fitted(make_task, still_base, tmp_path / "whole", 2)
    resumed, other = fitted(make_task, still_base, tmp_path / "resumed", 2, stops=True)
    assert all((tmp_path / "resumed" / f"stopped{rank}").exists() for rank in range(2))
    assert other == score
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)


def test_no_process_but_the_first_writes(make_task, still_base, tmp_path):
    fitted(make_task, still_base, tmp_path / "two", 2)
    files = {os.path.relpath(path, tmp_path / "two" / "expert") for path in (tmp_path / "two" / "expert").rglob("*")}
    assert {"model.safetensors", "config.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".ckpt", ".pt"))]


@pytest.mark.cuda
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_strategies_for_gpus_train_and_save(make_task, still_base, tmp_path, strategy):
    """One GPU will do; the run itself is that of the command, in a process of its own."""
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    options = {"strategy": strategy, "trainer": {"accelerator": "gpu", "devices": 1}}
    folder = tmp_path / "gpu"
    folder.mkdir()
    run_together(fit, 1, make_task(1, **options), still_base, folder)
    alone, _ = fitted(make_task, still_base, tmp_path / "one", 1)
    found = load_file(folder / "expert" / "model.safetensors")
    assert list(found) == list(alone)
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)
