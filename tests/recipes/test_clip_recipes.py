"""The recipes of CLIP's suites: their published values, and plans and whole runs on tiny stand-ins, from one file."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from pave_lightning import load_recipe
from pave_lightning.cli import main
from pave_lightning.pipeline.commands import plan_recipe
from pave_lightning.tasks.clip_suite import CLIP_TASKS

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
BASES = {"b32": "clip-vit-base-patch32", "b16": "clip-vit-base-patch16", "l14": "clip-vit-large-patch14"}
SUITES = (8, 14, 20)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
# What stands for the classes that the data sets name.
OWN_CLASSES = [f"w{index}" for index in range(6)]


@pytest.mark.parametrize("tasks", SUITES)
@pytest.mark.parametrize("model", BASES)
def test_values_are_the_published_ones(model, tasks):
    recipe = load_recipe(PAPER / f"clip_vit_{model}_{tasks}tasks.yaml")
    assert recipe.base == f"openai/{BASES[model]}"
    assert [task.name for task in recipe.tasks] == list(CLIP_TASKS)[:tasks]
    for task in recipe.tasks:
        start, _, end = str(task.expert.from_).partition("_")
        assert start == f"tanganke/{BASES[model]}"
        assert end.replace("-", "_") == task.name
    steps = {step.method: step for step in recipe.merge}
    assert {name: step.scale for name, step in steps.items() if step.scale} == {"task_arithmetic": 0.3, "ties": 0.3}
    assert steps["ties"].options == {"density": 0.2, "merge": "sum"}
    assert steps["emr"].purify.rho == 0.984375
    assert recipe.capture.rows == 4096


def test_names_of_classes_are_as_many_as_the_data_sets_have():
    found = {name: len(task["classes"]) for name, task in CLIP_TASKS.items() if "classes" in task}
    expected = {"resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47, "pcam": 2, "fer2013": 7}
    expected |= {"stl10": 10, "cifar10": 10, "fashion_mnist": 10, "emnist_letters": 26, "kmnist": 10}
    assert found == expected | {"rendered_sst2": 2}
    assert all(len(set(task["classes"])) == found[name] for name, task in CLIP_TASKS.items() if name in found)


def png(drawn):
    stream = io.BytesIO()
    Image.fromarray(drawn.integers(0, 256, (9, 8, 3)).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_rows(folder, name, known):
    """A data set as the hub has it, in a folder."""
    drawn = np.random.default_rng(len(name))
    image, label = known.get("image", "image"), known.get("label", "label")
    classes = known.get("classes", OWN_CLASSES)
    place = folder / name / known["data"].get("config", "")
    place.mkdir(parents=True)
    for split, count in (("train", 30), (known["data"].get("test", "test"), 8)):
        images = [{"bytes": png(drawn), "path": None} for _ in range(count)]
        table = pa.table({image: images, label: [index % len(classes) for index in range(count)]})
        if "classes" not in known:
            features = {"info": {"features": {label: {"_type": "ClassLabel", "names": classes}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, place / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="session")
def stand_ins(tiny_tokenizer, tmp_path_factory, tracking_uri):
    """Overrides that name a tiny base, vision encoders and rows in place of those of a recipe."""

    def build(tasks):
        folder = tmp_path_factory.mktemp("clip")
        text = {**SIZES, "vocab_size": 100, "max_position_embeddings": 77, "pad_token_id": 0, "eos_token_id": 3}
        vision = {**SIZES, "image_size": 8, "patch_size": 4, "projection_dim": 8}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
            hf.CLIPModel(config).save_pretrained(folder / "base")
            tiny_tokenizer.save_pretrained(folder / "base")
            processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8)
            processor.save_pretrained(folder / "base")
            overrides = [f"base={folder / 'base'}", f"output={folder / 'runs'}", f"tracking.uri={tracking_uri}"]
            for name in list(CLIP_TASKS)[:tasks]:
                tower = hf.CLIPVisionModel.from_pretrained(folder / "base")
                for parameter in tower.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
                tower.save_pretrained(folder / "experts" / name)
                write_rows(folder / "data", name, CLIP_TASKS[name])
                overrides.append(f"tasks.{name}.expert.from={folder / 'experts' / name}")
                overrides.append(f"tasks.{name}.data.folder={folder / 'data' / name}")
        return folder, [*overrides, "capture.examples=8", "trainer.accelerator=cpu"]

    return build


def test_a_recipe_of_clip_can_be_planned(stand_ins):
    _, overrides = stand_ins(8)
    shown = io.StringIO()
    recipe = load_recipe(PAPER / "clip_vit_b32_8tasks.yaml", overrides)
    plan_recipe(recipe, console=Console(file=shown, width=200))
    for task in recipe.tasks:
        assert task.name in shown.getvalue()
    assert recipe.task("sun397").class_names == tuple(OWN_CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tasks"), [("b32", 8), ("b16", 14), ("l14", 20)])
def test_a_recipe_of_clip_runs_from_one_file(model, tasks, stand_ins):
    folder, overrides = stand_ins(tasks)
    name = f"clip_vit_{model}_{tasks}tasks"
    settings = [part for override in overrides for part in ("--set", override)]
    assert main(["run", str(PAPER / f"{name}.yaml"), *settings]) == 0
    root = folder / "runs" / name
    with (root / "results.csv").open() as stream:
        rows = {(row["model"], row["vectors"]): row for row in csv.DictReader(stream)}
    steps = ("average", "task_arithmetic", "ties", "emr")
    assert rows.keys() == {("base", ""), ("experts", "")} | {
        (one, two) for one in steps for two in ("plain", "purified")
    }
    used = list(CLIP_TASKS)[:tasks]
    assert all(0 <= float(row[f"{task}/accuracy"]) <= 1 for row in rows.values() for task in used)
    base = load_file(folder / "base" / "model.safetensors")
    merged = load_file(root / "merged" / "task_arithmetic-plain" / "model.safetensors")
    experts = [hf.CLIPVisionModel.from_pretrained(folder / "experts" / task).state_dict() for task in used]
    for key, value in merged.items():
        own = key.removeprefix("vision_model.")
        change = sum(expert[own] - base[key] for expert in experts) if key.startswith("vision_model.") else 0
        assert torch.allclose(value, base[key] + 0.3 * change, atol=1e-5), key
