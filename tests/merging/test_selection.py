import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pave_lightning.errors import PaveError
from pave_lightning.evaluation import MergedCandidate
from pave_lightning.merging import is_selected, merge, selected
from pave_lightning.merging.folders import write_merged
from pave_lightning.merging.methods.emr import Emr
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.methods.ties import Ties, TiesOptions
from pave_lightning.weights import Checkpoint


@pytest.mark.parametrize(
    ("name", "include", "exclude", "wanted"),
    [
        ("layer.0.weight", [], [], True),
        ("layer.0.weight", ["layer.*"], [], True),
        ("layer.0.weight", ["0"], [], False),
        ("layer.0.weight", ["*.bias", "*.weight"], [], True),
        ("layer.0.weight", [], ["layer.?.weight"], False),
        ("layer.12.weight", [], ["layer.?.weight"], True),
        ("layer.0.weight", ["layer.[01].*"], ["*.bias"], True),
        ("layer.0.Weight", ["*.weight"], [], False),
    ],
)
def test_patterns_match_whole_names(name, include, exclude, wanted):
    assert is_selected(name, include, exclude) == wanted


@pytest.fixture
def source(make_source):
    rng = np.random.default_rng(0)
    shapes = {"embeddings.word": (6, 4), "layer.0.weight": (4, 4), "layer.0.bias": (4,), "layer.1.weight": (4, 4)}
    vectors = {t: {n: rng.standard_normal(s) for n, s in shapes.items()} for t in "abc"}
    return make_source(vectors, base={n: rng.standard_normal(s) for n, s in shapes.items()})


def test_what_is_left_out_takes_no_part_in_what_looks_at_the_whole_model(source, make_source):
    chosen = selected(source, ["layer.*"], ["*.bias"])
    assert [p.name for p in chosen.parameters] == ["layer.0.weight", "layer.1.weight"]
    method = Ties(TiesOptions(density=0.3))
    found = merge(method, chosen).vectors
    alone = {
        task: {p.name: source.vector(task, p).double().numpy() for p in chosen.parameters} for task in source.tasks
    }
    wanted = merge(method, make_source(alone)).vectors
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in wanted.items())


def test_all_parameters_are_the_same_object(source):
    assert selected(source) is source


def test_a_model_in_memory_has_the_base_where_nothing_is_merged(source):
    chosen = selected(source, exclude=["embeddings.*", "*.bias"])
    candidate = dict(MergedCandidate(chosen, merge(TaskArithmetic(), chosen), 0.5).weights("a"))
    assert candidate.keys() == {p.name for p in source.parameters}
    for parameter in source.parameters:
        left = parameter.name in ("embeddings.word", "layer.0.bias")
        assert torch.equal(candidate[parameter.name], source.base(parameter)) == left


def test_two_selections_leave_out_what_either_does(source):
    chosen = selected(selected(source, exclude=["*.bias"]), include=["layer.0.*", "embeddings.*"])
    assert [p.name for p in chosen.parameters] == ["embeddings.word", "layer.0.weight"]
    assert {name for name, _ in chosen.unmerged()} == {"layer.0.bias", "layer.1.weight"}


def test_patterns_that_match_nothing_are_told_all_at_once(source):
    with pytest.raises(PaveError) as caught:
        selected(source, ["layer"], ["layer.7.weight", "nothing*"])
    text = str(caught.value)
    assert "include: 'layer' matches no parameter; patterns match whole names, so did you mean '*layer*'?" in text
    assert "exclude: 'layer.7.weight' matches no parameter; did you mean 'layer." in text
    assert "exclude: 'nothing*' matches no parameter; names are such as" in text


def test_to_leave_nothing_is_refused(source):
    with pytest.raises(PaveError, match="leave no parameter to merge"):
        selected(source, ["layer.*"], ["*"])


@pytest.mark.parametrize("method", [TaskArithmetic(), Emr()], ids=["static", "per task"])
def test_written_models_have_the_base_where_nothing_is_merged(
    tmp_path, context_of, base_folder, expert_folders, method
):
    source, context = context_of(base_folder, expert_folders, parameters={"exclude": ["embeddings.*"]})
    write_merged(tmp_path, method, selected(source, exclude=["embeddings.*"]), method.default_scale, context)
    found, base = load_file(tmp_path / "model.safetensors"), load_file(base_folder / "model.safetensors")
    assert found.keys() == base.keys()
    for name, value in base.items():
        assert torch.equal(found[name], value) == name.startswith("embeddings.")
    assert json.loads((tmp_path / "pave.json").read_text())["parameters"] == {"exclude": ["embeddings.*"]}
    assert sorted(Checkpoint(tmp_path, "bert")) == sorted(base)
