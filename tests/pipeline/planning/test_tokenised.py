"""What a plan says of rows once they are tokenised."""

import json
from pathlib import Path

import pytest

from pave_lightning import Recipe
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.tasks.kinds.texts import TextTask


@pytest.fixture
def told(recipe_settings, tmp_path):
    """What a plan refuses when the texts of one test split are these."""

    def check(texts):
        path = tmp_path / "other.jsonl"
        path.write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(texts)))
        words, numbers = recipe_settings["tasks"]
        words = {**words, "text": "text", "label": "label"}
        words["data"] = dict.fromkeys(("train", "validation", "test"), str(path))
        try:
            check_recipe(
                Recipe.model_validate({**recipe_settings, "tasks": [words, numbers]}), RunFolder(tmp_path / "run")
            )
        except PaveError as error:
            return str(error)
        return ""

    return check


def test_texts_that_the_tokenizer_does_not_know_are_refused(told):
    message = told(["ξένος λόγος", "άγνωστος"])
    assert "task 'words', train split (" in message
    assert "task 'words', test split (" in message
    assert "knows none of the" in message


def test_texts_that_it_hardly_knows_are_told(told, caplog, recipe_settings):
    known = json.loads(Path(recipe_settings["tasks"][0]["data"]["train"]).read_text().splitlines()[0])
    text = next(value for value in known.values() if isinstance(value, str)).split()[0]
    assert told([f"{text} ξένος λόγος άγνωστος", "μηδέν"]) == ""
    assert "of the tokens of the texts are unknown to the tokenizer" in caplog.text


def test_tokenizers_that_a_kind_of_task_cannot_use_are_told_for_each_task(recipe_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(TextTask, "processor_problem", lambda self, processor: "its tokenizer is of no use")
    with pytest.raises(PaveError) as caught:
        check_recipe(Recipe.model_validate(recipe_settings), RunFolder(tmp_path / "run"))
    for task in recipe_settings["tasks"]:
        assert f"task '{task['name']}': its tokenizer is of no use" in str(caught.value)
