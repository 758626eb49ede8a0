"""Running statistics are averaged, whatever the method and its scale; other buffers must be the base's."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedTokenizerFast, ResNetConfig

from pave_lightning import load_merged
from pave_lightning.errors import PaveError
from pave_lightning.evaluation.candidates import MergedCandidate
from pave_lightning.merging import make_method
from pave_lightning.merging.folders import MergeContext, write_merged
from pave_lightning.merging.running import merge
from pave_lightning.weights import Architecture, DerivedTaskVectors, ExpertTaskVectors, task_vectors
from pave_lightning.weights.buffers import BufferKind, buffer_kinds, buffer_problems

CONFIG = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)


def is_statistic(name):
    return name.endswith(("running_mean", "running_var"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and three experts with batch norms that have seen different data."""
    from tokenizers import Tokenizer, models

    root = tmp_path_factory.mktemp("resnet")
    vocabulary = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    torch.manual_seed(0)
    base = AutoModel.from_config(CONFIG)
    for name in ("base", "a", "b", "c"):
        model = AutoModelForImageClassification.from_config(CONFIG)
        if name == "base":
            model = base
        else:
            model.resnet.load_state_dict(base.state_dict())
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if key.endswith("running_var"):
                    # Small in the experts, large in the base: their task vectors add up to less than nothing.
                    tensor.uniform_(1, 2) if name == "base" else tensor.uniform_(0.01, 0.3)
                elif key.endswith("num_batches_tracked"):
                    tensor.fill_({"base": 3, "a": 7, "b": 8, "c": 9}[name])
                elif tensor.is_floating_point() and name != "base":
                    tensor.add_(0.05 * torch.randn_like(tensor))
        model.save_pretrained(root / name)
        vocabulary.save_pretrained(root / name)
    return {name: root / name for name in ("base", "a", "b", "c")}


def source_of(folders, tasks="ab"):
    return task_vectors(str(folders["base"]), {name: str(folders[name]) for name in tasks})


def stored(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("resnet."): tensor for name, tensor in tensors.items()}


def means(folders, tasks):
    found = [stored(folders[name]) for name in tasks]
    return {name: sum(own[name] for own in found) / len(found) for name in found[0] if is_statistic(name)}


def context_of(folders, tasks):
    architecture = Architecture.of_folder(folders["a"])
    experts = {name: architecture.checkpoint(folders[name]) for name in tasks}
    base = architecture.checkpoint(folders["base"])
    return MergeContext(str(folders["base"]), base, experts, architecture, {"vectors": "plain"})


def test_they_are_no_parameters_and_have_no_task_vectors(folders):
    source = source_of(folders)
    assert not any(is_statistic(parameter.name) for parameter in source.parameters)
    assert {parameter.name for parameter in source.parameters} == {
        name for name, _ in AutoModel.from_config(CONFIG).named_parameters()
    }
    for given in (source, DerivedTaskVectorsOf(source)):
        found = dict(given.running_statistics())
        expected = means(folders, "ab")
        assert found.keys() == expected.keys()
        for name, mean in expected.items():
            torch.testing.assert_close(found[name], mean)


class DerivedTaskVectorsOf(DerivedTaskVectors):
    def expert(self, task, parameter, rows=None):
        return self.source.expert(task, parameter, rows)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "emr"])
def test_merged_folders_hold_averages_and_work(folders, method, tmp_path):
    source, rule = source_of(folders), make_method(method, {})
    scale = None if method == "emr" else 1.9
    merged = merge(rule, source)
    write_merged(tmp_path, rule, source, scale, context_of(folders, "ab"))
    expected = means(folders, "ab")
    found = stored(tmp_path)
    assert all(int(t) == 3 for name, t in found.items() if name.endswith("num_batches_tracked"))
    weights = dict(MergedCandidate(source, merged, scale or 1.0).weights("b"))
    model = load_merged(tmp_path, "b")
    for name, mean in expected.items():
        torch.testing.assert_close(found[name], mean)
        torch.testing.assert_close(weights[name], mean)
        torch.testing.assert_close(model.resnet.state_dict()[name], mean)
    assert bool(torch.isfinite(model(torch.randn(2, 3, 16, 16)).logits).all())


def test_adding_an_expert_goes_on_with_the_average(folders, tmp_path):
    shutil.copytree(folders["base"], tmp_path / "merged")
    before = {f"resnet.{n}": t for n, t in stored(folders["base"]).items()}
    before |= {f"resnet.{name}": mean for name, mean in means(folders, "ab").items()}
    save_file(before, tmp_path / "merged" / "model.safetensors")
    architecture = Architecture.of_folder(folders["a"])
    base, merged, new = map(architecture.checkpoint, (folders["base"], tmp_path / "merged", folders["c"]))
    source = ExpertTaskVectors(base, {"(merged)": merged, "c": new}, architecture, {"(merged)": 2})
    for name, mean in means(folders, "abc").items():
        torch.testing.assert_close(dict(source.running_statistics())[name], mean)


def test_statistics_that_an_expert_lacks_are_named(folders, tmp_path):
    shutil.copytree(folders["a"], tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    lost = "embedder.embedder.normalization.running_var"
    del tensors[f"resnet.{lost}"]
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(PaveError, match=f"{lost} .* is in the base, but not in the expert"):
        source_of({**folders, "a": tmp_path / "a"})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("frequencies", torch.zeros(3), persistent=False)


def test_kinds():
    assert buffer_kinds(Net()) == {
        "norm.running_mean": BufferKind.STATISTICS,
        "norm.running_var": BufferKind.STATISTICS,
        "norm.num_batches_tracked": BufferKind.STATISTICS,
        "table": BufferKind.CONSTANT,
        "frequencies": BufferKind.DERIVED,
    }


def problems(tmp_path, base, expert):
    architecture = Architecture("Net", "net", {}, buffers=buffer_kinds(Net()))
    checkpoints = []
    for name, tensors in (("base", base), ("expert", expert)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        checkpoints.append(architecture.checkpoint(tmp_path / name))
    return list(buffer_problems(*checkpoints, architecture.buffers))


@pytest.mark.parametrize("name", ["table", "frequencies"])
def test_a_constant_that_differs_is_named(tmp_path, name):
    table = torch.tensor([1.0, float("-inf"), 3.0])
    assert problems(tmp_path, {name: table}, {name: table + torch.tensor([0, 0, 0.1])}) == [
        f"the buffer {name} differs from the base's; buffers are not merged, so base and experts must have the same "
        "(were they made with another configuration?)"
    ]


def test_constants_may_be_rounded_or_missing_and_statistics_may_differ(tmp_path):
    table = torch.tensor([1 / 3, float("-inf"), 3.0])
    base = {name: table.clone() for name in ("table", "frequencies", "norm.running_var")}
    assert problems(tmp_path, base, {"table": table.bfloat16(), "norm.running_var": table + 1}) == []


def test_a_constant_of_another_shape_is_named(tmp_path):
    found = problems(tmp_path, {"table": torch.zeros(3)}, {"table": torch.zeros(4)})
    assert found == ["the buffer table is [4] in the expert, [3] in the base"]
