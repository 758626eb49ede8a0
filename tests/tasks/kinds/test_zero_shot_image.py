"""Images classified by texts: the frozen head against a reference, whole runs, given vision encoders, refusals."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from pave_lightning import Recipe, Task, load_merged, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.tasks.text_head import BIAS, CLASSES, TextHead

COLOURS = {"w10": (200, 30, 30), "w20": (30, 200, 30), "w30": (30, 30, 200)}
LIGHT = {"w5": (60, 60, 60), "w6": (190, 190, 190)}
SPLITS = {"train": (12, 0), "validation": (4, 1), "test": (6, 2)}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SIZES, "vocab_size": 100, "max_position_embeddings": 12, "pad_token_id": 0, "eos_token_id": 3}
IMAGES = {"image_size": 8, "patch_size": 4}
VISION = {**SIZES, **IMAGES, "projection_dim": 8}
AUTO = "AutoModelForZeroShotImageClassification"
MODELS = {
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
    "siglip": lambda: hf.SiglipModel(
        hf.SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config={**SIZES, **IMAGES})
    ),
}
TOWERS = {"clip": hf.CLIPVisionModel, "siglip": hf.SiglipVisionModel}


def write_folder(folder, classes, count, seed):
    drawn = np.random.default_rng(seed)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            values = np.asarray(colour) + drawn.integers(-30, 30, (9, 11, 3))
            Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks whose images lie in folders."""
    root = tmp_path_factory.mktemp("images")

    def build(name, classes, **more):
        data = {split: write_folder(root / name / split, classes, *how) for split, how in SPLITS.items()}
        return {"name": name, "kind": "zero_shot_image", "data": data, "classes": list(classes), **more}

    colours = build("colours", COLOURS, templates=["w1 w2 {}", "w3 {} w4 w2"])
    return [colours, build("light", LIGHT, templates=["w1 {}"])]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_tokenizer):
    """Folders of tiny random models of images and texts, by family."""
    found = {}
    for family, build in MODELS.items():
        folder = found[family] = tmp_path_factory.mktemp(family)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build()
        for name, value in model.named_parameters():  # random texts are all alike otherwise
            if name.startswith("text_model") and value.ndim > 1:
                value.data *= 8
        model.save_pretrained(folder)
        if family == "clip":
            kind, sizes = hf.CLIPImageProcessorPil, {"size": {"shortest_edge": 8}, "crop_size": 8}
        else:
            kind, sizes = hf.SiglipImageProcessorPil, {"size": {"height": 8, "width": 8}}
        kind(**sizes).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    return found


@pytest.fixture
def settings(settings_in, bases, tasks, tmp_path):
    def build(family, **more):
        return {
            **settings_in(tmp_path / "runs"),
            "base": str(bases[family]),
            "tasks": tasks,
            "training": {"learning_rate": 1e-2, "batch_size": 16},
            "merge": [{"method": "task_arithmetic", "scale": 0.5}],
            **more,
        }

    return build


@pytest.fixture
def plan(tmp_path):
    """Check a recipe; what is wrong, as one text, or nothing."""

    def check(settings):
        try:
            check_recipe(Recipe.model_validate(settings), RunFolder(tmp_path / "plan"))
        except PaveError as error:
            return str(error)
        return ""

    return check


