from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pave_lightning.errors import PaveError
from pave_lightning.recipe import MergeStep, Recipe, ScaleSearch
from pave_lightning.recipe_loading import load_recipe, recipe_digest, recipe_schema, recipe_to_yaml
from pave_lightning.tasks.suites import suite_task_names

ROOT = Path(__file__).parents[1]
START = "name: demo\nbase: folder\n"
SMALL = START + "tasks: [pocket/movie]\n"
FULL = """\
name: demo
seed: 3
base: package:models/mini
output: out
trainer: {max_epochs: 2, accelerator: cpu, profiler: "yes", nested: [{a: [1, [2]]}, null]}
training:
  learning_rate: 3e-5
  freeze: [embeddings]
  early_stopping: {patience: 1}
  lora: {rank: 4, target_modules: [query, value]}
examples: {train: 100, validation: 50}
tasks:
  - pocket/movie
  - use: pocket/isa
    examples: {train: 10}
    trainer: {max_epochs: 1}
    training: {lora: null}
  - name: own
    data: {train: a.csv, validation: b.csv, test: c.csv}
    text: body
    classes: 3
    metrics: macro_f1
  - name: pair
    data: {hub: some/set, config: c, train: "train[:90%]"}
    text: [a, b]
    kind: regression
    value_range: [0, 5]
    expert: {from: some/checkpoint}
capture: {examples: 64, moments: input}
purify: {rho: 0.9, tasks: [movie, isa]}
merge:
  - average
  - {method: ties, scale: 0.4, options: {density: 0.2}}
  - {method: ties, name: searched, scale: {search: [0.1, 1], points: 3}, vectors: [plain], purify: {rho: 0.5}}
evaluate: {batch_size: 8}
tracking: {uri: "sqlite:///a.db", experiment: e, upload_models: true}
"""
RECIPES = {"small": SMALL, "full": FULL, **{file.name: file.read_text() for file in ROOT.glob("recipes/*.yaml")}}
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


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """What is told about a recipe, one text a problem."""
    path = write(folder, text)
    with pytest.raises(PaveError) as caught:
        load_recipe(path, overrides)
    headline, *lines = str(caught.value).splitlines()
    assert headline == f"the recipe {path} cannot be used:"
    for jargon in ("Input should", "pydantic", "https:", "type=", "valid ", "validator", "str]", "literal"):
        assert jargon not in str(caught.value)
    return [line.removeprefix("  - ") for line in lines]


