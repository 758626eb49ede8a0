"""The page of a whole tiny run: what lies in the run folder stands on it."""

import html
import json
import math
import re

import pytest

from pave_lightning import Recipe
from pave_lightning.pipeline.commands import run_stage
from pave_lightning.pipeline.page import merged_cost
from pave_lightning.pipeline.run_folder import Manifest


def told(page, section):
    """The text of a section, without markup."""
    found = re.search(rf'<section aria-labelledby="{section}">(.*?)</section>', page, re.DOTALL)
    text = re.sub(r"<[^>]+>", " ", found.group(1).replace("<wbr>", ""))
    return re.sub(r"\s+", " ", html.unescape(text))


def headings(page):
    return re.findall(r'<h2 id="([^"]+)">', page)


def test_page_of_a_run_tells_what_is_in_its_folder(finished, recipe_settings, tracking_uri):
    recipe = Recipe.model_validate(recipe_settings)
    before = (finished / "report.html").read_text(encoding="utf-8")
    assert headings(before) == [
        "results",
        "tasks",
        "costs",
        "use",
        "experts",
        "ranks",
        "left-out",
        "recipe",
        "versions",
    ]
    run_stage(recipe, "diagnose")
    run_stage(recipe, "report")
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert [name for name in headings(page) if name not in headings(before)] == ["spectra", "interference"]
    assert "<h1>tiny</h1>" in page

    for folder in (finished / "merged").iterdir():
        facts = json.loads((folder / "manifest.json").read_text())["result"]
        seconds = facts.get("cost", {}).get("seconds", math.nan)
        name, _, vectors = folder.name.partition("-")
        assert f" {name} {vectors} " in told(page, "costs")
        if seconds >= 0.01:
            assert f"{seconds:.3g}" in told(page, "costs")
    for task in ("words", "numbers"):
        curves = json.loads((finished / "experts" / task / "manifest.json").read_text())["result"]["curves"]
        step, score = curves[f"validation/{recipe.task(task).primary_metric}"][-1]
        assert f" {task} {step:.0f} {score:.3f} " in told(page, "experts")
        assert f" {task} " in told(page, "spectra")
    assert "word_embeddings" in told(page, "left-out")
    assert "words, numbers" in told(page, "interference")
    assert "rho: 0.9" in told(page, "recipe")

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    home = client.get_experiment_by_name("pave-lightning").experiment_id
    (parent,) = [
        run
        for run in client.search_runs([home])
        if run.data.tags.get("pave.key", "").startswith(f"{finished.resolve()}:")
    ]
    assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_code_on_the_page_runs(finished, capsys):
    page = (finished / "report.html").read_text(encoding="utf-8")
    first, backbone = (
        html.unescape(code) for code in re.findall(r'<code class="python">(.*?)</code>', page, re.DOTALL)
    )
    # The run was copied from where it was made.
    place = re.search(r'folder = "(.*)"', first).group(1)
    exec(compile(first, "page", "exec"), {})
    assert capsys.readouterr().out.strip() in ("['low']", "['high']")
    exec(compile(backbone, "page", "exec"), {})
    assert place.endswith(tuple(folder.name for folder in (finished / "merged").iterdir()))


def test_bytes_of_a_merged_model_are_told_apart():
    files = {
        name: {"size": size}
        for name, size in {
            "model-00001-of-00002.safetensors": 100,
            "model-00002-of-00002.safetensors": 20,
            "modulators/a.safetensors": 7,
            "heads/a.safetensors": 3,
            "config.json": 1,
        }.items()
    }
    cost = merged_cost(Manifest("merged/x", {}, files, {"cost": {"seconds": 2.0}}))
    assert (cost.shared_bytes, dict(cost.kept_bytes), cost.seconds) == (120, {"a": 7}, 2.0)
    assert math.isnan(cost.peak_megabytes)
    assert cost.kept_megabytes == pytest.approx(7e-6)