def tower_of(base, family, folder, seed, kind=None):
    """A vision encoder as the hub has them: alone, fine-tuned from the base's."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        tower = (kind or TOWERS[family]).from_pretrained(base)
        for value in tower.parameters():
            value.add_(0.05 * torch.randn_like(value))
    tower.save_pretrained(folder)
    return folder


def batch_of(task, folder, count=4):
    """Images of noise as a model is given them, and as Pillow has them."""
    drawn = np.random.default_rng(3)
    images = [Image.fromarray(drawn.integers(0, 256, (13, 9, 3)).astype(np.uint8)) for _ in range(count)]
    processor = task.load_processor(folder)
    rows = [{"pixels": kept} for kept in processor.images.prepare(images)]
    return task.collate(processor)(rows), images


def own_logits(folder, prompts, images):
    """What transformers says of images and prompts, by the model, tokenizer and image processor of a folder."""
    model = hf.AutoModelForZeroShotImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    whole = {"padding": "max_length", "max_length": 12} if model.config.model_type == "siglip" else {"padding": True}
    texts = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False, **whole)
    with torch.no_grad():
        return model(**texts, **pixels).logits_per_image


@pytest.mark.parametrize("family", MODELS)
def test_a_whole_run(family, settings, bases, plan):
    given = settings(family)
    assert plan(given) == ""
    recipe = Recipe.model_validate(given)
    folder = run_recipe(recipe)
    table = {(row["model"], row["vectors"]): row for row in csv.DictReader((folder / "results.csv").open())}
    assert float(table["experts", ""]["colours/accuracy"]) >= float(table["base", ""]["colours/accuracy"])
    base = load_file(bases[family] / "model.safetensors")
    texts = [name for name in base if name.startswith(("text_", "logit_"))]
    experts = [load_file(folder / "experts" / task.name / "model.safetensors") for task in recipe.tasks]
    merged = folder / "merged" / "task_arithmetic-plain"
    found = load_file(merged / "model.safetensors")
    assert found.keys() == base.keys()
    for name, value in found.items():
        if name in texts:
            assert all(torch.equal(value, other[name]) for other in (base, *experts)), name
        else:
            sum_of_changes = sum(expert[name] - base[name] for expert in experts)
            assert torch.allclose(value, base[name] + 0.5 * sum_of_changes, atol=1e-6), name
    purified = load_file(folder / "merged" / "task_arithmetic-purified" / "model.safetensors")
    assert all(torch.equal(purified[name], base[name]) for name in texts)
    assert not all(torch.equal(purified[name], found[name]) for name in found)
    for task in recipe.tasks:  # one template: the very logits of transformers
        for place in (merged, folder / "experts" / task.name):
            batch, images = batch_of(task, place)
            model = load_merged(merged, task.name) if place == merged else None
            model = model or hf.AutoModelForZeroShotImageClassification.from_pretrained(place).eval()
            with torch.no_grad():
                outputs = task.outputs(model, batch)
            if len(task.templates) == 1:
                prompts = [task.templates[0].replace("{}", name) for name in task.classes]
                assert torch.allclose(outputs, own_logits(place, prompts, images), atol=1e-5)
    statistics = json.loads((folder / "statistics" / "light" / "manifest.json").read_text())["result"]
    assert not any(name.startswith("text_model") for name in statistics["unreached"])


@pytest.mark.parametrize("family", MODELS)
def test_several_templates_count_by_the_mean_of_their_embeddings(family, bases, tasks):
    task = Task.model_validate(tasks[0])
    model = hf.AutoModelForZeroShotImageClassification.from_pretrained(bases[family]).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(bases[family])
    rows = []
    for name in COLOURS:
        ends = []
        for prompt in (f"w1 w2 {name}", f"w3 {name} w4 w2"):
            given = tokenizer(
                [prompt],
                return_tensors="pt",
                return_token_type_ids=False,
                **({"padding": "max_length", "max_length": 12} if family == "siglip" else {}),
            )
            with torch.no_grad():
                end = model.get_text_features(**given).pooler_output[0].double().numpy()
            ends.append(end / np.linalg.norm(end))
        mean = np.mean(ends, axis=0)
        rows.append(mean / np.linalg.norm(mean))
    expected = np.exp(model.logit_scale.item()) * np.stack(rows)
    found = TextHead(bases[family], AUTO, task.prompts).tensors
    assert np.allclose(found[CLASSES].numpy(), expected, atol=1e-4)
    assert (BIAS in found) == (family == "siglip")
    if family == "siglip":
        assert found[BIAS].tolist() == pytest.approx([model.logit_bias.item()] * 3)
    again = TextHead(bases[family], AUTO, task.prompts).tensors  # from the file where it is kept
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_examples_stand_alone_with_all_classes(bases, tasks):
    task = Task.model_validate(tasks[0])
    batch, _ = batch_of(task, bases["siglip"], 3)
    model = hf.AutoModelForZeroShotImageClassification.from_pretrained(bases["siglip"]).eval()
    with torch.no_grad():
        together = task.outputs(model, batch)
        apart = torch.cat([task.outputs(model, single) for single in task.singles(batch)])
    assert together.shape == (3, 3)
    assert torch.allclose(together, apart, atol=1e-5)


def test_adapters_are_put_into_what_reads_images(settings, bases):
    given = settings("clip", training={"learning_rate": 1e-2, "batch_size": 16, "lora": {"rank": 2}})
    given["merge"] = [{"method": "core_space", "vectors": ["plain"]}]
    folder = run_recipe(Recipe.model_validate(given))
    written = json.loads((folder / "experts" / "colours" / "adapter" / "adapter_config.json").read_text())
    assert "visual_projection" in written["target_modules"]
    assert not any("text" in name for name in written["target_modules"])
    base = load_file(bases["clip"] / "model.safetensors")
    merged = load_file(folder / "merged" / "core_space-plain" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert not any(name.startswith(("text_", "logit_")) for name in changed)


@pytest.mark.parametrize("family", MODELS)
def test_experts_may_be_vision_encoders_alone(family, settings, bases, tasks, plan, tmp_path):
    base = load_file(bases[family] / "model.safetensors")
    towers = {one["name"]: tower_of(bases[family], family, tmp_path / one["name"], i) for i, one in enumerate(tasks)}
    old = load_file(towers["light"] / "model.safetensors")  # as releases before the fifth write them
    old = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in old.items()}
    save_file(old, towers["light"] / "model.safetensors", metadata={"format": "pt"})
    given = settings(family, tasks=[{**one, "expert": {"from": str(towers[one["name"]])}} for one in tasks])
    assert plan(given) == ""
    folder = run_recipe(Recipe.model_validate(given))
    merged = load_file(folder / "merged" / "task_arithmetic-plain" / "model.safetensors")
    for name, value in merged.items():
        if name.startswith("vision_model."):
            experts = [TOWERS[family].from_pretrained(tower).state_dict() for tower in towers.values()]
            short = name.removeprefix("vision_model.")
            changes = sum(expert[short] - base[name] for expert in experts)
            assert torch.allclose(value, base[name] + 0.5 * changes, atol=1e-6), name
        else:
            assert torch.equal(value, base[name]), name


def test_a_vision_encoder_may_have_its_projection(settings, bases, tasks, plan, tmp_path):
    kind = hf.CLIPVisionModelWithProjection
    tower = tower_of(bases["clip"], "clip", tmp_path / "tower", 1, kind)
    given = settings("clip", tasks=[{**tasks[0], "expert": {"from": str(tower)}}, tasks[1]])
    assert plan(given) == ""
    folder = run_recipe(Recipe.model_validate({**given, "merge": []}))
    expert = load_file(folder / "experts" / "colours" / "model.safetensors")
    own = kind.from_pretrained(tower).state_dict()
    assert torch.equal(expert["visual_projection.weight"], own["visual_projection.weight"])


def test_classes_may_have_the_names_that_the_data_give_them(bases, tasks, tmp_path):
    named = Task.model_validate(tasks[0])
    unnamed = Task.model_validate({key: value for key, value in tasks[0].items() if key != "classes"})
    assert unnamed.class_names == tuple(sorted(COLOURS))
    assert unnamed.prompts == named.prompts
    assert unnamed.labelled_by == named.labelled_by
    numbers = pa.table({"image": [b""] * 2, "label": [0, 1]})
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["zebra", "ape"]}}}}
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("named", "plain")}
    pq.write_table(numbers.replace_schema_metadata({"huggingface": json.dumps(features)}), files["named"])
    pq.write_table(numbers, files["plain"])
    tables = {name: dict.fromkeys(SPLITS, file) for name, file in files.items()}
    task = Task.model_validate({"name": "mine", "kind": "zero_shot_image", "data": tables["named"]})
    assert task.class_names == ("zebra", "ape")
    with pytest.raises(PaveError, match="name them in the order of their indices in 'classes'"):
        _ = Task.model_validate({"name": "mine", "kind": "zero_shot_image", "data": tables["plain"]}).class_names


def other_size(base, folder, sizes):
    tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(**{**VISION, **sizes}))
    tower.save_pretrained(folder)
    return folder


def with_other_texts(base, folder):
    model = hf.CLIPModel.from_pretrained(base)
    for value in model.parameters():
        value.data += 0.01
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda base, folder: other_size(base, folder, {"num_hidden_layers": 3}), "num_hidden_layers is 3"),
        (lambda base, folder: tower_of(base, "clip", folder, 0) and base, "the base's"),
        (lambda base, folder: hf.CLIPVisionModel.from_pretrained(base).save_pretrained(folder) or folder, "base's own"),
        (with_other_texts, "its text side is not the base's"),
        (lambda base, folder: hf.ViTModel(hf.ViTConfig(**SIZES, **IMAGES)).save_pretrained(folder) or folder, "ViT"),
    ],
)
def test_experts_that_do_not_fit_are_refused(make, told, settings, bases, tasks, plan, tmp_path):
    expert = make(bases["clip"], tmp_path / "expert")
    said = plan(settings("clip", tasks=[{**tasks[0], "expert": {"from": str(expert)}}, tasks[1]]))
    assert "task 'colours'" in said
    assert told in said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"templates": ["a photo"]}, "must have one {} each"),
        ({"templates": ["{} and {}"]}, "must have one {} each"),
        ({"templates": ["w1 {}", "w1 {}"]}, "twice"),
        ({"templates": []}, "templates"),
        ({"classes": ["w1", "w1", "w2"]}, "must differ"),
    ],
)
def test_prompts_that_cannot_be_are_refused(options, told, tasks):
    with pytest.raises(ValueError, match=told.replace("{", "\\{").replace("}", "\\}")):
        Task.model_validate({**tasks[0], **options})


def copied(base, folder, *, without=()):
    folder.mkdir()
    for file in base.iterdir():
        if not file.name.startswith(tuple(without) or ("\0",)):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def without_weights(folder, start):
    kept = {
        name: value for name, value in load_file(folder / "model.safetensors").items() if not name.startswith(start)
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda base, folder: copied(base, folder, without=["tokenizer"]), "copy the tokenizer's files"),
        (lambda base, folder: copied(base, folder, without=["preprocessor"]), "no image processor"),
        (lambda base, folder: without_weights(copied(base, folder), "text_model."), "text_model."),
        (lambda base, folder: without_weights(copied(base, folder), "text_projection."), "text_projection"),
        (lambda base, folder: without_weights(copied(base, folder), "visual_projection."), "visual_projection"),
        (lambda base, folder: tower_of(base, "clip", folder, 0), "zero-shot-image-classification model"),
    ],
)
def test_bases_that_lack_something_are_refused(make, told, settings, bases, plan, tmp_path):
    said = plan({**settings("clip"), "base": str(make(bases["clip"], tmp_path / "base"))})
    assert told in said


def test_what_else_a_plan_tells(settings, tasks, plan):
    long = {**tasks[0], "templates": ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 {}"]}
    assert "longer than the 12 tokens" in plan(settings("clip", tasks=[long, tasks[1]]))
    said = plan(settings("clip", heads=["expert", "logits"]))
    assert "have no head to fit, since their classes are texts" in said
    said = plan(settings("clip", merge=[{"method": "featcal", "options": {"examples": 4}}]))
    assert "block by block" in said
