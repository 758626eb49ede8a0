"""The page in a browser: figures are drawn, nothing sticks out, and axe finds no barrier (where axe-core is there)."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from pave_lightning.reporting.page import write_page
from pave_lightning.reporting.page.costs import MergedCost
from pave_lightning.reporting.page.run import RunFacts, run_page
from pave_lightning.reporting.page.training import Expert
from pave_lightning.reporting.page.use import BestModel
from pave_lightning.reporting.scores import Model, Score, ScoreTable

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# npm install axe-core, in any folder that is named here.
AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core")) / "axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

LOOK = """
addEventListener("load", async () => {
  const page = document.documentElement, all = name => document.querySelectorAll(name).length;
  for (let i = 0; i < 100 && !all(".js-plotly-plot .main-svg"); i++) await new Promise(next => setTimeout(next, 50));
  const found = { width: page.clientWidth, out: page.scrollWidth - page.clientWidth,
    drawn: all(".js-plotly-plot"), asked: all(".drawing"), text: getComputedStyle(document.body).color,
    loaded: performance.getEntriesByType("resource").map(one => one.name).filter(name => !name.startsWith("data:")) };
  if (window.axe) {
    const { violations } = await axe.run({ runOnly: RULES });
    found.violations = violations.map(one => [one.id, one.nodes[0].html]);
  }
  document.body.dataset.found = JSON.stringify(found);
});
"""

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    tasks = ["movie", "a-long-name-of-a-task-with-many-words", "topic", "rte", "mnli", "stsb"]
    models = [Model("base", "", "base"), Model("experts", "", "expert"), Model("joint", "", "static", "own", True)]
    models += [Model(name, v, "static") for name in ("task_arithmetic", "ties") for v in ("plain", "purified")]
    models.append(Model("emr", "plain", "per-task"))
    scores = [
        Score.of(model, task=task, metric=metric, is_primary=metric == "accuracy", value=0.5 + place / 20, examples=9)
        for place, model in enumerate(models)
        for task in tasks
        for metric in ("accuracy", "macro_f1")
    ]
    curves = {"train/loss": [[1, 1.0], [2, 0.5]], "validation/accuracy": [[2, 0.5]]}
    facts = RunFacts(
        "run",
        "some/base",
        ScoreTable(scores),
        [Expert(task, digest="a" * 64, metric="accuracy", curves=curves) for task in tasks],
        {model: MergedCost(1.0 + place, 10.0 * place) for place, model in enumerate(models) if model.vectors},
        best=BestModel(models[3], "runs/run", "runs/run/merged/ties-plain", "movie", 1),
        left_out={"weights that are not merged": ["embedding tables: " + "embeddings.word_embeddings.weight" * 5]},
        recipe="name: run\n",
        versions={"python": "3.12"},
    )
    return write_page(run_page(facts), tmp_path_factory.mktemp("page") / "report.html").read_text(encoding="utf-8")


def looked_at(page, folder, *options, with_axe=False):
    """What a script that is put into the page finds once all is drawn."""
    script = LOOK.replace("RULES", json.dumps(RULES))
    if with_axe:
        script = f"{AXE.read_text(encoding='utf-8')}\n{script}"
    file = folder / "looked_at.html"
    file.write_text(page.replace("</head>", f"<script>{script}</script></head>"), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=20000", *options, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return json.loads(unescape(re.search(r'data-found="([^"]*)"', done.stdout).group(1)))


@pytest.mark.parametrize("width", [390, 1280])
def test_figures_are_drawn_and_nothing_sticks_out(page, tmp_path, width):
    found = looked_at(page, tmp_path, f"--window-size={width},900")
    assert found["drawn"] == found["asked"] == 6
    assert found["out"] == 0
    assert found["loaded"] == []
    assert found["width"] <= max(width, 500)  # chromium makes no window that is narrower


@pytest.mark.skipif(not AXE.is_file(), reason="there is no axe-core; AXE_CORE names its folder")
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_barrier(page, tmp_path, dark):
    if dark:
        page = page.replace("(prefers-color-scheme: dark)", "(min-width: 1px)")
    found = looked_at(page, tmp_path, "--window-size=1280,900", with_axe=True)
    assert (found["text"] == "rgb(232, 234, 237)") is dark
    assert found["violations"] == []
    broken = page.replace("<th scope", "<a></a><img src=''><th scope", 1).replace('lang="en"', "")
    rules = {rule for rule, _ in looked_at(broken, tmp_path, with_axe=True)["violations"]}
    assert rules >= {"image-alt", "html-has-lang"}
