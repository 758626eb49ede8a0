import pytest
import torch
from safetensors.torch import load_file

from pave_lightning.evaluation import CheckpointCandidate, ExpertsCandidate, MergedCandidate, ModulatedCandidate
from pave_lightning.merging import merge
from pave_lightning.merging.folders import MergeContext, write_merged
from pave_lightning.merging.merged import MergedVectors
from pave_lightning.merging.methods.emr import Emr
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.modulators import LowRank, Modulator
from pave_lightning.weights import Architecture, Checkpoint, task_vectors


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], value) for name, value in expected.items())


def test_one_checkpoint_for_all_tasks(base_folder):
    candidate = CheckpointCandidate(Checkpoint(base_folder, "bert"))
    base = load_file(base_folder / "model.safetensors")
    assert candidate.shared
    assert same(dict(candidate.weights("first")), base)
    assert same(dict(candidate.weights("anything")), base)


def test_each_task_has_its_expert(expert_folders):
    candidate = ExpertsCandidate({task: Checkpoint(folder, "bert") for task, folder in expert_folders.items()})
    assert not candidate.shared
    for task, folder in expert_folders.items():
        stored = load_file(folder / "model.safetensors")
        own = {name.removeprefix("bert."): value for name, value in stored.items() if name.startswith("bert.")}
        assert same(dict(candidate.weights(task)), own)


def test_a_multiple_of_the_merged_vector(base_folder, expert_folders):
    source = task_vectors(str(base_folder), {task: str(folder) for task, folder in expert_folders.items()})
    merged = MergedVectors({parameter.name: torch.ones(parameter.shape) for parameter in source.parameters})
    base = load_file(base_folder / "model.safetensors")
    candidate = MergedCandidate(source, merged, 0.25)
    assert candidate.shared
    assert same(dict(candidate.weights("first")), {name: value + 0.25 for name, value in base.items()})
    assert same(dict(MergedCandidate(source, merged, 0.0).weights("first")), base)


def test_masks_factors_and_rescalers_of_a_merge_in_memory(base_folder, expert_folders):
    source = task_vectors(str(base_folder), {task: str(folder) for task, folder in expert_folders.items()})
    merged = MergedVectors({parameter.name: torch.ones(parameter.shape) for parameter in source.parameters})
    masked, added = "encoder.layer.0.output.dense.weight", "encoder.layer.1.output.dense.weight"
    mask = torch.rand(32, 64) < 0.5
    factors = LowRank(torch.randn(32, 2), torch.randn(2, 64))
    merged.masks = {"first": {masked: mask}, "second": {}}
    merged.factors = {"first": {added: factors}, "second": {}}
    merged.rescalers = {"first": 0.5, "second": 3.0}
    candidate = MergedCandidate(source, merged, 0.25)
    assert not candidate.shared
    base = load_file(base_folder / "model.safetensors")
    first, second = dict(candidate.weights("first")), dict(candidate.weights("second"))
    assert torch.allclose(first[masked], base[masked] + 0.125 * mask)
    assert torch.allclose(first[added], base[added] + 0.125 * (1 + factors.left @ factors.right), atol=1e-6)
    assert all(torch.allclose(second[name], value + 0.75) for name, value in base.items())


def test_additions_switch_with_the_task(base_folder, tmp_path, packed):
    base = Checkpoint(base_folder, "bert")
    name = "encoder.layer.0.output.dense.weight"
    factors = {task: LowRank(torch.randn(32, 2), torch.randn(2, 64)) for task in "ab"}
    for task, pair in factors.items():
        packed(tmp_path / f"{task}.safetensors", {}, 2.0, {name: pair})
    modulators = {task: Modulator(tmp_path / f"{task}.safetensors") for task in factors}
    candidate = ModulatedCandidate(base, base, modulators)
    for task, pair in factors.items():
        found = dict(candidate.weights(task))
        assert torch.allclose(found.pop(name), base.tensor(name) + 2 * pair.left @ pair.right, atol=1e-6)
        assert all(torch.equal(value, base.tensor(other)) for other, value in found.items())


def test_masks_switch_with_the_task_and_leave_the_rest(base_folder, expert_folders, tmp_path, packed):
    base, unified = Checkpoint(base_folder, "bert"), Checkpoint(expert_folders["first"], "bert")
    name = "encoder.layer.0.output.dense.weight"
    masks = {"a": torch.rand(32, 64) < 0.5, "b": torch.zeros(32, 64, dtype=torch.bool)}
    for task, factor in (("a", 0.75), ("b", 2.0)):
        packed(tmp_path / f"{task}.safetensors", {name: masks[task]}, factor)
    modulators = {task: Modulator(tmp_path / f"{task}.safetensors") for task in masks}
    candidate = ModulatedCandidate(base, unified, modulators)
    assert not candidate.shared
    first, second = dict(candidate.weights("a")), dict(candidate.weights("b"))
    difference = unified.tensor(name) - base.tensor(name)
    assert torch.allclose(first[name], base.tensor(name) + 0.75 * masks["a"] * difference, atol=1e-7)
    assert torch.equal(second[name], base.tensor(name))
    for other in unified:
        if other != name:
            assert torch.equal(first[other], unified.tensor(other))
    assert first.keys() == set(unified)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", [TaskArithmetic(), Emr()], ids=["static", "per task"])
def test_a_merge_in_memory_has_the_weights_as_they_are_written(base_folder, expert_folders, tmp_path, method, dtype):
    source = task_vectors(str(base_folder), {task: str(folder) for task, folder in expert_folders.items()})
    scale = 0.3 if method.default_scale else 1.0
    tried = MergedCandidate(source, merge(method, source), scale, dtype)
    architecture = Architecture.of_folder(expert_folders["first"])
    base = Checkpoint(base_folder, "bert")
    experts = {task: Checkpoint(folder, "bert") for task, folder in expert_folders.items()}
    context = MergeContext(str(base_folder), base, experts, architecture, {})
    write_merged(tmp_path, method, source, scale, context, dtype=dtype)
    written = CheckpointCandidate(Checkpoint(tmp_path, "bert"))
    if method.form == "per-task":
        modulators = {task: Modulator(tmp_path / "modulators" / f"{task}.safetensors") for task in experts}
        written = ModulatedCandidate(base, Checkpoint(tmp_path, "bert"), modulators)
    for task in experts:
        found, wanted = dict(tried.weights(task)), dict(written.weights(task))
        assert found.keys() == wanted.keys()
        tolerance = 1e-6 if method.form == "per-task" else 0
        assert all(torch.allclose(found[name], value.float(), atol=tolerance, rtol=0) for name, value in wanted.items())


def test_what_cannot_be_written_has_no_scores(base_folder, expert_folders):
    source = task_vectors(str(base_folder), {task: str(folder) for task, folder in expert_folders.items()})
    merged = MergedVectors({parameter.name: torch.ones(parameter.shape) for parameter in source.parameters})
    found = dict(MergedCandidate(source, merged, 1e6, "float16").weights("first"))
    assert all(value.isnan().all() for value in found.values())
