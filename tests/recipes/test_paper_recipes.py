"""The recipes of the paper, run on tiny models of the same architectures and a few rows in the layout of GLUE."""

import csv
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as hf

from pave_lightning import load_recipe
from pave_lightning.cli import main

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
    "vocab_size": 100,
    "pad_token_id": 0,
}
BASES = {
    "glue_roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**SIZES, type_vocab_size=1), add_pooling_layer=False),
    "glue_deberta": lambda: hf.DebertaModel(
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
    """What a paper's recipe of GLUE is run with here: overrides that name a base, experts and rows of one's own."""

    def build(name):
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            BASES[name]().save_pretrained(folder / "base")
            tiny_tokenizer.save_pretrained(folder / "base")
            settings = [f"base={folder / 'base'}", f"output={folder / 'runs'}", f"tracking.uri={tracking_uri}"]
            for task, (_, outputs) in GLUE.items():
                model = hf.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=outputs)
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
                model.save_pretrained(folder / "experts" / task)  # without a tokenizer, as Trainer's checkpoints may be
                settings.append(f"tasks.{task}.expert.from={folder / 'experts' / task}")
                settings.append(f"tasks.{task}.data.folder={glue_folder}")
        settings += ["capture.examples=16", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
        return folder, [part for setting in settings for part in ("--set", setting)]

    return build


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_recipe_of_glue_runs_from_the_plan_to_the_table(name, stand_ins, capsys):
    folder, settings = stand_ins(name)
    recipe = str(PAPER / f"{name}.yaml")
    assert main(["plan", recipe, *settings]) == 0
    print(capsys.readouterr().out)
    assert main(["run", recipe, *settings]) == 0
    with (folder / "runs" / name / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    scored = {(row["model"], row["vectors"]) for row in rows}
    assert {("base", ""), ("experts", "")} < scored
