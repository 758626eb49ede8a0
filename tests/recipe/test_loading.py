from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pave_lightning.errors import PaveError
from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.recipe.loading import load_recipe, recipe_digest, recipe_schema, recipe_to_yaml
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.suites import suite_task_names

Write = Callable[[str], Path]
Read = Callable[..., Recipe]
SchemaErrors = Callable[[str], list[str]]

ROOT = Path(__file__).parents[2]
START = "name: demo\nbase: folder\n"
SMALL = START + "tasks: [pocket/movie]\n"
FULL = (Path(__file__).parent / "full_recipe.yaml").read_text()
RECIPES = {"small": SMALL, "full": FULL, **{file.name: file.read_text() for file in ROOT.glob("recipes/*.yaml")}}
OWN = "name: own, data: {train: a.csv}, text: body"
AWKWARD = [
    *("1", "null", "yes", "on", "y", "true", "~", "1_000", "1e3", ".inf", "0o14", "0x1F", "012", "+1", ".5", "1:30"),
    *(
        "2024-01-01",
        "",
        " x ",
        "a: b",
        "- a",
        "#",
        "a #b",
        "<<",
        "=",
        "!x",
        "&a",
        "*b",
        "%",
        "@",
        "`",
        "{",
        "[",
        "-",
        "?",
    ),
    *("é", "日本", "a\n  b\n\n", "\t", "\x7f", "'", '"', "\\", "x" * 300, "word " * 60, "\U0001f600"),
]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_read(read_recipe: Read, tmp_path: Path) -> None:
    recipe = read_recipe(FULL)
    assert recipe.training.learning_rate == 3e-5
    assert [task.name for task in recipe.tasks] == ["movie", "isa", "own", "pair"]
    assert recipe.tasks[1].training.lora is None
    assert recipe.merge[2].scale == ScaleSearch(search=(0.1, 1.0), points=3)
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_yaml_1_2_numbers_and_words(read_recipe: Read) -> None:
    recipe = read_recipe(SMALL + "training: {learning_rate: 3e-5, freeze: [yes, no, on]}\n")
    assert recipe.training.learning_rate == 3e-5
    assert recipe.training.freeze == ["yes", "no", "on"]


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_recipe(path).name == "demo"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SMALL + "seed: 1\nseed: 2\n", "FILE, line 5, column 1: while constructing a mapping found duplicate key"),
        ("name: demo\nbase: [a,\nb: 1", "FILE, line 3"),
        ("name: demo\n\tbase: x\n", "FILE, line 2, column 1"),
        ("tasks:\n\t- a\n", "indent with spaces, not with tabs\n    \t- a\n    ^"),
        ("a: *b\n", "FILE, line 1, column 4: found undefined alias 'b'\n    a: *b\n       ^"),
        ("--- 1\n--- 2\n", "FILE, line 2, column 1: expected a single document"),
        ("a: !!python/object:os.x {}\n", "FILE, line 1, column 4: could not determine a constructor for the tag"),
        ("a: 2024-13-45\n", "FILE is not valid YAML: month must be in 1..12"),
        ("a: \x00\n", "FILE is not valid YAML"),
        ("[" * 1200, "the recipe FILE cannot be used: it is nested too deeply"),
        ("", "the recipe FILE is empty; it needs at least the keys name, base and tasks"),
        ("# only a comment\n", "the recipe FILE is empty"),
        ("[1, 2]\n", "the recipe FILE must be a mapping of keys such as name, base and tasks, found [1, 2]"),
        ("trainer: &a {a: [*a]}\n", "the recipe FILE cannot be used: a YAML alias contains itself"),
        ("words\n", "the recipe FILE must be a mapping of keys such as name, base and tasks, found 'words'"),
    ],
)
def test_files_that_are_no_recipe(write_recipe: Write, text: str, told: str) -> None:
    path = write_recipe(text)
    with pytest.raises(PaveError) as caught:
        load_recipe(path)
    assert told in str(caught.value).replace(str(path), "FILE")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(PaveError, match=r"is not UTF-8 text: byte 6 cannot be read"):
        load_recipe(path)