def refusal(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(PaveError) as caught:
        load_recipe(path)
    return str(caught.value).replace(str(path), "FILE")


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = read(tmp_path, FULL)
    assert recipe.training.learning_rate == 3e-5
    assert [task.name for task in recipe.tasks] == ["movie", "isa", "own", "pair"]
    assert recipe.tasks[1].training.lora is None
    assert recipe.merge[2].scale == ScaleSearch(search=(0.1, 1.0), points=3)
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_yaml_1_2_numbers_and_words(tmp_path: Path) -> None:
    recipe = read(tmp_path, SMALL + "training: {learning_rate: 3e-5, freeze: [yes, no, on]}\n")
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
        ("[" * 1200, "FILE is not valid YAML: it is nested too deeply"),
        ("", "the recipe FILE is empty; it needs at least the keys name, base and tasks"),
        ("# only a comment\n", "the recipe FILE is empty"),
        ("[1, 2]\n", "the recipe FILE must be a mapping of keys such as name, base and tasks, found [1, 2]"),
        ("trainer: &a {a: [*a]}\n", "the recipe FILE cannot be used: a YAML alias contains itself"),
        ("words\n", "the recipe FILE must be a mapping of keys such as name, base and tasks, found 'words'"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, text)


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


# --- methods of merge steps, which recipes know nothing of ---


def lines_with_steps(folder: Path, text: str) -> list[str]:
    def judged(step: MergeStep) -> list[str]:
        return [f"{step.method} takes no {key}" for key in step.options]

    with pytest.raises(PaveError) as caught:
        load_recipe(write(folder, text), step_problems=judged)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


def test_keys_of_an_experiment_that_do_not_agree_are_told_without_the_whole_section(tmp_path: Path) -> None:
    text = SMALL + "experiment: {question: What happens?, x: purify.rho, vary: {output: [a]}}\n"
    assert problems(tmp_path, text) == [
        "experiment: 'output' cannot be varied",
        "experiment: 'purify.rho' is no varied key; known are: output, model, vectors",
    ]


def test_mistakes_of_the_recipe_do_not_hide_those_of_its_methods(tmp_path: Path) -> None:
    steps = "merge: [ties, {method: x, options: {a: 1}, tune: {b: 2}}, {method: y, options: {c: 1}}, 5]\n"
    assert lines_with_steps(tmp_path, SMALL + "sead: 1\n" + steps) == [
        "sead: unknown key; did you mean 'seed'?",
        "merge.1 (x): x takes no a",
        "merge.1 (x).tune.b: must be a list of values, found 2; write [2]",
        "merge.2 (y): y takes no c",
        "merge.3: must be the name of a merge method, or a mapping with the key 'method', found 5",
    ]


def test_methods_of_a_recipe_that_is_right_are_left_to_others(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "merge: [{method: x, options: {a: 1}}]\n")
    assert load_recipe(path, step_problems=lambda step: pytest.fail("asked")).merge[0].method == "x"


# --- wrong keys and values --------------------------------------------------------------------------------------------

WRONG = [
    # unknown keys
    ("sead: 1", ["sead: unknown key; did you mean 'seed'?"]),
    ("training: {lr: 1}", ["training.lr: unknown key; did you mean 'learning_rate'?"]),
    ("training: {learning_rat: 1}", ["training.learning_rat: unknown key; did you mean 'learning_rate'?"]),
    ("training: {lora: {rnk: 1}}", ["training.lora.rnk: unknown key; did you mean 'rank'?"]),
    ("examples: {valid: 5}", ["examples.valid: unknown key; did you mean 'validation'?"]),
    ("evaluate: {zzz: 5}", ["evaluate.zzz: unknown key; known are: batch_size, precision, purified_experts"]),
    ("learning_rate: 3", ["learning_rate: unknown key; it belongs under 'training'"]),
    ("training: {rho: 1}", ["training.rho: unknown key; it belongs under 'purify'"]),
    ("vectors: [plain]", ["vectors: unknown key; it belongs under 'merge.N'"]),
    ("label: x", ["label: unknown key; it belongs under 'tasks.N'"]),
    (
        "training: {max_epochs: 3}",
        ["training.max_epochs: unknown key; it is an option of lightning.Trainer and belongs under 'trainer'"],
    ),
    # numbers
    ("seed: yes", ["seed: must be a whole number in [0, 2147483647], found 'yes'"]),
    ("seed: true", ["seed: must be a whole number in [0, 2147483647], found true"]),
    ("seed: 1.5", ["seed: must be a whole number in [0, 2147483647], found 1.5"]),
    ("seed: -1", ["seed: -1 is outside [0, 2147483647]"]),
    ("seed: .inf", ["seed: must be a finite number, found .inf"]),
    (
        "seed: null",
        ["seed: must be a whole number in [0, 2147483647], found nothing; give it a value or leave the key out"],
    ),
    ("seed: 99999999999999999999", ["seed: 99999999999999999999 is outside [0, 2147483647]"]),
    ("capture: {examples: 1e3}", ["capture.examples: must be a whole number, at least 1, found 1000.0; write 1000"]),
    ("purify: {rho: 1.5}", ["purify.rho: 1.5 is outside (0, 1]"]),
    ("purify: {rho: 0}", ["purify.rho: 0 is outside (0, 1]"]),
    ("purify: {rho: true}", ["purify.rho: must be a number in (0, 1], or auto, found true"]),
    ("purify: {rho: '0.5'}", ["purify.rho: must be a number in (0, 1], or auto, found '0.5'; leave the quotes out"]),
    ("purify: {rho: .nan}", ["purify.rho: must be a finite number, found .nan"]),
    ("purify: {damping: -0.1}", ["purify.damping: must be at least 0, found -0.1"]),
    ("training: {learning_rate: 0}", ["training.learning_rate: must be above 0, found 0"]),
    ("training: {lora: {dropout: 1}}", ["training.lora.dropout: 1 is outside [0, 1)"]),
    ("training: {batch_size: 0}", ["training.batch_size: must be at least 1, found 0"]),
    (
        "examples: {train: 0, test: 1}",
        ["examples.train: must be at least 1, found 0", "examples.test: must be at least 2, found 1"],
    ),
    # words
    ("output: 5", ["output: must be a text, found 5; put it in quotes"]),
    ("evaluate: {precision: 32}", ["evaluate.precision: must be a text, found 32; put it in quotes"]),
    ("output: 2024-01-01", ["output: 2024-01-01 is read as a date; put it in quotes to make it a text"]),
    ("tracking: {upload_models: 1}", ["tracking.upload_models: must be true or false, found 1"]),
    ("tracking: {upload_models: yes}", ["tracking.upload_models: must be true or false, found 'yes'"]),
    ("purify: {metric: covarianc}", ["purify.metric: 'covarianc' is not allowed; did you mean 'covariance'?"]),
    ("purify: {metric: zzz}", ["purify.metric: 'zzz' is not allowed; known are: covariance, root, identity"]),
    ("capture: {moments: true}", ["capture.moments: true is not allowed; known are: smallest, input, output"]),
    # sections and lists
    (
        "training: 5",
        ["training: must be a mapping with keys such as learning_rate, head_learning_rate, weight_decay, found 5"],
    ),
    (
        "capture:",
        [
            "capture: must be a mapping with keys such as examples, batch_size, source, found nothing; "
            "give it a value or leave the key out"
        ],
    ),
    ("trainer: cpu", ["trainer: must be a mapping of options, found 'cpu'"]),
    ("trainer: {1: 2}", ["trainer.1: the key 1 is not a text; put it in quotes"]),
    ("purify: {1: 2}", ["purify.1: the key 1 is not a text; put it in quotes"]),
    ("trainer: {a: {b: .nan}}", ["trainer.a.b: must be a finite number, found .nan"]),
    (
        "trainer: {a: !!binary aGk=}",
        ["trainer.a: is neither a mapping, a list, a text, a number, true, false nor null"],
    ),
    (
        "training: {freeze: embeddings}",
        ["training.freeze: must be a list of texts, found 'embeddings'; write [embeddings]"],
    ),
    ("training: {freeze: [1]}", ["training.freeze.0: must be a text, found 1; put it in quotes"]),
    (
        "training: {lora: {target_modules: query}}",
        ["training.lora.target_modules: must be a list of texts or 'all-linear', found 'query'; write [query]"],
    ),
    (
        "training: {lora: {target_modules: 5}}",
        ["training.lora.target_modules: must be a list of texts or 'all-linear', found 5"],
    ),
    (
        "training: {lora: {target_modules: [q, 5]}}",
        ["training.lora.target_modules.1: must be a text, found 5; put it in quotes"],
    ),
    ("purify: {tasks: []}", ["purify.tasks: needs at least 1 entry, found 0"]),
    ("purify: {tasks: [movi]}", ["purify.tasks: no task is named 'movi'; did you mean 'movie'?"]),
    # options to choose, and what experiments vary
    (
        "merge: [{method: x, tune: {density: 0.1}}]",
        ["merge.0 (x).tune.density: must be a list of values, found 0.1; write [0.1]"],
    ),
    (
        "merge: [{method: x, tune: {density: {low: 0.1}}}]",
        ["merge.0 (x).tune.density: must be a list of values, found {low: 0.1}"],
    ),
    (
        "experiment: {question: q, vary: {seed: true}}",
        ["experiment.vary.seed: must be a list of values, found true; write [true]"],
    ),
    (
        "experiment: {question: q, seeds: 0}",
        ["experiment.seeds: must be a list of whole numbers, found 0; write [0]"],
    ),
    (
        "experiment: {question: q, seeds: all}",
        ["experiment.seeds: must be a list of whole numbers, found 'all'"],
    ),
    # merge steps
    ("merge: average", ["merge: must be a list of merge steps, found 'average'; write [average]"]),
    ("merge: {method: average}", ["merge: must be a list of merge steps, found {method: 'average'}"]),
    ("merge: [5]", ["merge.0: must be the name of a merge method, or a mapping with the key 'method', found 5"]),
    (
        "merge: [null]",
        ["merge.0: must be the name of a merge method, or a mapping with the key 'method', found nothing"],
    ),
    ("merge: [{methd: ties}]", ["merge.0.methd: unknown key; did you mean 'method'?"]),
    ("merge: [{scale: 1}]", ["merge.0: the key 'method' is missing (the merge rule; `pave methods` lists them)"]),
    ("merge: [{method: 5}]", ["merge.0.method: must be the name of a merge method, found 5; put it in quotes"]),
    (
        "merge: [my method]",
        ["merge.0 (my method): 'my method' is no name: use letters, digits, '_', '.' and '-', a letter or digit first"],
    ),
    (
        "merge: [{method: my method}]",
        [
            "merge.0 (my method).method: "
            "'my method' is no name: use letters, digits, '_', '.' and '-', a letter or digit first"
        ],
    ),
    ("merge: [{method: x, name: 0}]", ["merge.0 (x).name: must be a text, found 0; put it in quotes"]),
    (
        "merge: [{method: x, scale: true}]",
        ["merge.0 (x).scale: must be a number or {search: [lowest, highest]}, found true"],
    ),
    (
        "merge: [{method: x, scale: [0, 1]}]",
        ["merge.0 (x).scale: must be a number or {search: [lowest, highest]}, found [0, 1]"],
    ),
    (
        "merge: [{method: x, scale: '1'}]",
        ["merge.0 (x).scale: must be a number or {search: [lowest, highest]}, found '1'"],
    ),
    ("merge: [{method: x, scale: {serch: [0, 1]}}]", ["merge.0 (x).scale.serch: unknown key; did you mean 'search'?"]),
    (
        "merge: [{method: x, scale: {}}]",
        ["merge.0 (x).scale: the key 'search' is missing (lowest and highest scale that is tried)"],
    ),
    (
        "merge: [{method: x, scale: {search: [1, 0]}}]",
        ["merge.0 (x).scale.search: must be [lowest, highest], found [1, 0]"],
    ),
    (
        "merge: [{method: x, scale: {search: [1]}}]",
        ["merge.0 (x).scale.search: must be two numbers [lowest, highest], found [1]"],
    ),
    (
        "merge: [{method: x, scale: {search: [1, 2, 3]}}]",
        ["merge.0 (x).scale.search: must be two numbers [lowest, highest], found [1, 2, 3]"],
    ),
    (
        "merge: [{method: x, scale: {search: [a, true]}}]",
        [
            "merge.0 (x).scale.search.0: must be a number, found 'a'",
            "merge.0 (x).scale.search.1: must be a number, found true",
        ],
    ),
    (
        "merge: [{method: x, scale: {search: [0, 1], points: 1}}]",
        ["merge.0 (x).scale.points: must be at least 2, found 1"],
    ),
    (
        "merge: [{method: x, vectors: plain}]",
        ["merge.0 (x).vectors: must be a list of plain, purified, found 'plain'; write [plain]"],
    ),
    (
        "merge: [{method: x, vectors: [pure]}]",
        ["merge.0 (x).vectors.0: 'pure' is not allowed; did you mean 'purified'?"],
    ),
    ("merge: [{method: x, vectors: []}]", ["merge.0 (x).vectors: needs at least 1 entry, found 0"]),
    (
        "merge: [{method: x, vectors: [plain, plain]}]",
        ["merge.0 (x).vectors: must not name the same vectors twice, found ['plain', 'plain']"],
    ),
    ("merge: [{method: x, purify: {rho: 2}}]", ["merge.0 (x).purify.rho: 2 is outside (0, 1]"]),
    ("merge: [{method: x, options: [1]}]", ["merge.0 (x).options: must be a mapping of options, found [1]"]),
    ("merge: [{use: ties}]", ["merge.0 (ties).use: unknown key; did you mean 'method'?"]),
    ("merge: [ties, ties]", ["each merge step needs a name of its own, but ties stands twice; give one a 'name'"]),
    ("merge: [base]", ["a merge step cannot be named 'base': the tables use that name"]),
]


@pytest.mark.parametrize(("text", "told"), WRONG)
def test_wrong_keys_and_values(tmp_path: Path, text: str, told: list[str]) -> None:
    assert problems(tmp_path, f"{SMALL}{text}\n") == told


OWN = "name: own, data: {train: a.csv}, text: body"
NO_TASK = "tasks.0: the key 'use' with the name of a known task is missing, or else the keys name, data and text"
WRONG_TASKS = [
    ("[]", ["tasks: needs at least 1 entry, found 0"]),
    ("pocket/movie", ["tasks: must be a list of tasks, found 'pocket/movie'; write [pocket/movie]"]),
    ("{movie: {}}", ["tasks: must be a list of tasks, found {movie: {}}"]),
    ("[pocket/movi]", ["tasks.0 (movi): unknown task 'pocket/movi'; did you mean 'pocket/movie'?"]),
    ("[movie]", ["tasks.0 (movie): unknown task 'movie'; did you mean 'pocket/movie'?"]),
    (
        "[{use: glue/sst3, label: 5}]",
        [
            "tasks.0 (sst3).use: unknown task 'glue/sst3'; did you mean 'glue/sst2'?",
            "tasks.0 (sst3).label: must be a text, found 5; put it in quotes",
        ],
    ),
    ("[{use: 3}]", ["tasks.0.use: must be the name of a known task, such as pocket/movie, found 3"]),
    (
        "[{use: [pocket/movie]}]",
        ["tasks.0.use: must be the name of a known task, such as pocket/movie, found ['pocket/movie']"],
    ),
    ("[7]", ["tasks.0: must be the name of a task such as pocket/movie, or a mapping that describes one, found 7"]),
    (
        "[null]",
        ["tasks.0: must be the name of a task such as pocket/movie, or a mapping that describes one, found nothing"],
    ),
    ("[pocket/isa, {use: pocket/movie, metrik: f1}]", ["tasks.1 (movie).metrik: unknown key; did you mean 'metrics'?"]),
    (
        "[{use: pocket/movie, learning_rate: 1}]",
        ["tasks.0 (movie).learning_rate: unknown key; it belongs under 'training'"],
    ),
    (
        "[{use: pocket/movie, training: {learning_rat: 1}}]",
        ["tasks.0 (movie).training.learning_rat: unknown key; did you mean 'learning_rate'?"],
    ),
    (
        "[{use: pocket/movie, training: null}]",
        [
            "tasks.0 (movie).training: must be a mapping with keys such as "
            "learning_rate, head_learning_rate, weight_decay, found nothing; give it a value or leave the key out"
        ],
    ),
    ("[{use: pocket/movie, data: {trian: x}}]", ["tasks.0 (movie).data.trian: unknown key; did you mean 'train'?"]),
    ("[{use: pocket/movie, trainer: 5}]", ["tasks.0 (movie).trainer: must be a mapping of options, found 5"]),
    (
        "[{us: pocket/movie, name: movie, data: {}, text: t, classes: 2}]",
        ["tasks.0 (movie).us: unknown key; did you mean 'use'?"],
    ),
    ("[{}]", [NO_TASK]),
    ("[{name: own, classes: 2}]", [NO_TASK.replace("tasks.0", "tasks.0 (own)")]),
    (
        "[{name: own, data: {}, classes: 2}]",
        [
            "tasks.0 (own): the key 'text' is missing (the column that holds the text, "
            "or the two columns of a text pair)"
        ],
    ),
    ("[{nme: own, data: {}, text: t, classes: 2}]", ["tasks.0.nme: unknown key; did you mean 'name'?"]),
    (
        f"[{{{OWN}}}]",
        ["tasks.0 (own): a classification task needs 'classes': their number, or their names in index order"],
    ),
    (f"[{{{OWN}, clases: 2}}]", ["tasks.0 (own).clases: unknown key; did you mean 'classes'?"]),
    (f"[{{{OWN}, classes: 1}}]", ["tasks.0 (own).classes: needs at least 2 entries, found 1"]),
    (
        f"[{{{OWN}, classes: true}}]",
        ["tasks.0 (own).classes: must be the number of classes, or a list of their names, found true"],
    ),
    (
        f"[{{{OWN}, classes: positive}}]",
        ["tasks.0 (own).classes: must be the number of classes, or a list of their names, found 'positive'"],
    ),
    (
        f"[{{{OWN}, classes: [0, 1]}}]",
        [
            "tasks.0 (own).classes.0: must be a text, found 0; put it in quotes",
            "tasks.0 (own).classes.1: must be a text, found 1; put it in quotes",
        ],
    ),
    (f"[{{{OWN}, classes: [a, a]}}]", ["tasks.0 (own): the names in 'classes' must differ"]),
    (
        f"[{{{OWN}, classes: 2, metrics: acuracy}}]",
        ["tasks.0 (own).metrics: 'acuracy' is not allowed; did you mean 'accuracy'?"],
    ),
    (
        f"[{{{OWN}, classes: 2, metrics: [f1, acuracy]}}]",
        ["tasks.0 (own).metrics.1: 'acuracy' is not allowed; did you mean 'accuracy'?"],
    ),
    (
        f"[{{{OWN}, classes: 2, metrics: 3}}]",
        ["tasks.0 (own).metrics: must be the name of a metric, or a list of names, found 3"],
    ),
    (f"[{{{OWN}, classes: 2, metrics: []}}]", ["tasks.0 (own).metrics: needs at least 1 entry, found 0"]),
    (
        f"[{{{OWN}, classes: 2, headline: zzz}}]",
        [
            "tasks.0 (own).headline: 'zzz' is not allowed; "
            "known are: accuracy, f1, macro_f1, matthews, pearson, spearman"
        ],
    ),
    (f"[{{{OWN}, classes: 2, headline: f1}}]", ["tasks.0 (own): the headline 'f1' is not among the metrics accuracy"]),
    (f"[{{{OWN}, classes: 3, metrics: f1}}]", ["tasks.0 (own): 'f1' is for two classes; for more use 'macro_f1'"]),
    (f"[{{{OWN}, kind: regresion}}]", ["tasks.0 (own).kind: 'regresion' is not allowed; did you mean 'regression'?"]),
    (f"[{{{OWN}, kind: regression, value_range: [5, 0]}}]", ["tasks.0 (own): 'value_range' must be [lowest, highest]"]),
    (
        f"[{{{OWN}, kind: regression, value_range: 5}}]",
        ["tasks.0 (own).value_range: must be two numbers [lowest, highest], found 5"],
    ),
    (
        f"[{{{OWN}, kind: regression, value_range: [0]}}]",
        ["tasks.0 (own).value_range: must be two numbers [lowest, highest], found [0]"],
    ),
    (
        f"[{{{OWN}, classes: 2, expert: a/b}}]",
        ["tasks.0 (own).expert: must be a mapping with keys such as from, found 'a/b'"],
    ),
    (
        f"[{{{OWN}, classes: 2, expert: {{form: a/b}}}}]",
        ["tasks.0 (own).expert.form: unknown key; did you mean 'from'?"],
    ),
    (
        f"[{{{OWN}, classes: 2, expert: {{}}}}]",
        [
            "tasks.0 (own).expert: the key 'from' is missing "
            "(folder or hub id of a fine-tuned sequence-classification checkpoint (or of a peft adapter of the base))"
        ],
    ),
    (
        "[{name: own, data: x.csv, text: 5, classes: 2}]",
        [
            "tasks.0 (own).data: must be a mapping with keys such as hub, config, revision, found 'x.csv'",
            "tasks.0 (own).text: must be the name of a column, or a list of one or two, found 5",
        ],
    ),
    ("[{name: own, data: {}, text: [a, b, c], classes: 2}]", ["tasks.0 (own).text: needs at most 2 entries, found 3"]),
    (
        "[{name: own, data: {}, text: [a, 5], classes: 2}]",
        ["tasks.0 (own).text.1: must be a text, found 5; put it in quotes"],
    ),
    (
        "[{name: own, data: {}, text: null, classes: 2}]",
        ["tasks.0 (own).text: must be the name of a column, or a list of one or two, found nothing"],
    ),
    ("[{name: 5, data: {}, text: a, classes: 2}]", ["tasks.0.name: must be a text, found 5; put it in quotes"]),
    (
        "[{name: a/b, data: {}, text: a, classes: 2}]",
        ["tasks.0 (b).name: 'a/b' is no name: use letters, digits, '_', '.' and '-', a letter or digit first"],
    ),
    ("[pocket/isa, pocket/isa]", ["each task needs a name of its own, but isa stands twice; give one a 'name'"]),
]


@pytest.mark.parametrize(("tasks", "told"), WRONG_TASKS)
def test_wrong_tasks(tmp_path: Path, tasks: str, told: list[str]) -> None:
    assert problems(tmp_path, f"{START}tasks: {tasks}\n") == told


def test_missing_keys_are_named(tmp_path: Path) -> None:
    assert problems(tmp_path, "seed: 1\n") == [
        "the key 'name' is missing (name of the run; its folder is output/name)",
        "the key 'base' is missing (the common base model)",
        "the key 'tasks' is missing (the tasks)",
    ]


def test_everything_is_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """
name: a b
seed: yes
base: folder
training: {learning_rat: 1}
purify: {tasks: [movi], rho: 2}
tasks:
  - pocket/movie
  - pocket/movie
  - {use: pocket/isa, kind: regression, training: {batch_size: 0}}
  - {use: pocket/sense, training: {early_stopping: {patience: 0}}}
merge:
  - {method: ties, scale: true}
  - {method: average, name: base}
"""
    assert problems(tmp_path, text) == [
        "each task needs a name of its own, but movie stands twice; give one a 'name'",
        "purify.tasks: no task is named 'movi'; did you mean 'movie'?",
        "a merge step cannot be named 'base': the tables use that name",
        "name: 'a b' is no name: use letters, digits, '_', '.' and '-', a letter or digit first",
        "seed: must be a whole number in [0, 2147483647], found 'yes'",
        "training.learning_rat: unknown key; did you mean 'learning_rate'?",
        "purify.rho: 2 is outside (0, 1]",
        "tasks.2 (isa): 'classes' belongs to classification tasks",
        "tasks.2 (isa): metric 'accuracy' does not fit a regression task; fitting are pearson, spearman",
        "tasks.2 (isa).training.batch_size: must be at least 1, found 0",
        "tasks.3 (sense).training.early_stopping.patience: must be at least 1, found 0",
        "merge.0 (ties).scale: must be a number or {search: [lowest, highest]}, found true",
    ]


def test_a_mistake_in_a_shared_section_is_told_once(tmp_path: Path) -> None:
    text = START + (
        "training: {batch_size: 0, lora: {rank: 0}}\nexamples: {train: x}\npurify: {rho: 2}\n"
        "tasks: [pocket/movie, {use: pocket/isa, training: {batch_size: -1}}, pocket/sense]\nmerge: [average, ties]\n"
    )
    assert problems(tmp_path, text) == [
        "training.batch_size: must be at least 1, found 0",
        "training.lora.rank: must be at least 1, found 0",
        "examples.train: must be a whole number, at least 1, found 'x'",
        "purify.rho: 2 is outside (0, 1]",
        "tasks.1 (isa).training.batch_size: must be at least 1, found -1",
    ]


def test_more_than_twenty_problems_are_counted(tmp_path: Path) -> None:
    told = problems(tmp_path, SMALL + "".join(f"zzz{index}: 1\n" for index in range(25)))
    assert len(told) == 21
    assert told[-1].strip() == "... and 5 more"


def test_long_values_are_shortened(tmp_path: Path) -> None:
    (told,) = problems(tmp_path, f"{SMALL}seed: {'x' * 500}\n")
    assert len(told) < 140
    assert told.endswith("xxx...")


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("evaluate.precision=bf16-true", "evaluate.precision", "bf16-true"),
        ("training.lora=null", "training.lora", None),
        ("training.early_stopping=", "training.early_stopping", None),
        ("training.lora.target_modules.1=key", "training.lora.target_modules.1", "key"),
        ("training.freeze.1=encoder", "training.freeze.1", "encoder"),
        ("trainer.devices=[0, 1]", "trainer.devices", [0, 1]),
        ("trainer.nested.0.a.1.0=5", "trainer.nested.0.a.1.0", 5),
        ("trainer.new.deep=1", "trainer.new.deep", 1),
        ("trainer.list.0=1", "trainer.list", [1]),
        ("tracking.uri=http://host:5000/a=b", "tracking.uri", "http://host:5000/a=b"),
        ("tasks.0.examples.train=7", "tasks.0.examples.train", 7),
        ("tasks.movie.examples.train=7", "tasks.0.examples.train", 7),
        ("tasks.isa.examples.train=7", "tasks.1.examples.train", 7),
        ("tasks.own.expert.from=folder", "tasks.2.expert.from_", "folder"),
        ("tasks.own.classes=2", "tasks.2.classes", ["0", "1"]),
        ("tasks.own.data.test=d.csv", "tasks.2.data.test", "d.csv"),
        ("tasks.movie.data.train=d.csv", "tasks.0.data.train", "d.csv"),
        ("tasks.4=pocket/sense", "tasks.4.name", "sense"),
        ("tasks.4.use=pocket/sense", "tasks.4.name", "sense"),
        ("tasks.own=pocket/sense", "tasks.2.name", "sense"),
        ("merge.average.scale=0.4", "merge.0.scale", 0.4),
        ("merge.ties.scale={search: [0.1, 1]}", "merge.1.scale", ScaleSearch(search=(0.1, 1.0))),
        ("merge.searched.scale.points=9", "merge.2.scale.points", 9),
        ("merge.2.purify.rho=0.7", "merge.2.purify.rho", 0.7),
        ("merge.3=dare", "merge.3.name", "dare"),
        ("purify.tasks=[movie]", "merge.0.purify.tasks", ["movie"]),
    ],
)
def test_overrides(tmp_path: Path, override: str, path: str, value: Any) -> None:
    found: Any = read(tmp_path, FULL, override)
    for part in path.split("."):
        if isinstance(found, list):
            found = found[int(part)]
        else:
            found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_overrides_are_applied_in_order(tmp_path: Path) -> None:
    recipe = read(tmp_path, SMALL, "seed=1", "seed=2", "merge.0=ties", "merge.ties.scale=0.3")
    assert recipe.seed == 2
    assert recipe.merge[0].scale == 0.3


