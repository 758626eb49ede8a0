"""One class for an image: what is read, what is told, what a model is given, and a whole run."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor, ViTModel, pipeline

from pave_lightning import Recipe, load_merged, run_recipe
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def picture(drawn, colour, size=(12, 12)):
    noise = drawn.integers(-30, 30, (*size, 3))
    return Image.fromarray(np.clip(np.asarray(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_folder(folder, count, seed):
    drawn = np.random.default_rng(seed)
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for index in range(count):
            picture(drawn, colour).save(folder / colour / f"{index}.png")
    return str(folder)


def write_parquet(path, count, seed):
    """Bright or dark, as `datasets` writes images."""
    drawn = np.random.default_rng(seed)
    rows, labels = [], []
    for index in range(count):
        dark = index % 2
        values = drawn.integers(0, 100, (9, 15, 3)) + (0 if dark else 150)
        rows.append({"bytes": png(Image.fromarray(values.astype(np.uint8))), "path": None})
        labels.append(["bright", "dark"][dark])
    pq.write_table(pa.table({"picture": rows, "label": labels}), path)
    return str(path)


SPLITS = {"train": (16, 0), "validation": (6, 1), "test": (8, 2)}


@pytest.fixture
def colours(tmp_path):
    """A task whose images lie in folders."""
    data = {split: write_folder(tmp_path / "colours" / split, *how) for split, how in SPLITS.items()}
    return {"name": "colours", "kind": "image_classification", "data": data, "classes": list(COLOURS)}


@pytest.fixture
def brightness(tmp_path):
    """A task whose images lie in a table."""
    data = {
        split: write_parquet(tmp_path / f"{split}.parquet", 2 * count, seed) for split, (count, seed) in SPLITS.items()
    }
    return {
        "name": "brightness",
        "kind": "image_classification",
        "data": data,
        "image": "picture",
        "classes": ["bright", "dark"],
    }


@pytest.fixture
def vit(tmp_path):
    """The folder of a tiny random ViT with its image processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def settings(settings_in, vit, colours, brightness, tmp_path):
    found = settings_in(tmp_path / "runs")
    return {
        **found,
        "base": str(vit),
        "tasks": [colours, brightness],
        "training": {"learning_rate": 1e-3, "batch_size": 16},
        "merge": [{"method": "task_arithmetic", "scale": 0.5}, {"method": "ties", "scale": 0.5}],
        "heads": ["expert", "labels"],
    }


def test_a_whole_run(settings, tmp_path):
    recipe = Recipe.model_validate(settings)
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert all(np.isfinite(float(row["colours/accuracy"])) for row in table)
    expert = AutoModelForImageClassification.from_pretrained(folder / "experts" / "colours")
    assert list(expert.config.id2label.values()) == list(COLOURS)
    merged = load_merged(folder / "merged" / "task_arithmetic-purified", "colours")
    merged.save_pretrained(folder / "alone")
    for name in ("preprocessor_config.json",):
        (folder / "alone" / name).write_bytes((folder / "merged" / "task_arithmetic-purified" / name).read_bytes())
    image = picture(np.random.default_rng(7), "green", (21, 10))
    said = {one["label"]: one["score"] for one in pipeline("image-classification", model=str(folder / "alone"))(image)}
    task = recipe.task("colours")
    processor = task.load_processor(folder / "merged" / "task_arithmetic-purified")
    rows = task.encode({"image": [png(image)], "label": ["green"]}, processor)
    batch = task.collate(processor)([{name: values[0] for name, values in rows.items() if name != "length"}])
    with torch.no_grad():
        outputs = task.outputs(merged, batch)
    assert said == pytest.approx(dict(zip(COLOURS, outputs[0].softmax(-1).tolist(), strict=True)), abs=1e-6)
