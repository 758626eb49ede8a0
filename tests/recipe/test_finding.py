"""Recipes by path and by name, shipped ones included."""

from pathlib import Path

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.recipe import finding
from pave_lightning.recipe.finding import find_recipe, find_sweep, shipped_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipes_of_the_checkout_are_the_shipped_ones():
    files = [path for path in (ROOT / "recipes").rglob("*.yaml") if "results" not in path.parts]
    assert sorted(shipped_recipes().values()) == sorted(files)
    assert {"quickstart", "paper/glue_roberta", "sweeps/rank-ratio"} <= set(shipped_recipes())


def test_an_installed_package_has_its_own_copies(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mine.yaml").write_text("")
    monkeypatch.setattr(finding, "__file__", str(tmp_path / "finding.py"))
    assert shipped_recipes() == {"mine": tmp_path / "files" / "mine.yaml"}


@pytest.mark.parametrize("name", ["quickstart", "glue_roberta", "paper/glue_roberta", "sweeps/rank-ratio"])
def test_a_shipped_recipe_is_found_by_name(elsewhere, name):
    assert find_recipe(name) == shipped_recipe(name)[1]
    assert find_recipe(name).read_text().startswith("#")


def test_a_file_comes_before_a_shipped_recipe(elsewhere):
    Path("quickstart").write_text("")
    assert find_recipe("quickstart") == Path("quickstart")
    Path("rank-ratio").mkdir()  # what is no file is told by what reads it
    assert find_recipe("rank-ratio") == Path("rank-ratio")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("quikstart", "there is no recipe quikstart; did you mean 'quickstart'?"),
        (
            "recipes/quickstart.yaml",
            "there is no recipe recipes/quickstart.yaml; to use the shipped recipe of that name, write quickstart",
        ),
        ("zzz", "there is no recipe zzz; `pave recipes` lists those that are shipped"),
    ],
)
def test_a_name_that_no_recipe_has(elsewhere, name, told):
    with pytest.raises(PaveError) as caught:
        find_recipe(name)
    assert str(caught.value) == told


def test_own_recipes_are_suggested_beside_shipped_ones(elsewhere):
    Path("mine.yaml").write_text("")
    with pytest.raises(PaveError, match=r"did you mean 'mine.yaml'"):
        find_recipe("mine")
    with pytest.raises(PaveError, match=r"^there is no recipe zzz; recipes here are: mine.yaml; `pave recipes` lists"):
        find_recipe("zzz")


@pytest.mark.parametrize("name", ["x" * 5000, "zero\0byte"])
def test_paths_that_no_system_takes_are_told_by_what_reads_them(name):
    assert find_recipe(name) == Path(name)


def test_sweeps_are_found_by_path_or_name(elsewhere):
    assert find_sweep("rank-ratio") == shipped_recipes()["sweeps/rank-ratio"] == find_sweep("sweeps/rank-ratio")
    path = Path("recipes/sweeps/rank-ratio.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("")
    assert find_sweep("rank-ratio") == find_sweep(str(path)) == path
    with pytest.raises(PaveError, match="no sweep 'rank-ratioo': did you mean 'rank-ratio'"):
        find_sweep("rank-ratioo")
    with pytest.raises(PaveError, match=r"known are: .*rank-ratio"):
        find_sweep("zzzz")