def test_names_with_dots(tmp_path: Path) -> None:
    recipe = read(tmp_path, SMALL, "merge=[{method: ties, name: ties.v1.0}]", "merge.ties.v1.0.scale=0.3")
    assert recipe.merge[0].scale == 0.3


def test_an_override_changes_one_place_even_where_the_file_uses_an_alias(tmp_path: Path) -> None:
    text = START + "tasks: [{use: pocket/movie, examples: &a {train: 5}}, {use: pocket/isa, examples: *a}]\n"
    recipe = read(tmp_path, text, "tasks.isa.examples.train=9")
    assert [task.examples.train for task in recipe.tasks] == [5, 9]


def test_an_override_can_mend_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, SMALL + "seed: wrong\n", "seed=5").seed == 5


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "override 'seed': has no '='; write key=value, such as seed=1 or tasks.0.examples.train=100"),
        ("=5", "override '=5': has an empty part before the '='; write key=value or key.key=value"),
        ("a..b=5", "override 'a..b=5': has an empty part before the '='; write key=value or key.key=value"),
        ("tasks.6=x", "override 'tasks.6=x': tasks has no entry 6; there are 0 to 3, and 4 appends one"),
        ("tasks.-1=x", "override 'tasks.-1=x': tasks has no entry '-1'; known are: movie, isa, own, pair"),
        ("tasks.movi.label=x", "override 'tasks.movi.label=x': tasks has no entry 'movi'; did you mean 'movie'?"),
        ("merge.tis.scale=1", "override 'merge.tis.scale=1': merge has no entry 'tis'; did you mean 'ties'?"),
        (
            "training.freeze.a=1",
            "override 'training.freeze.a=1': training.freeze is a list, so 'a' must be the number of an entry, "
            "counted from 0",
        ),
        ("seed.a=1", "override 'seed.a=1': seed is 3, which has no keys of its own"),
        ("base.a.b=1", "override 'base.a.b=1': base is 'package:models/mini', which has no keys of its own"),
        ("trainer=&a {b: [*a]}", "trainer.b.0: contains itself through a YAML alias"),
        ("seed=[1", "override 'seed=[1': the value '[1' is not valid YAML"),
        ("seed={a: 1, a: 2}", "override 'seed={a: 1, a: 2}': the value '{a: 1, a: 2}' is not valid YAML"),
        ("sed=1", "sed: unknown key; did you mean 'seed'?"),
        ("seed=x", "seed: must be a whole number in [0, 2147483647], found 'x'"),
        ("tasks.movie.examples.trian=1", "tasks.0 (movie).examples.trian: unknown key; did you mean 'train'?"),
        ("tasks.movie.use=pocket/movi", "tasks.0 (movi).use: unknown task 'pocket/movi'; did you mean 'pocket/movie'?"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, told: str) -> None:
    path = write(tmp_path, FULL.replace("[movie, isa]", "[isa]"))
    with pytest.raises(PaveError) as caught:
        load_recipe(path, [override])
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"  - {told}")


