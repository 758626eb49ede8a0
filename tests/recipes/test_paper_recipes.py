"""The recipes of the paper: their published values, and whole runs on tiny models of the same architectures."""

import csv
import random
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as hf
from rich.console import Console
from safetensors.torch import load_file, save_file

from pave_lightning import load_recipe
from pave_lightning.cli import main
from pave_lightning.pipeline.commands import plan_recipe

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
RECIPES = sorted(PAPER.glob("*.yaml"))
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
    "vocab_size": 100,
    "pad_token_id": 0,
}
# As the hub has them: with the head of the pretraining.
BASES = {
    "glue_roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES, type_vocab_size=1)),
    "glue_deberta": lambda: hf.DebertaForMaskedLM(
        hf.DebertaConfig(**SIZES, type_vocab_size=0, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
}
GLUE = {
    "cola": (["sentence"], 2),
    "sst2": (["sentence"], 2),
    "mrpc": (["sentence1", "sentence2"], 2),
    "stsb": (["sentence1", "sentence2"], 1),
    "qqp": (["question1", "question2"], 2),
    "mnli": (["premise", "hypothesis"], 3),
    "qnli": (["question", "sentence"], 2),
    "rte": (["sentence1", "sentence2"], 2),
}
# Scale and ratio of each method, from the commands of the published code.
PUBLISHED = {
    "glue_roberta": {"task_arithmetic": (0.3, 0.96875), "ties": (0.9, 0.984375), "emr": (None, 0.875)},
    "glue_deberta": {"task_arithmetic": (0.1, 0.96875), "ties": (0.5, 0.984375), "emr": (None, 0.875)},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read_and_is_named_after_its_file(path):
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_scales_and_ratios_are_the_published_ones(name):
    recipe = load_recipe(PAPER / f"{name}.yaml")
    found = {step.method: (step.scale, step.purify.rho) for step in recipe.merge if step.name in PUBLISHED[name]}
    assert found == PUBLISHED[name]
    assert [task.name for task in recipe.tasks] == list(GLUE)
    assert recipe.capture.rows == 4096


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory):
    """GLUE as its copies lie on machines without the hub: the hub's parquet files, or exported as csv."""
    folder, draw = tmp_path_factory.mktemp("glue"), random.Random(0)
    for number, (task, (columns, classes)) in enumerate(GLUE.items()):
        (folder / task).mkdir()
        splits = ["train", "validation_matched", "validation_mismatched"] if task == "mnli" else ["train", "validation"]
        for split in splits:
            rows = [
                {name: " ".join(f"w{draw.randrange(96)}" for _ in range(draw.randrange(3, 9))) for name in columns}
                | {"label": round(draw.uniform(0, 5), 2) if classes == 1 else place % classes, "idx": place}
                for place in range(60 if split == "train" else 18)
            ]
            if number % 2:
                pd.DataFrame(rows).to_csv(folder / task / f"{split}.csv", index=False)
            else:
                pd.DataFrame(rows).to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def stand_ins(glue_folder, tiny_tokenizer, tmp_path_factory, tracking_uri):
    """Overrides that name a tiny base, experts and rows in place of those of a recipe of GLUE."""

    def build(name):
        folder = tmp_path_factory.mktemp(name)
        hf.utils.logging.set_verbosity_error()  # heads are new
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            BASES[name]().save_pretrained(folder / "base")
            tokenizer = hf.PreTrainedTokenizerFast(
                tokenizer_object=tiny_tokenizer.backend_tokenizer,
                model_input_names=["input_ids", "attention_mask"],
                **tiny_tokenizer.special_tokens_map,
            )
            tokenizer.save_pretrained(folder / "base")
            overrides = [f"base={folder / 'base'}", f"output={folder / 'runs'}", f"tracking.uri={tracking_uri}"]
            for task, (_, outputs) in GLUE.items():
                model = hf.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=outputs)
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
                expert = folder / "experts" / task
                model.save_pretrained(expert)  # without a tokenizer, as Trainer's checkpoints may be
                weights = load_file(expert / "model.safetensors")
                buffer = f"{name.removeprefix('glue_')}.embeddings.position_ids"  # which older releases stored
                positions = torch.arange(SIZES["max_position_embeddings"])[None]
                save_file({**weights, buffer: positions}, expert / "model.safetensors", metadata={"format": "pt"})
                overrides.append(f"tasks.{task}.expert.from={expert}")
                overrides.append(f"tasks.{task}.data.folder={glue_folder}")
        hf.utils.logging.set_verbosity_warning()
        return folder, [*overrides, "capture.examples=16", "trainer.enable_progress_bar=false"]

    return build


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_recipe_of_glue_can_be_planned(name, stand_ins):
    _, overrides = stand_ins(name)
    shown = StringIO()
    plan_recipe(load_recipe(PAPER / f"{name}.yaml", overrides), console=Console(file=shown, width=200))
    for task in GLUE:
        assert task in shown.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BASES))
def test_a_recipe_of_glue_runs_from_one_file(name, stand_ins):
    folder, overrides = stand_ins(name)
    path = str(PAPER / f"{name}.yaml")
    settings = [part for override in overrides for part in ("--set", override)]
    assert main(["run", path, *settings]) == 0
    root = folder / "runs" / name
    with (root / "results.csv").open() as stream:
        rows = {(row["model"], row["vectors"]): row for row in csv.DictReader(stream)}
    both = {(step, vectors) for step in ("average", *PUBLISHED[name]) for vectors in ("plain", "purified")}
    assert rows.keys() == both | {("emr_script", "purified"), ("base", ""), ("experts", "")}
    primary = {"cola": "matthews", "stsb": "pearson"}
    for task in GLUE:
        assert all(float(row[f"{task}/{primary.get(task, 'accuracy')}"]) >= -1 for row in rows.values())
    scale, _ = PUBLISHED[name]["task_arithmetic"]
    prefix, weight = name.removeprefix("glue_"), "encoder.layer.1.output.dense.weight"
    base = load_file(folder / "base" / "model.safetensors")[f"{prefix}.{weight}"]
    experts = [load_file(folder / "experts" / task / "model.safetensors")[f"{prefix}.{weight}"] for task in GLUE]
    merged = load_file(root / "merged" / "task_arithmetic-plain" / "model.safetensors")[weight]
    assert torch.allclose(merged, base + scale * sum(expert - base for expert in experts), atol=1e-6)
    purified = load_file(root / "merged" / "task_arithmetic-purified" / "model.safetensors")[weight]
    assert not torch.allclose(merged, purified, atol=1e-6)
