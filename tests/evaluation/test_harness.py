"""What is read off lm-eval's task files, of which none is run."""

import sys

import pytest

pytest.importorskip("lm_eval")

from pave_lightning.errors import PaveError
from pave_lightning.evaluation.harness import Catalogue


@pytest.fixture(scope="module")
def catalogue():
    return Catalogue()


def test_tasks_of_the_paper(catalogue):
    before = set(sys.modules)
    gsm8k, mbpp, human = (catalogue.facts(name) for name in ("gsm8k", "mbpp", "humaneval"))
    assert gsm8k.data == ("openai/gsm8k (main)",)
    assert gsm8k.metrics == ("exact_match",)
    assert gsm8k.few_shot == 5
    assert (gsm8k.runs_code, mbpp.runs_code, human.runs_code) == (False, True, True)
    assert human.fetched == mbpp.fetched == ("code_eval",)
    assert human.own_code == ()
    maths = catalogue.facts("minerva_math")
    assert len(maths.tasks) == 7
    assert maths.metrics == ("exact_match", "math_verify")
    assert maths.extras == ("math",)
    assert not maths.lacks_score
    assert not [name for name in set(sys.modules) - before if name.startswith("lm_eval")]  # nothing was loaded


def test_groups_of_tags(catalogue):
    found = catalogue.facts("mmlu")
    assert len(found.tasks) == 57
    assert "mmlu_anatomy" in found.tasks


@pytest.mark.parametrize(("name", "told"), [("gsm8", "did you mean 'gsm8k'?"), ("humanevl", "'humaneval'"), ("", "''")])
def test_unknown_names(catalogue, name, told):
    with pytest.raises(PaveError, match=told.replace("?", r"\?")):
        catalogue.facts(name)


def test_own_files_come_first_and_show_what_they_need(tmp_path):
    (tmp_path / "own.py").write_text(
        "import json\nimport evaluate as ev\nimport not_there_at_all\n"
        "try:\n    import optional_one\nexcept ImportError:\n    optional_one = None\n"
        "metric = ev.load('far_away')\n# pip install lm_eval[far,near]\n"
    )
    (tmp_path / "base_yaml").write_text("metric_list: [{metric: !function own.score}]\n")
    (tmp_path / "gsm8k.yaml").write_text(
        "include: base_yaml\ntask: gsm8k\ndataset_path: csv\ndataset_kwargs: {data_files: {test: [a.csv, /b.csv]}}\n"
    )
    found = Catalogue(tmp_path).facts("gsm8k")
    assert found.metrics == ("score",)
    assert found.own_code == ((tmp_path / "own.py").resolve(),)
    assert found.lacking == ("not_there_at_all",)
    assert found.fetched == ("far_away",)
    assert found.extras == ("far", "near")
    assert [path.name for path in found.local] == ["a.csv", "b.csv"]
    assert found.few_shot is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: broken\ninclude: [", "cannot be read as a task file"),
        ("task: broken\ninclude: broken.yaml\n", "includes itself"),
        ("task: broken\ninclude: nowhere\n", "nowhere"),
    ],
)
def test_broken_files(tmp_path, text, told):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(PaveError, match=told):
        Catalogue(tmp_path).facts("broken")


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(PaveError, match="there is no folder"):
        Catalogue(tmp_path / "nowhere")