def test_a_missing_file_names_the_nearest_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("quickstart.yaml", "glue.yml", "notes.txt"):
        (tmp_path / "recipes" / name).write_text(SMALL)
    with pytest.raises(PaveError, match=r"^there is no recipe recipes/quikstart.yaml; did you mean 'recipes/quickst"):
        load_recipe("recipes/quikstart.yaml")
    with pytest.raises(PaveError, match=r"^there is no recipe quickstart; did you mean 'recipes/quickstart.yaml'\?$"):
        load_recipe("quickstart")
    with pytest.raises(PaveError, match=r"known are: recipes/glue.yml, recipes/quickstart.yaml$"):
        load_recipe("zzz/zzz")
    with pytest.raises(PaveError, match=r"^recipes is a folder, not a recipe file; recipes are: recipes/glue.yml, "):
        load_recipe("recipes")


def test_a_missing_file_where_there_are_no_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PaveError, match=r"^there is no recipe a.yaml; there are no recipes \(\*.yaml\) in \. or ./rec"):
        load_recipe("a.yaml")


# --- the recipe as YAML, digest and schema ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES.keys())
def test_round_trip(read_recipe: Read, text: str) -> None:
    recipe = read_recipe(text)
    written = recipe_to_yaml(recipe)
    again = read_recipe(written)
    assert again == recipe
    assert recipe_to_yaml(again) == written
    assert recipe_digest(again) == recipe_digest(recipe)


def test_awkward_texts_survive_the_round_trip(read_recipe: Read) -> None:
    recipe = read_recipe(FULL)
    task = recipe.tasks[2].model_copy(update={"classes": AWKWARD})
    trainer = {"texts": AWKWARD, "numbers": [1e-5, 1e16, 5e-324, 0.1, -0.0, 10**30, 1.0], **dict.fromkeys(AWKWARD, 1)}
    recipe = recipe.model_copy(update={"trainer": trainer, "tasks": [task]})
    recipe = Recipe.model_validate({**recipe.model_dump(by_alias=True), "merge": [], "purify": {}})
    assert read_recipe(recipe_to_yaml(recipe)) == recipe


def test_resolved_yaml_is_filled_in_and_in_the_order_of_the_fields(read_recipe: Read) -> None:
    resolved = YAML(typ="safe", pure=True).load(recipe_to_yaml(read_recipe(FULL)))
    assert list(resolved) == list(Recipe.model_fields)
    assert resolved["tasks"][0]["training"]["learning_rate"] == 3e-5
    assert resolved["tasks"][0]["trainer"]["max_epochs"] == 2
    assert resolved["tasks"][1]["trainer"]["max_epochs"] == 1
    assert resolved["tasks"][3]["expert"] == {"from": "some/checkpoint", "adapter": None, "accept": ["rope_theta"]}
    assert resolved["merge"][0]["purify"]["rho"] == 0.9
    assert resolved["merge"][2]["purify"]["rho"] == 0.5
    assert "use" not in resolved["tasks"][0]


def test_digest(read_recipe: Read) -> None:
    digest = recipe_digest(read_recipe(FULL))
    assert len(digest) == 64
    assert digest == recipe_digest(read_recipe(FULL, "tracking.experiment=other", "output=elsewhere"))
    assert digest == recipe_digest(read_recipe("# comment\n" + FULL))
    assert digest != recipe_digest(read_recipe(FULL, "seed=4"))
    assert digest != recipe_digest(read_recipe(FULL, "tasks.own.label=other"))
    assert recipe_digest(read_recipe(SMALL + "purify: {rho: 1}\n")) == recipe_digest(
        read_recipe(SMALL + "purify: {rho: 1.0}\n")
    )


def test_the_schema_is_a_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


def test_the_schema_describes_and_closes_every_section() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        assert section["additionalProperties"] is False, name
        for key, about in section["properties"].items():
            documented = about if "description" in about else schema["$defs"][about["$ref"].rpartition("/")[2]]
            assert documented["description"], f"{name}.{key}"
    assert schema["properties"]["tasks"]["items"]["anyOf"][0]["enum"] == suite_task_names()


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES.keys())
def test_the_schema_accepts_recipes(schema_errors: SchemaErrors, read_recipe: Read, text: str) -> None:
    assert schema_errors(text) == []
    assert schema_errors(recipe_to_yaml(read_recipe(text))) == []


