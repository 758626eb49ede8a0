"""One class for an image: what is read, what is told, what a model is given, and a whole run."""

import csv
import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor, ViTModel, pipeline

from pave_lightning import Recipe, load_merged, run_recipe
from pave_lightning.errors import PaveError
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
    settings_file = "preprocessor_config.json"
    (folder / "alone" / settings_file).write_bytes(
        (folder / "merged" / "task_arithmetic-purified" / settings_file).read_bytes()
    )
    image = picture(np.random.default_rng(7), "green", (21, 10))
    said = {one["label"]: one["score"] for one in pipeline("image-classification", model=str(folder / "alone"))(image)}
    task = recipe.task("colours")
    processor = task.load_processor(folder / "merged" / "task_arithmetic-purified")
    rows = task.encode({"image": [png(image)], "label": ["green"]}, processor)
    batch = task.collate(processor)([{name: values[0] for name, values in rows.items() if name != "length"}])
    with torch.no_grad():
        outputs = task.outputs(merged, batch)
    assert said == pytest.approx(dict(zip(COLOURS, outputs[0].softmax(-1).tolist(), strict=True)), abs=1e-6)


def given_expert(folder, vit, classes):
    """A classifier as somebody else trained it: other weights than the base, classes in an order of its own."""
    torch.manual_seed(len(folder.name))
    model = AutoModelForImageClassification.from_pretrained(
        vit,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    ViTImageProcessor.from_pretrained(vit).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["folders", "class labels"])
def test_classes_of_a_given_expert_are_told_by_name(kind, settings, vit, colours, tmp_path):
    """Its id2label decides the order; folders and ClassLabel columns are read by name."""
    order = ["blue", "red", "green"]
    expert = given_expert(tmp_path / "given", vit, order)
    if kind == "class labels":
        colours = {**colours, "data": {split: as_class_labels(tmp_path, colours, split) for split in SPLITS}}
    task = {**colours, "expert": {"from": expert}, "classes": order}
    tasks = [
        task,
        {**settings["tasks"][1], "expert": {"from": given_expert(tmp_path / "other", vit, ["bright", "dark"])}},
    ]
    recipe = Recipe.model_validate({**settings, "tasks": tasks, "merge": [{"method": "average"}], "heads": ["expert"]})
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    (row,) = [row for row in csv.DictReader((folder / "results.csv").open()) if row["form"] == "expert"]
    asked = pipeline("image-classification", model=expert)
    files = sorted((tmp_path / "colours" / "test").rglob("*.png"))
    right = [asked(str(file))[0]["label"] == file.parent.name for file in files]
    assert float(row["colours/accuracy"]) == pytest.approx(sum(right) / len(right), abs=1e-6)


def as_class_labels(folder, colours, split):
    """The images of a split in a table, whose classes are numbers with names in alphabetical order."""
    names = sorted(COLOURS)
    files = sorted((folder / "colours" / split).rglob("*.png"))
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [names.index(file.parent.name) for file in files],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-labels.parquet")
    return str(folder / f"{split}-labels.parquet")


def test_a_plan_tells_which_order_and_which_classes_an_expert_has(settings, vit, colours, brightness, tmp_path):
    """Both at once; nothing is exchanged silently."""
    tasks = [
        {**colours, "expert": {"from": given_expert(tmp_path / "turned", vit, ["blue", "red", "green"])}},
        {**brightness, "expert": {"from": given_expert(tmp_path / "other", vit, ["day", "night"])}},
    ]
    with pytest.raises(PaveError) as found:
        check_recipe(Recipe.model_validate({**settings, "tasks": tasks}), RunFolder(tmp_path / "plan"))
    assert "its head has the classes in the order ['blue', 'red', 'green']" in str(found.value)
    assert "write the task's classes in the head's order" in str(found.value)
    assert "its head has the classes ['day', 'night'] (id2label), and the task ['bright', 'dark']" in str(found.value)


def adapts_only_factors(folder):
    """Whether what was trained are factors of the linear layers in the stack, and the head."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as stored:
        names = set(stored.keys())
    whole = {name for name in names if ".lora_" not in name}
    return len(names - whole) == 2 * 2 * 6 and all("classifier" in name for name in whole)


def test_adapters_of_a_vit(settings, vit, tmp_path):
    """New ones on all linear layers, and one that peft has written."""
    colours, brightness = settings["tasks"]
    adapted = {**colours, "training": {"lora": {"rank": 2}}}
    head = AutoModelForImageClassification.from_pretrained(
        vit, num_labels=2, id2label={0: "bright", 1: "dark"}, label2id={"bright": 0, "dark": 1}
    )
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    torch.manual_seed(3)
    adapters = get_peft_model(head, config)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapters.save_pretrained(tmp_path / "adapters")
    given = {**brightness, "expert": {"from": str(tmp_path / "adapters")}}
    recipe = Recipe.model_validate({**settings, "tasks": [adapted, given], "heads": ["expert"]})
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    (row,) = [row for row in csv.DictReader((folder / "results.csv").open()) if row["form"] == "expert"]
    assert adapts_only_factors(folder / "experts" / "colours" / "adapter")
    whole = adapters.merge_and_unload().eval()
    processor = ViTImageProcessor.from_pretrained(vit)
    rows = pq.read_table(tmp_path / "test.parquet").to_pylist()
    images = [Image.open(io.BytesIO(one["picture"]["bytes"])) for one in rows]
    with torch.no_grad():
        said = whole(**processor(images, return_tensors="pt")).logits.argmax(-1).tolist()
    right = [["bright", "dark"][index] == one["label"] for index, one in zip(said, rows, strict=True)]
    assert float(row["brightness/accuracy"]) == pytest.approx(sum(right) / len(right), abs=1e-6)


def test_a_plan_names_broken_images_of_all_tasks_at_once(settings, tmp_path):
    colours, _ = settings["tasks"]
    broken = tmp_path / "colours" / "train" / "red" / "0.png"
    broken.write_bytes(b"words")
    (tmp_path / "colours" / "test" / "green" / "1.png").write_bytes(b"")
    with pytest.raises(PaveError) as found:
        check_recipe(Recipe.model_validate(settings), RunFolder(tmp_path / "plan"))
    assert f"task 'colours', train split ({colours['data']['train']})" in str(found.value)
    assert f"1 image cannot be read: {broken} (not an image)" in str(found.value)
    assert "1.png (the file is empty)" in str(found.value)


def test_a_base_without_an_image_processor_is_refused_before_work(settings, vit, tmp_path):
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(PaveError, match="there is no image processor"):
        check_recipe(Recipe.model_validate(settings), RunFolder(tmp_path / "plan"))
