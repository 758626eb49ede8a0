"""Recipes that ask for more than any machine has: refused at once, in little memory, before torch is loaded."""

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.recipe.loading import load_recipe
from pave_lightning.recipe.yaml_text import MOST_BYTES, YAMLReadError, read_yaml

START = "name: demo\nbase: folder\n"
TASKS = "tasks: [pocket/movie, pocket/isa]\n"
MERGE = START + TASKS + "merge: [ties]\n"


def numbered(pattern, count, between=", "):
    return between.join(pattern.format(i=index, j=index + 1) for index in range(count))


LAUGHS = "a0: &a0 [x, x]\n" + numbered("a{j}: &a{j} [*a{i}, *a{i}, *a{i}, *a{i}, *a{i}]\n", 30, "")
MERGE_KEYS = "a0: &a0 {k: 1}\n" + numbered(
    "a{j}: &a{j} {{<<: [*a{i}, *a{i}, *a{i}, *a{i}, *a{i}, *a{i}], k{j}: 1}}\n", 15, ""
)
WIDE = f"[{numbered('{i}', 30)}]"
ATTACKS = {
    "laughs": (LAUGHS, "with all that its aliases stand for"),
    "merge keys": (MERGE_KEYS, "with all that its aliases stand for"),
    "an alias of itself": ("a: &a {b: [*a]}\n", "a YAML alias contains itself"),
    "a merge key of itself": ("a: &a {<<: *a}\n", "a YAML alias contains itself"),
    "deep": ("[" * 400_000, "nested too deeply"),
    "deep by aliases": ("a0: &a0 [1]\n" + numbered("a{j}: &a{j} [*a{i}]\n", 100, ""), "nested too deeply"),
    "many keys": (MERGE + numbered("k{i}: 1", 20_000, "\n"), "holds more than 25000 keys and values"),
    "many unknown keys": (MERGE + numbered("learning_rat{i}: 1", 900, "\n"), r"learning_rat0: unknown key.*880 more"),
    "many keys of one mapping": (MERGE + numbered("k{i}: 1", 1001, "\n"), r"has 1,\d+ keys, expected at most 1,000"),
    "unknown keys everywhere": (
        f"{START}merge: [ties]\ntasks: [{numbered('{{use: pocket/movie, lrate: 1, b: 2, c: 3}}', 490)}]\n",
        "unknown key; did you mean 'label'",
    ),
    "unknown metrics": (
        f"{START}merge: [ties]\ntasks: [{{use: pocket/movie, metrics: [{numbered('acc{i}', 12_000)}]}}]\n",
        "did you mean 'accuracy'.*11980 more",
    ),
    "unknown tasks": (f"{START}merge: [ties]\ntasks: [{numbered('pocket/movi{i}', 490)}]\n", "470 more"),
    "too many tasks": (f"{START}tasks: [{numbered('pocket/movie', 501)}]\n", "tasks: has 501 entries"),
    "purified tasks": (MERGE + f"purify: {{tasks: [{numbered('movi{i}', 12_000)}]}}\n", "did you mean 'movie'"),
    "anchors": (
        START + TASKS + f"merge: [{numbered('{{method: lot, name: m{i}, anchor: m{j}}}', 490)}]\n",
        "no merge step is named 'm490'",
    ),
    "classes": (f"{START}tasks: [{{name: a, data: {{}}, text: t, classes: 100000000}}]\n", "there are 100,000,000"),
    "classes of many tasks": (
        f"{START}tasks: [{numbered('{{name: a{i}, data: {{}}, text: t, classes: 20000}}', 100)}]\n",
        "keys, values and classes, at most 25,000 are read",
    ),
    "tune": (
        START + TASKS + f"merge: [{{method: ties, tune: {{{numbered('k{i}: ' + WIDE, 30)}}}}}]\n",
        "merge.0.tune: asks for more than 1,000,000,000,000,000 combinations, expected at most 1,000",
    ),
    "a long tune": (
        START + TASKS + f"merge: [{{method: ties, tune: {{k: [{numbered('{i}', 12_000)}]}}}}]\n",
        "merge.0.tune: asks for 12,000 combinations",
    ),
    "vary": (MERGE + f"sweep: {{question: q, vary: {{{numbered('k{i}: ' + WIDE, 30)}}}}}\n", "asks for more than"),
    "seeds and cases": (
        MERGE + f"sweep: {{question: q, seeds: [{numbered('{i}', 50)}], cases: {{{numbered('c{i}: {{}}', 50)}}}}}",
        "sweep: asks for 2,500 combinations of seeds, cases and varied values",
    ),
    "scales": (
        START + TASKS + "merge: [{method: ties, scale: {search: [0, 1], points: 1000000000}}]\n",
        "merge.0.scale.points: there are 1,000,000,000",
    ),
    "a long number": (f"{MERGE}seed: 0x{'f' * 900_000}\n", "a whole number of more than 1000 bits"),
    "a long decimal number": (f"{MERGE}seed: {'9' * 900_000}\n", "is not valid YAML"),
    "a long text": (f"{MERGE}seed: {'k' * 900_000}\n", "seed: is a text of 900,000 characters"),
    "a long key": (f"{START}{TASKS}{'k' * 900}: 1\n", "unknown key"),
    "many lines": ("a: x\n" + " x\n" * 300_000, "more than 50000 lines"),
    "a large file": ("#" * (MOST_BYTES + 1), "too large: expected at most 1,000,000 bytes"),
    "a zero byte": (MERGE + 'shared: "a\\0b"\n', "shared: holds a zero byte or half a character"),
    "half a character": (MERGE + 'shared: "\\ud800"\n', "shared: holds a zero byte or half a character"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(write_recipe, attack):
    text, told = ATTACKS[attack]
    with pytest.raises(PaveError, match=rf"(?s){told}") as caught:
        load_recipe(write_recipe(text), option_problems=lambda recipe: pytest.fail("the merge methods were asked"))
    assert len(str(caught.value)) < 10_000


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "sweep"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_cost_little(tmp_path, measured, attack, command):
    (tmp_path / "recipe.yaml").write_text(ATTACKS[attack][0])
    code, torch, peak, seconds = measured(tmp_path, command, "recipe.yaml")
    assert (code, torch) == (2, False)
    assert peak < 500
    assert seconds < 5


def test_an_attack_on_the_command_line_costs_little(tmp_path, measured):
    (tmp_path / "recipe.yaml").write_text(MERGE)
    laughs = LAUGHS.replace("\n", ", ").strip(", ")
    code, torch, peak, seconds = measured(tmp_path, "run", "recipe.yaml", "--set", f"trainer={{{laughs}}}")
    assert (code, torch) == (2, False)
    assert peak < 500
    assert seconds < 5


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (".".join("a" * 60) + "=1", "has 60 parts before the '='"),
        ("seed=" + "[" * 5000, "nested too deeply"),
        (f"tasks.{'9' * 5000}.label=x", "tasks has no entry 9999"),
        (f"{'k' * 5000}", "has no '='"),
        ("seed=0x" + "f" * 5000, "a whole number of more than 1000 bits"),
    ],
)
def test_hostile_overrides(write_recipe, override, told):
    with pytest.raises(PaveError, match=told) as caught:
        load_recipe(write_recipe(MERGE), [override])
    assert len(str(caught.value)) < 2000