@pytest.mark.parametrize(
    "keys",
    [
        "merge: [average, {method: ties, name: null, scale: {search: [0, 1]}, purify: {rho: 0.5}}]",
        "examples: {train: null}",
        "training: {lora: {target_modules: all-linear}}",
        "heads: logits",
        "heads: {fit: labels, rows: 64}",
        "heads: [expert, {rows: 64}, orthogonal]",
        "merge: [{method: ties, heads: [expert, logits]}, {method: average, heads: null}]",
        "controls: true",
    ],
)
def test_the_schema_accepts_what_the_loader_accepts(schema_errors: SchemaErrors, read_recipe: Read, keys: str) -> None:
    read_recipe(f"{SMALL}{keys}\n")
    assert schema_errors(f"{SMALL}{keys}\n") == []


@pytest.mark.parametrize(
    "tasks",
    [
        f"[{{{OWN}, classes: 2, metrics: null, primary_metric: null}}]",
        f"[{{{OWN}, classes: [false, 1, 2.5, text]}}]",
        f"[{{{OWN}, classes: [a, b], metrics: accuracy, training: {{batch_size: 4}}, trainer: {{max_epochs: 1}}}}]",
        "[{use: glue/sst2, data: {revision: abc}, text: sentence, examples: {train: 5}}]",
    ],
)
def test_the_schema_accepts_short_forms_of_tasks(schema_errors: SchemaErrors, read_recipe: Read, tasks: str) -> None:
    read_recipe(f"{START}tasks: {tasks}\n")
    assert schema_errors(f"{START}tasks: {tasks}\n") == []


@pytest.mark.parametrize(
    "tasks",
    [
        "[]",
        "[pocket/movi]",
        "[{use: pocket/movie, metrik: f1}]",
        "[{use: pocket/movie, training: {learning_rat: 1}}]",
        f"[{{{OWN}, classes: 1}}]",
        f"[{{{OWN}, classes: 2, metrics: acuracy}}]",
        f"[{{{OWN}, classes: 2, expert: {{form: x}}}}]",
        "[{name: own, classes: 2}]",
    ],
)
def test_the_schema_refuses_wrong_tasks(schema_errors: SchemaErrors, tasks: str) -> None:
    assert schema_errors(f"{START}tasks: {tasks}\n")


# --- anything at all --------------------------------------------------------------------------------------------------

JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    1e300,
    "",
    "x",
    "a b",
    [],
    [1],
    ["x", None],
    {},
    {"x": 1},
    {"search": [0, 1]},
    [{}],
]


def places(value: Any, keys: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [keys, *(place for key, item in inner for place in places(item, (*keys, key)))]


@pytest.mark.parametrize("seed", range(80))
def test_junk_anywhere_is_accepted_or_told_in_words(read_recipe: Read, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    document = YAML(typ="safe", pure=True).load(FULL)
    for _ in range(draw.randint(1, 3)):
        *above, last = draw.choice(places(document)[1:])
        node = document
        for key in above:
            node = node[key]
        change = draw.choice(["replace", "replace", "remove", "add"])
        if change == "remove":
            node.pop(last)
        elif change == "add" and isinstance(node, dict):
            node[draw.choice(["use", "name", "zzz", "search", "rho"])] = copy.deepcopy(draw.choice(JUNK))
        else:
            node[last] = copy.deepcopy(draw.choice(JUNK))
    path = tmp_path / "recipe.yaml"
    YAML(typ="safe", pure=True).dump(document, path)
    try:
        recipe = load_recipe(path)
    except PaveError as error:
        told = str(error)
    else:
        assert read_recipe(recipe_to_yaml(recipe)) == recipe
        return
    lines = told.splitlines()
    assert len(lines) == len(set(lines)) > 1
    for jargon in ("Input should", "Value error", "pydantic", "http", "_Absent", "stand-in", "something else"):
        assert jargon not in told


def test_reading_recipes_imports_nothing_heavy() -> None:
    script = (
        "import sys, pave_lightning.recipe.loading as loading; loading.recipe_schema(); "
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'mlflow', 'numpy'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