def test_wrong_overrides_are_told_with_everything_else(tmp_path: Path) -> None:
    assert problems(tmp_path, SMALL + "sed: 1\n", "seed", "purify.rho=2") == [
        "override 'seed': has no '='; write key=value, such as seed=1 or tasks.0.examples.train=100",
        "sed: unknown key; did you mean 'seed'?",
        "purify.rho: 2 is outside (0, 1]",
    ]


def test_a_key_that_a_wrong_override_would_have_given_is_not_called_missing(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "name: demo\ntasks: [pocket/movie]\n", "base folder")) == 1


def test_a_name_that_several_entries_have(tmp_path: Path) -> None:
    (told, *_) = problems(tmp_path, SMALL + "merge: [ties, ties]\n", "merge.ties.scale=1")
    assert told.endswith("merge has several entries named 'ties'; address one by its number, counted from 0")


# --- the recipe as YAML, digest and schema ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES.keys())
def test_round_trip(tmp_path: Path, text: str) -> None:
    recipe = read(tmp_path, text)
    written = recipe_to_yaml(recipe)
    again = read(tmp_path, written)
    assert again == recipe
    assert recipe_to_yaml(again) == written
    assert recipe_digest(again) == recipe_digest(recipe)


def test_awkward_texts_survive_the_round_trip(tmp_path: Path) -> None:
    recipe = read(tmp_path, FULL)
    task = recipe.tasks[2].model_copy(update={"classes": AWKWARD})
    trainer = {"texts": AWKWARD, "numbers": [1e-5, 1e16, 5e-324, 0.1, -0.0, 10**30, 1.0], **dict.fromkeys(AWKWARD, 1)}
    recipe = recipe.model_copy(update={"trainer": trainer, "tasks": [task]})
    recipe = Recipe.model_validate({**recipe.model_dump(by_alias=True), "merge": [], "purify": {}})
    assert read(tmp_path, recipe_to_yaml(recipe)) == recipe


