"""What is loaded for one stage is there for all others of the same recipe, and for no other recipe."""

import pytest

from pave_lightning import Recipe
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.results import Results


@pytest.fixture
def contexts(ready_settings):
    recipes = [Recipe.model_validate({**ready_settings, "seed": seed}) for seed in (1, 2)]
    return [Context(Results(recipe, open_folder(recipe))) for recipe in recipes]


def test_what_is_shared_is_loaded_once_a_context(contexts):
    loaded = []

    @shared
    def seeds(context):
        """The seed, in a list."""
        loaded.append(context.recipe.seed)
        return [context.recipe.seed]

    first, second = contexts
    assert seeds(first) is seeds(first)
    assert (seeds(first), seeds(second)) == ([1], [2])
    assert loaded == [1, 2]
    assert seeds.__doc__ == "The seed, in a list."


def test_what_cannot_be_loaded_is_tried_again(contexts):
    @shared
    def fragile(context):
        if not context.label:
            raise ValueError("no label")
        return context.label

    with pytest.raises(ValueError, match="no label"):
        fragile(contexts[0])
    contexts[0].label = "now"
    assert fragile(contexts[0]) == "now"


def test_nothing_is_recorded_without_a_tracker(contexts):
    assert contexts[0].child("merge:a:plain", "merge", {}) == ""
    contexts[0].record("merge", "merge:a:plain", {"scale": 1.0}, {})
