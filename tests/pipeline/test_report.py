"""What the report of a whole tiny run tells: in the terminal, and in the cards of the merged models."""

import hashlib
import io
import json
import re
import shutil

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from pave_lightning import Recipe
from pave_lightning.pipeline.commands import run_recipe, working
from pave_lightning.pipeline.report import write_report
from pave_lightning.reporting.verdicts import half_width


@pytest.fixture
def settings(ready_settings, tmp_path):
    """Ready experts of two tasks, in the first of which one layer has no effect at all."""
    words, more = ready_settings["tasks"]
    folder = shutil.copytree(words["expert"]["from"], tmp_path / "zeroed")
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.attention.self.query.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tasks = [{**words, "expert": {"from": str(folder)}}, more]
    return {**ready_settings, "tasks": tasks, "merge": ["average", {"method": "emr", "vectors": ["plain"]}]}


def test_cards_and_terminal_tell_scores_and_untouched_layers(settings):
    recipe = Recipe.model_validate(settings)
    folder = run_recipe(recipe)
    manifest = folder / "statistics" / "more" / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["result"]["unreached"] = [f"adapter.{place}" for place in range(5)]
    said = {key: value for key, value in facts.items() if key != "sha256"}
    facts["sha256"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(facts))

    file = io.StringIO()
    with working(recipe) as runner:
        table = write_report(runner, Console(file=file, width=100))
    printed = file.getvalue()
    tables = "embedding tables: embeddings.word_embeddings.weight, embeddings.position_embeddings.weight, "
    assert f"weights that are not captured and purified\n  {tables}" in printed
    left = "its weight has no effect on the data: 1 layer of words (encoder.layer.1.attention.self.query)"
    assert file.getvalue().splitlines()[-6:-2] == [
        "capture: layers without statistics",
        "  no example reached it: 5 layers of more (adapter.0, adapter.1, adapter.2 and 2 more)",
        "purification (rho 0.9, covariance, spectral allocation, scope layer): layers left as they are",
        f"  {left}",
    ]

    models = {f"{model.name}-{model.vectors}": model for model in table.models() if model.vectors}
    assert set(models) == {"average-plain", "average-purified", "emr-plain"}
    for name, model in models.items():
        card = (folder / "merged" / name / "README.md").read_text()
        assert f"\n# tiny: {model.name} ({model.vectors})\n" in card
        values = [table.value(model, task) for task in table.tasks()]
        values += [table.average(model), table.normalised_average(model)]
        bare = re.sub(r" ±[\d.]+", "", card)
        assert f"| {model.name} | {' | '.join(f'{value:.3f}' for value in values)} |\n" in bare
        assert table.average_interval(model).is_known
        assert f" {half_width(table.average_interval(model))} |" in card
        assert ("Purified against plain: " in card) == (model.vectors == "purified")
        assert (f"- {left}" in card) == (model.vectors == "purified")
        assert ("Weights that are not captured and purified:\n\n- embedding tables: " in card) == (
            model.vectors == "purified"
        )