def test_resolved_yaml_is_filled_in_and_in_the_order_of_the_fields(tmp_path: Path) -> None:
    resolved = YAML(typ="safe", pure=True).load(recipe_to_yaml(read(tmp_path, FULL)))
    assert list(resolved) == list(Recipe.model_fields)
    assert resolved["tasks"][0]["training"]["learning_rate"] == 3e-5
    assert resolved["tasks"][0]["trainer"]["max_epochs"] == 2
    assert resolved["tasks"][1]["trainer"]["max_epochs"] == 1
    assert resolved["tasks"][3]["expert"] == {"from": "some/checkpoint"}
    assert resolved["merge"][0]["purify"]["rho"] == 0.9
    assert resolved["merge"][2]["purify"]["rho"] == 0.5
    assert "use" not in resolved["tasks"][0]


def test_digest(tmp_path: Path) -> None:
    digest = recipe_digest(read(tmp_path, FULL))
    assert len(digest) == 64
    assert digest == recipe_digest(read(tmp_path, FULL, "tracking.experiment=other", "output=elsewhere"))
    assert digest == recipe_digest(read(tmp_path, "# comment\n" + FULL))
    assert digest != recipe_digest(read(tmp_path, FULL, "seed=4"))
    assert digest != recipe_digest(read(tmp_path, FULL, "tasks.own.label=other"))
    assert recipe_digest(read(tmp_path, SMALL + "purify: {rho: 1}\n")) == recipe_digest(
        read(tmp_path, SMALL + "purify: {rho: 1.0}\n")
    )


