"""A plan tells what will be left out, and refuses what cannot be merged, before anything is trained."""

import io
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from pave_lightning import Recipe
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.commands import open_folder, plan_recipe
from pave_lightning.pipeline.planning import coverage_lines

TABLES = [
    "weights that are not captured and purified",
    "  embedding tables: embeddings.word_embeddings.weight, embeddings.position_embeddings.weight, "
    "embeddings.token_type_embeddings.weight",
]


@pytest.fixture
def planned(ready_settings):
    """What a plan of the recipe with some settings prints."""

    def plan(**changes):
        file = io.StringIO()
        plan_recipe(Recipe.model_validate({**ready_settings, **changes}), Console(file=file, width=100))
        return file.getvalue().splitlines()

    return plan


def rewritten(folder, target, change):
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_what_is_left_out_stands_below_the_tables(planned):
    assert planned()[-2:] == TABLES


def test_without_purification_nothing_is_left_out_of_it(ready_settings):
    recipe = Recipe.model_validate({**ready_settings, "merge": [{"method": "average", "vectors": ["plain"]}]})
    assert coverage_lines(recipe, open_folder(recipe)) == []


def test_8_bit_weights_of_the_base_are_refused(planned, base_folder, tmp_path):
    def shrink(tensors):
        name = "encoder.layer.0.output.dense.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    with pytest.raises(PaveError, match=r"1 weights are stored as F8_E4M3, such as encoder\.layer\.0\.output"):
        planned(base=rewritten(base_folder, tmp_path / "small", shrink))


def test_what_steps_leave_out_is_told_by_step(planned):
    left = {"exclude": ["embeddings.*", "*.LayerNorm.*"]}
    steps = [{"method": name, "vectors": ["plain"]} for name in ("average", "ties")]
    steps += [{"method": "task_arithmetic", "vectors": ["plain"], "parameters": {"include": ["pooler.*"]}}]
    lines = planned(merge=steps, parameters=left)
    at = lines.index("weights that the merge of average, ties leaves as they are in the base")
    assert lines[at + 1].startswith("  left out by the key parameters: embeddings.LayerNorm.bias")
    assert "embeddings.word_embeddings.weight" in lines[at + 1]
    assert "encoder.layer.*.output.LayerNorm.weight (2)" in lines[at + 1]
    at = lines.index("weights that the merge of task_arithmetic leaves as they are in the base")
    # What the recipe excludes is handed down to a step that includes something.
    assert "encoder.layer.*.attention.self.key.weight (2)" in lines[at + 1]
    assert "pooler" not in lines[at + 1]


def test_patterns_that_match_nothing_are_refused_by_the_plan(planned):
    step = {"method": "average", "vectors": ["plain"], "parameters": {"include": ["bert.*"], "exclude": ["pooler"]}}
    with pytest.raises(PaveError) as caught:
        planned(merge=[step])
    assert "merge step 'average': parameters.include: 'bert.*' matches no parameter" in str(caught.value)
    assert "parameters.exclude: 'pooler' matches no parameter; patterns match whole names" in str(caught.value)