def test_thousands_of_overrides(write_recipe):
    with pytest.raises(PaveError, match="there are 1001 overrides, expected at most 1000"):
        load_recipe(write_recipe(MERGE), ["seed=1"] * 1001)


@pytest.mark.parametrize(
    "text",
    ["!!timestamp x", "!!bool x", "!!int ''", "!!set {a: 1, a: 1}", "!!binary \u00e9", "%TAG ! x\n---\n!b 1", "<<"],
)
def test_tags_that_do_not_fit(text):
    with pytest.raises(YAMLReadError):
        read_yaml(text if text.startswith("%") else f"a: {text}")


def test_as_many_classes_as_the_largest_data_sets_have(write_recipe):
    text = f"{START}tasks: [{{name: a, data: {{}}, text: t, classes: 21841}}]\n"
    assert load_recipe(write_recipe(text)).tasks[0].output_size == 21_841


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("merge: [{method: ties, name: manifest.json}]", "'manifest.json' cannot be a name"),
        ("merge: [{method: ties, name: a.unfinished-12}]", "'a.unfinished-12' cannot be a name"),
        ("merge: [{method: ties, name: a.replaced-12}]", "'a.replaced-12' cannot be a name"),
        ("merge: [{method: ties, name: a.}]", "must not end with '.'"),
        (f"merge: [{{method: ties, name: {'a' * 101}}}]", "has 101 characters, expected at most 100"),
        ('merge: [{method: ties, name: "a\\e[31m"}]', "is no name: use letters"),
        ("merge: [{method: ties, name: Mine}, {method: ties, name: mine}]", "'Mine' and 'mine' differ by case alone"),
        ('output: "a\\nb"', "output: must be a path of printable characters"),
        ('shared: "a\\e[2Jb"', "shared: must be a path of printable characters"),
    ],
)
def test_names_that_collide_with_ours(recipe_problems, text, told):
    (problem,) = recipe_problems(f"{START}{TASKS}{text}\n")
    assert told in problem


def test_tasks_that_differ_by_case_alone(recipe_problems):
    tasks = "[pocket/movie, {use: pocket/isa, name: Movie}]"
    (problem,) = recipe_problems(f"{START}tasks: {tasks}\n")
    assert "the tasks 'movie' and 'Movie' differ by case alone" in problem


def test_a_slip_is_told_before_another_section(recipe_problems):
    (problem,) = recipe_problems(f"{START}tasks: [{{use: pocket/movie, metric: accuracy}}]\n")
    assert problem == "tasks.0 (movie).metric: unknown key; did you mean 'metrics'?"