def schema_errors(text: str) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    document = YAML(typ="safe", pure=True).load(text)
    return [error.message for error in jsonschema.Draft202012Validator(recipe_schema()).iter_errors(document)]


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
def test_the_schema_accepts_recipes(tmp_path: Path, text: str) -> None:
    assert schema_errors(text) == []
    assert schema_errors(recipe_to_yaml(read(tmp_path, text))) == []


@pytest.mark.parametrize(
    "keys",
    [
        "merge: [average, {method: ties, name: null, scale: {search: [0, 1]}, purify: {rho: 0.5}}]",
        "examples: {train: null}",
        "training: {lora: {target_modules: all-linear}}",
    ],
)
def test_the_schema_accepts_what_the_loader_accepts(tmp_path: Path, keys: str) -> None:
    read(tmp_path, f"{SMALL}{keys}\n")
    assert schema_errors(f"{SMALL}{keys}\n") == []


@pytest.mark.parametrize(
    "tasks",
    [
        f"[{{{OWN}, classes: 2, metrics: null, headline: null}}]",
        f"[{{{OWN}, classes: [a, b], metrics: accuracy, training: {{batch_size: 4}}, trainer: {{max_epochs: 1}}}}]",
        "[{use: glue/sst2, data: {revision: abc}, text: sentence, examples: {train: 5}}]",
    ],
)
def test_the_schema_accepts_short_forms_of_tasks(tmp_path: Path, tasks: str) -> None:
    read(tmp_path, f"{START}tasks: {tasks}\n")
    assert schema_errors(f"{START}tasks: {tasks}\n") == []


