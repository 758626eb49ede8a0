"""What the plan asks of tokenizers and token embeddings."""

import json
import re
import shutil
from io import StringIO

import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from pave_lightning import Recipe, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.commands import plan_recipe
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder

NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture
def problems(recipe_settings, tmp_path):
    """All that is told about the tiny recipe with some sections changed."""

    def check(**changes):
        try:
            check_recipe(Recipe.model_validate({**recipe_settings, **changes}), RunFolder(tmp_path / "checked"))
        except PaveError as error:
            return str(error)
        return ""

    return check


@pytest.fixture
def notes():
    """What the plan tells below its tables."""

    def told(settings):
        shown = StringIO()
        plan_recipe(Recipe.model_validate(settings), Console(file=shown, width=200))
        return [line for line in shown.getvalue().splitlines() if line.startswith("note: ")]

    return told


@pytest.fixture
def base(base_folder, tmp_path):
    """A copy of the base that may be spoilt."""
    return shutil.copytree(base_folder, tmp_path / "base")


@pytest.fixture
def expert(recipe_settings, expert_folders, tmp_path):
    """A copy of an expert that may be spoilt, and the tasks of a recipe that uses it."""
    folder = shutil.copytree(expert_folders["first"], tmp_path / "expert")
    words, numbers = recipe_settings["tasks"]
    return folder, [{**words, "expert": {"from": str(folder)}}, numbers]


def without_tokenizer(folder):
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_base_without_a_tokenizer(problems, base):
    without_tokenizer(base)
    text = problems(base=str(base))
    assert "base: " in text
    assert "holds no vocabulary for its tokenizer" in text
    assert text.count("\n") == 1


def test_an_expert_without_one_has_the_bases(problems, notes, expert, recipe_settings):
    folder, tasks = expert
    without_tokenizer(folder)
    assert problems(tasks=tasks) == ""
    assert notes({**recipe_settings, "tasks": tasks}) == [
        f"note: task 'words': {folder} holds no tokenizer files; the base's tokenizer is used"
    ]


def test_an_expert_with_half_a_tokenizer(problems, expert):
    folder, tasks = expert
    (folder / "tokenizer.json").unlink()
    assert f"task 'words': {folder}" in (text := problems(tasks=tasks))
    assert "tokenizer" in text


def test_nothing_is_noted_where_nothing_is_to_be_known(notes, recipe_settings):
    assert notes(recipe_settings) == []


def test_a_base_that_pads_with_its_end_of_text(problems, notes, base, recipe_settings):
    def take_away(settings):
        del settings["pad_token"]
        settings["eos_token"] = settings.pop("sep_token")

    edit(base / "tokenizer_config.json", take_away)
    edit(base / "config.json", lambda config: config.update(pad_token_id=None))
    assert problems(base=str(base)) == ""
    (note,) = notes({**recipe_settings, "base": str(base)})
    assert note == (
        "note: base: its tokenizer has no padding token of its own; batches are padded with its end-of-text token [SEP]"
    )
    edit(base / "tokenizer_config.json", lambda settings: settings.pop("eos_token"))
    assert "neither a padding token nor an end-of-text token" in problems(base=str(base))


def test_an_expert_whose_configuration_names_no_padding(problems, expert):
    folder, tasks = expert
    edit(folder / "config.json", lambda config: config.update(pad_token_id=None))
    assert problems(tasks=tasks) == ""


def test_tokens_beyond_the_embedding(problems, base):
    def add(tokenizer):
        tokenizer["model"]["vocab"]["foreign"] = 100

    edit(base / "tokenizer.json", add)
    text = problems(base=str(base))
    assert "base: its tokenizer has 101 tokens, but its embedding 100 rows, so token 100 could not be read" in text


def test_an_embedding_that_config_json_does_not_name(problems, base):
    edit(base / "config.json", lambda config: config.update(vocab_size=128))
    assert "base: its token embedding has 100 rows, but its config.json says vocab_size 128" in problems(base=str(base))


def test_a_tokenizer_that_knows_no_word_of_the_texts(problems, base):
    def rename(tokenizer):
        words = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {w if w[0] == "[" else f"x{w}": number for w, number in words.items()}

    edit(base / "tokenizer.json", rename)
    text = problems(base=str(base))
    for task in ("words", "numbers"):
        assert re.search(rf"task '{task}', train split .*: the tokenizer .* knows none of the \d+ tokens", text)


def test_tokens_in_common_must_have_the_same_numbers(problems, expert):
    folder, tasks = expert

    def swap(tokenizer):
        words = tokenizer["model"]["vocab"]
        words["w1"], words["w2"] = words["w2"], words["w1"]

    edit(folder / "tokenizer.json", swap)
    text = problems(tasks=tasks)
    assert "2 tokens differ, first 'w2', which is token 5 there, but token 6 in the base" in text


def test_fewer_tokens_than_the_base_are_fine(problems, expert):
    folder, tasks = expert
    edit(folder / "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].pop("w95"))
    assert problems(tasks=tasks) == ""


def test_two_experts_that_use_a_free_row_for_different_tokens(
    problems, make_base, make_expert, recipe_settings, tmp_path
):
    roomy = make_base(vocab_size=104)
    words, _ = recipe_settings["tasks"]
    tasks = []
    for name, token in (("one", "[ONE]"), ("two", "[TWO]"), ("three", "[ONE]")):
        folder = make_expert(roomy, seed=len(token))

        def add(tokenizer, token=token):
            tokenizer["model"]["vocab"][token] = 100

        edit(folder / "tokenizer.json", add)
        tasks.append({**words, "name": name, "expert": {"from": str(folder)}})
    text = problems(base=str(roomy), tasks=tasks)
    assert "tasks 'one' and 'two': token 100, which the base's tokenizer leaves free" in text
    assert "'three'" not in text
    assert problems(base=str(roomy), tasks=[tasks[0], tasks[2]]) == ""


def test_what_the_plan_lets_pass_runs(recipe_settings, base, expert_folders, tmp_path):
    """A base that pads with its end of text, and an expert without tokenizer and without padding token."""

    def take_away(settings):
        del settings["pad_token"]
        settings["eos_token"] = settings.pop("sep_token")

    edit(base / "tokenizer_config.json", take_away)
    edit(base / "config.json", lambda config: config.update(pad_token_id=None))
    expert = shutil.copytree(expert_folders["first"], tmp_path / "expert")
    without_tokenizer(expert)
    edit(expert / "config.json", lambda config: config.update(pad_token_id=None))
    words, numbers = recipe_settings["tasks"]
    tasks = [{**words, "expert": {"from": str(expert)}}, numbers]
    folder = run_recipe(Recipe.model_validate({**recipe_settings, "base": str(base), "tasks": tasks, "merge": ["emr"]}))
    made = folder / "experts" / "numbers"
    assert json.loads((made / "config.json").read_text())["pad_token_id"] == 3
    assert json.loads((made / "tokenizer_config.json").read_text())["pad_token"] == "[SEP]"
    assert AutoModelForSequenceClassification.from_pretrained(made).config.pad_token_id == 3
    for task in ("words", "numbers"):
        config = json.loads((folder / "merged" / "emr-plain" / "heads" / task / "config.json").read_text())
        assert config["pad_token_id"] == 3
