import math

import pytest
from ruamel.yaml import YAML

from pave_lightning.reporting.model_card import ExpertSource, model_card
from pave_lightning.reporting.scores import Score, ScoreTable

GIVEN = {"name": "ties", "base_model": "org/base-model", "method": "ties", "tasks": ["sst2", "cola"]}


def card(**changes):
    return model_card(**{**GIVEN, "form": "static", "vectors": "plain", **changes})


def front_matter(text):
    assert text.startswith("---\n")
    return YAML(typ="safe").load(text.split("---\n")[1])


def test_front_matter():
    assert front_matter(card()) == {
        "library_name": "transformers",
        "base_model": "org/base-model",
        "base_model_relation": "merge",
        "tags": ["merge", "pave-lightning"],
    }
    # The hub refuses a folder as base_model
    assert "base_model" not in front_matter(card(base_model="/data/my: base\n---"))


def test_heads_are_told():
    assert "| heads | the experts' own |" in card()
    assert "holds the head of each task's own expert" in card()
    for fit, told in (("logits", "without labels"), ("labels", "the labels of training rows")):
        text = card(heads={"fit": fit, "rows": 512})
        assert f"| heads | fitted to {'the expert' if fit == 'logits' else told}" in text
        assert told in text
        assert "512 rows a task |" in text
        assert "`expert-head.safetensors`" in text


def test_everything_is_told():
    scores = ScoreTable(
        [
            Score("base", "", "base", "sst2", "accuracy", True, 0.4, 10),
            Score("experts", "", "expert", "sst2", "accuracy", True, 0.8, 10),
            Score("ties", "plain", "static", "sst2", "accuracy", True, 0.5, 10),
            Score("ties", "purified", "static", "sst2", "accuracy", True, 0.6, 10),
            Score("emr", "plain", "per-task", "sst2", "accuracy", True, 0.7, 10),
        ]
    )
    text = card(
        vectors="purified",
        options={"density": 0.2},
        scale=0.3,
        scale_origin="best of 7 on the validation split",
        purification={"rho": 0.97},
        experts=[ExpertSource("sst2", "org/sst2-expert", "sha256:12ab")],
        scores=scores,
        versions={"torch": "2.9", "pave-lightning": "0.1.0"},
    )
    for told in (
        "| method | `ties` |",
        "| task vectors | purified |",
        "| kind | static |",
        "| tasks | sst2, cola |",
        "| scale | 0.3 (best of 7 on the validation split) |",
        "density: 0.2",
        "rho: 0.97",
        "| model | sst2 (accuracy) | average | normalised |",
        "| base | 0.400 | 0.400 | 0.500 |",
        "| experts | 0.800 | 0.800 | 1.000 |",
        "| ties | 0.600 | 0.600 | 0.750 |",
        "| sst2 | `org/sst2-expert` | `sha256:12ab` |",
        "| torch | 2.9 |",
        "AutoModel.from_pretrained",
    ):
        assert told in text
    assert "0.700" not in text
    assert "0.500 | 0.500" not in text
    assert text.endswith("|\n")


def test_the_title_is_no_name_of_a_row():
    scores = ScoreTable([Score("ties", "plain", "static", "sst2", "accuracy", True, 0.5, 10)])
    text = card(title="demo: ties (plain)", scores=scores)
    assert "# demo: ties (plain)\n" in text
    assert "| ties | 0.500 | 0.500 | - |" in text


def test_tasks_left_out_and_untouched_layers_are_told():
    scores = ScoreTable(
        [
            Score("experts", "", "expert", "sst2", "accuracy", True, 0.8, 10),
            Score("experts", "", "expert", "cola", "matthews", True, -0.1, 10),
        ]
    )
    untouched = [("sst2", "pooler.dense", "no example reached it")]
    text = card(vectors="purified", purification={"rho": 0.9}, untouched=untouched, scores=scores)
    assert "where the expert has no score above zero: cola (matthews -0.1).\n" in text
    assert "left as they are:\n\n- no example reached it: 1 layer of sst2 (pooler.dense)\n" in text


def test_what_was_left_out_is_listed_under_its_heading():
    text = card(left_out={"weights that are not merged": ["buffers: layer.*.mask (2)", "stored as I64: ids"]})
    assert (
        "## Left out\n\nWeights that are not merged:\n\n- buffers: layer.\\*.mask (2)\n- stored as I64: ids\n" in text
    )
    assert "## Left out" not in card(left_out={})


def test_scales_have_four_digits():
    assert "| scale | 0.4333 |" in card(scale=0.43333333333333335)


@pytest.mark.parametrize(("form", "use"), [("static", "**Static**"), ("per-task", "Loading needs the base model too")])
def test_kind_says_how_to_use_it(form, use):
    assert use in card(form=form)


def test_what_is_not_known_is_left_out():
    text = card(scores=ScoreTable([]), purification={"rho": 0.9})
    for heading in ("scale", "## Options", "## Purification", "## Scores", "## Experts", "## Versions"):
        assert heading not in text
    scores = ScoreTable([Score("ties", "plain", "static", "sst2", "accuracy", True, math.nan, 10)])
    assert "| ties | - | - | - |" in card(scores=scores)


def test_strings_of_users_stay_strings():
    options = {
        "pattern": "yes: [#x",
        "ticks": "```",
        "line": "a\nb",
        "none": None,
        "path": object,
        "nested": {"on": (1, 2)},
    }
    text = card(options=options, experts=[ExpertSource("a|b_c*", "x`y|z", "")], tasks=["<b>"], name="# [x](y)")
    block = text.split("````yaml\n")[1].split("````")[0]
    read = YAML(typ="safe").load(block)
    assert read.pop("path") == str(object)
    assert read == {"pattern": "yes: [#x", "ticks": "```", "line": "a\nb", "none": None, "nested": {"on": [1, 2]}}
    assert r"| a\|b\_c\* | `` x`y\|z `` |  |" in text
    assert r"\<b\>" in text
    assert r"# \# \[x\](y)" in text