OUTSIDE_THE_SCHEMA = (
    "1e3",
    "[1, 0]",
    "movi]",
    "plain, plain",
    "my method",
    "name: 0",
    "[ties, ties]",
    "[base]",
    ".inf",
    ".nan",
)


@pytest.mark.parametrize("text", [text for text, _ in WRONG if not text.startswith(("trainer: ", "purify: {1"))])
def test_the_schema_refuses_what_can_be_told_without_reading_two_keys_together(text: str) -> None:
    if not any(outside in text for outside in (*OUTSIDE_THE_SCHEMA, "2024")):
        assert schema_errors(f"{SMALL}{text}\n")


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
def test_the_schema_refuses_wrong_tasks(tasks: str) -> None:
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
def test_junk_anywhere_is_accepted_or_told_in_words(tmp_path: Path, seed: int) -> None:
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
        assert read(tmp_path, recipe_to_yaml(recipe)) == recipe
        return
    lines = told.splitlines()
    assert len(lines) == len(set(lines)) > 1
    for jargon in ("Input should", "Value error", "pydantic", "http", "_Absent", "stand-in", "something else"):
        assert jargon not in told


def test_reading_recipes_imports_nothing_heavy() -> None:
    script = (
        "import sys, pave_lightning.recipe_loading as loading; loading.recipe_schema(); "
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'mlflow', 'numpy'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
