from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.recipe.loading import load_recipe
from pave_lightning.recipe.schema import Recipe

Write = Callable[[str], Path]
Read = Callable[..., Recipe]
Problems = Callable[..., list[str]]

START = "name: demo\nbase: folder\n"
SMALL = START + "tasks: [pocket/movie]\n"
FULL = (Path(__file__).parent / "full_recipe.yaml").read_text()


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
def test_overrides(read_recipe: Read, override: str, path: str, value: Any) -> None:
    found: Any = read_recipe(FULL, override)
    for part in path.split("."):
        if isinstance(found, list):
            found = found[int(part)]
        else:
            found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_overrides_are_applied_in_order(read_recipe: Read) -> None:
    recipe = read_recipe(SMALL, "seed=1", "seed=2", "merge.0=ties", "merge.ties.scale=0.3")
    assert recipe.seed == 2
    assert recipe.merge[0].scale == 0.3


def test_names_with_dots(read_recipe: Read) -> None:
    recipe = read_recipe(SMALL, "merge=[{method: ties, name: ties.v1.0}]", "merge.ties.v1.0.scale=0.3")
    assert recipe.merge[0].scale == 0.3


def test_an_override_changes_one_place_even_where_the_file_uses_an_alias(read_recipe: Read) -> None:
    text = START + "tasks: [{use: pocket/movie, examples: &a {train: 5}}, {use: pocket/isa, examples: *a}]\n"
    recipe = read_recipe(text, "tasks.isa.examples.train=9")
    assert [task.examples.train for task in recipe.tasks] == [5, 9]


def test_an_override_can_mend_the_file(read_recipe: Read) -> None:
    assert read_recipe(SMALL + "seed: wrong\n", "seed=5").seed == 5


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
        (
            "trainer=&a {b: [*a]}",
            "override 'trainer=&a {b: [*a]}': the value '&a {b: [*a]}' cannot be used: a YAML alias contains itself",
        ),
        ("seed=[1", "override 'seed=[1': the value '[1' is not valid YAML"),
        ("seed={a: 1, a: 2}", "override 'seed={a: 1, a: 2}': the value '{a: 1, a: 2}' is not valid YAML"),
        ("sed=1", "sed: unknown key; did you mean 'seed'?"),
        ("seed=x", "seed: must be a whole number in [0, 2147483647], found 'x'"),
        ("tasks.movie.examples.trian=1", "tasks.0 (movie).examples.trian: unknown key; did you mean 'train'?"),
        ("tasks.movie.use=pocket/movi", "tasks.0 (movi).use: unknown task 'pocket/movi'; did you mean 'pocket/movie'?"),
    ],
)
def test_wrong_overrides(write_recipe: Write, override: str, told: str) -> None:
    path = write_recipe(FULL.replace("[movie, isa]", "[isa]"))
    with pytest.raises(PaveError) as caught:
        load_recipe(path, [override])
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"  - {told}")


def test_wrong_overrides_are_told_with_everything_else(recipe_problems: Problems) -> None:
    assert recipe_problems(SMALL + "sed: 1\n", "seed", "purify.rho=2") == [
        "override 'seed': has no '='; write key=value, such as seed=1 or tasks.0.examples.train=100",
        "sed: unknown key; did you mean 'seed'?",
        "purify.rho: 2 is outside (0, 1]",
    ]


def test_a_key_that_a_wrong_override_would_have_given_is_not_called_missing(recipe_problems: Problems) -> None:
    assert len(recipe_problems("name: demo\ntasks: [pocket/movie]\n", "base folder")) == 1


def test_a_name_that_several_entries_have(recipe_problems: Problems) -> None:
    (told, *_) = recipe_problems(SMALL + "merge: [ties, ties]\n", "merge.ties.scale=1")
    assert told.endswith("merge has several entries named 'ties'; address one by its number, counted from 0")
