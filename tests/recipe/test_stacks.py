"""Stacks of transforms, as recipes name them."""

import pytest

from pave_lightning.recipe.loading import load_recipe, recipe_to_yaml

START = "name: a\nbase: b\ntasks: [pocket/movie, pocket/topic]\n"
SHORT = "vectors: {short: [dare]}\n"


def test_a_stack_is_a_list_of_names_with_or_without_options(read_recipe, write_recipe):
    stacks = "vectors: {halved: [{task_weights: {movie: 0.5}}], dropped_then_pave: [dare, pave]}\n"
    recipe = read_recipe(f"{START}{stacks}merge: [{{method: x, vectors: [halved, plain, dropped_then_pave]}}]")
    assert recipe.stack("halved") == [("task_weights", {"movie": 0.5})]
    assert recipe.stack("dropped_then_pave") == [("dare", {}), ("pave", {})]
    assert (recipe.stack("plain"), recipe.stack("purified")) == ([], [("pave", {})])
    assert load_recipe(write_recipe(recipe_to_yaml(recipe))) == recipe


def test_options_are_reached_by_overrides(read_recipe):
    recipe = read_recipe(
        START + "vectors: {halved: [{task_weights: {movie: 0.5}}]}", "vectors.halved.0.task_weights.topic=2"
    )
    assert recipe.stack("halved") == [("task_weights", {"movie": 0.5, "topic": 2})]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vectors: {short: dare}", "vectors.short: must be a list of transforms, found 'dare'; write [dare]"),
        ("vectors: {short: []}", "vectors.short: needs at least 1 entry, found 0"),
        (f"vectors: {{short: [{'dare, ' * 21}]}}", "vectors.short: needs at most 20 entries, found 21"),
        (
            "vectors: {short: [3]}",
            "vectors.short.0: must be the name of a transform, or {NAME: {...}} with its options",
        ),
        ("vectors: {short: [{dare: 1}]}", "vectors.short.0: must be the name of a transform"),
        ("vectors: {short: [{dare: {}, pave: {}}]}", "vectors.short.0: must be the name of a transform"),
        ("vectors: {plain: [dare]}", "vectors: every recipe has 'plain' already; choose another name"),
        ("vectors: {purified: [dare]}", "vectors: every recipe has 'purified' already; choose another name"),
        ("vectors: {base: [dare]}", "vectors: a stack cannot be named 'base': the tables use that name"),
        ("vectors: {experts: [dare]}", "vectors: a stack cannot be named 'experts': the tables use that name"),
        ("vectors: {a/b: [dare]}", "vectors: 'a/b' is no name: use letters, digits"),
        ('vectors: {"": [dare]}', "vectors: '' is no name: use letters, digits"),
        ("vectors: {a.lock: [dare]}", "vectors: 'a.lock' cannot be a name: it must not end with '.lock'"),
        (f"vectors: {{{'a' * 101}: [dare]}}", "has 101 characters, expected at most 100"),
        (
            f"{SHORT}merge: [{{method: x, vectors: [shrt]}}]",
            "merge step 'x': vectors: no stack is named 'shrt'; did you mean 'short'?",
        ),
        (
            "vectors: {b-c: [dare], c: [dare]}\n"
            "merge: [{method: x, name: a, vectors: [b-c]}, {method: x, name: a-b, vectors: [c]}]",
            "merge step 'a' on 'b-c' and 'a-b' on 'c' would be written into one folder, merged/a-b-c",
        ),
        (
            "vectors: {short: [dare], Short: [dare]}\nmerge: [{method: x, vectors: [short, Short]}]",
            "merge step 'x' on 'short' and 'x' on 'Short' would be written into one folder",
        ),
    ],
)
def test_what_is_wrong_is_told(recipe_problems, text, told):
    (problem,) = recipe_problems(START + text)
    assert told in problem


def test_a_stack_that_is_wrong_is_not_missed_where_it_is_used(recipe_problems):
    (problem,) = recipe_problems(f"{START}vectors: {{short: 3}}\nmerge: [{{method: x, vectors: [short]}}]")
    assert problem.startswith("vectors.short: must be a list of transforms")


def test_the_schema_knows_stacks(schema_errors):
    right = "vectors: {halved: [{task_weights: {movie: 0.5}}, dare]}\nmerge: [{method: x, vectors: [plain, halved]}]"
    assert schema_errors(START + right) == []
    for wrong in ("[dare]", "{a: dare}", "{a: []}", "{a: [3]}", "{a: [{dare: 1}]}", "{a: [{dare: {}, pave: {}}]}"):
        assert schema_errors(f"{START}vectors: {wrong}"), wrong
    assert schema_errors(START + "merge: [{method: x, vectors: [a/b]}]")
