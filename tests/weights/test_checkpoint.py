import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pave_lightning.errors import PaveError
from pave_lightning.weights import Checkpoint, model_digest


@pytest.fixture
def write(tmp_path):
    def build(tensors, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        return folder

    return build


def test_names_with_prefix_are_split_into_backbone_and_head(write):
    weight, head = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    checkpoint = Checkpoint(write({"bert.layer.weight": weight, "classifier.bias": head}), "bert")
    assert list(checkpoint) == ["layer.weight"]
    assert torch.equal(checkpoint.tensor("layer.weight"), weight)
    assert torch.equal(checkpoint.head_tensors()["classifier.bias"], head)
    assert list(checkpoint.head_tensors()) == ["classifier.bias"]


def test_names_without_prefix_are_all_backbone(write):
    checkpoint = Checkpoint(write({"layer.weight": torch.ones(2), "bertish.weight": torch.ones(1)}), "bert")
    assert sorted(checkpoint) == ["bertish.weight", "layer.weight"]
    assert checkpoint.head_tensors() == {}


def test_a_saved_base_and_its_expert_have_the_same_backbone_names(base_folder, expert_folders):
    base, expert = Checkpoint(base_folder, "bert"), Checkpoint(expert_folders["second"], "bert")
    assert set(base) == set(expert)
    assert not any(name.startswith("bert.") for name in base)
    assert sorted(expert.head) == ["classifier.bias", "classifier.weight"]
    assert expert.head["classifier.weight"].shape == (3, 32)
    stored = load_file(expert_folders["second"] / "model.safetensors")
    assert all(torch.equal(expert.tensor(name), stored[f"bert.{name}"]) for name in expert)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 4), slice(4, 5), slice(0, 5), slice(2, 2)])
def test_rows_are_rows_of_the_whole_tensor(write, rows):
    weight = torch.randn(5, 3, 2)
    checkpoint = Checkpoint(write({"weight": weight, "scalar": torch.tensor(2.5)}), "bert")
    assert torch.equal(checkpoint.tensor("weight", rows), weight[rows])
    assert checkpoint.tensor("scalar").shape == ()
    assert float(checkpoint.tensor("scalar")) == 2.5


def test_reading_rows_leaves_the_rest_of_the_file_alone(write):
    folder = write({"weight": torch.zeros(4, 2)})
    checkpoint = Checkpoint(folder, "bert")
    path = folder / "model.safetensors"
    with path.open("rb+") as file:  # write 1.0 into the last row behind the reader's back
        file.seek(-4, os.SEEK_END)
        file.write(torch.ones(1).numpy().tobytes())
    changed = checkpoint.backbone["weight"].changed
    os.utime(path, ns=(changed, changed))
    assert torch.equal(checkpoint.tensor("weight", slice(0, 3)), torch.zeros(3, 2))
    assert torch.equal(checkpoint.tensor("weight", slice(3, 4)), torch.tensor([[0.0, 1.0]]))


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="looks at the memory map of Linux")
def test_what_was_read_keeps_no_file_mapped_and_is_nobody_elses(write):
    folder = write({"weight": torch.ones(1000, 3), "index": torch.arange(3)})
    checkpoint = Checkpoint(folder, "none")
    whole, some = checkpoint.tensor("weight"), checkpoint.tensor("weight", slice(5, 7))
    assert str(folder) not in Path("/proc/self/maps").read_text()
    whole.zero_(), some.zero_()
    assert float(checkpoint.tensor("weight").sum()) == 3000


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16", "int32", "bool"])
def test_every_kind_of_number_is_read_where_it_lies(write, kind):
    dtype = getattr(torch, kind)
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 4).to(dtype),
        "c": torch.randn(5, 2, 3).to(dtype),
        "none": torch.zeros(0, 4, dtype=dtype),
        "scalar": torch.tensor(3.5).to(dtype),
    }
    folder = write(tensors)
    checkpoint = Checkpoint(folder, "bert")
    for name, tensor in tensors.items():
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor), name
    assert torch.equal(checkpoint.tensor("c", slice(1, 4)), tensors["c"][1:4])
    assert checkpoint.tensor("none", slice(0, 0)).shape == (0, 4)


def test_files_that_change_while_they_are_in_use_are_told(write):
    folder = write({"weight": torch.ones(100)})
    checkpoint = Checkpoint(folder, "bert")
    save_file({"other": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(
        PaveError, match=r"model\.safetensors changed while it was in use: weight can no longer be read"
    ):
        checkpoint.tensor("weight")
    os.utime(folder / "model.safetensors", ns=(checkpoint.backbone["weight"].changed,) * 2)
    with pytest.raises(PaveError, match=r"changed while it was in use: .* \(it has become shorter\)"):
        checkpoint.tensor("weight")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PaveError, match="changed while it was in use"):
        checkpoint.tensor("weight", slice(0, 1))


def test_all_tensors_by_their_stored_names(write):
    tensors = {"bert.b.LayerNorm.gamma": torch.ones(1), "bert.a": torch.ones(2), "classifier": torch.ones(3)}
    checkpoint = Checkpoint(write(tensors), "bert")
    found = {name: checkpoint.read(stored) for name, stored in checkpoint.stored()}
    assert list(found) == sorted(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in found.items())


def test_legacy_names_of_layer_norms(write):
    tensors = {
        "bert.embeddings.LayerNorm.gamma": torch.tensor([2.0]),
        "bert.embeddings.LayerNorm.beta": torch.tensor([3.0]),
        "bert.other.gamma": torch.tensor([4.0]),
    }
    checkpoint = Checkpoint(write(tensors), "bert")
    assert sorted(checkpoint) == ["embeddings.LayerNorm.bias", "embeddings.LayerNorm.weight", "other.gamma"]
    assert float(checkpoint.tensor("embeddings.LayerNorm.weight")) == 2
    assert float(checkpoint.tensor("embeddings.LayerNorm.bias")) == 3


def test_the_stored_dtype_is_kept(write):
    tensors = {"half": torch.ones(2).half(), "brain": torch.ones(2).bfloat16(), "index": torch.arange(2)}
    checkpoint = Checkpoint(write(tensors), "bert")
    assert {name: checkpoint.tensor(name).dtype for name in checkpoint} == {
        "half": torch.float16,
        "brain": torch.bfloat16,
        "index": torch.int64,
    }
    assert {name: stored.is_floating for name, stored in checkpoint.backbone.items()} == {
        "half": True,
        "brain": True,
        "index": False,
    }


def test_weights_that_are_not_finite_are_named(write):
    tensors = {
        "bert.good": torch.ones(3),
        "bert.nan": torch.tensor([1.0, float("nan")]),
        "bert.index": torch.arange(3),
        "head.infinite": torch.tensor([float("-inf")]).half(),
        "head.good": torch.ones(1),
    }
    assert Checkpoint(write(tensors), "bert").non_finite() == ["nan", "head.infinite"]


def test_a_truncated_file_is_told(write):
    folder = write({"weight": torch.ones(100)})
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(PaveError, match=r"model\.safetensors is truncated or no safetensors file"):
        Checkpoint(folder, "bert")


def test_a_file_of_another_kind_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(PaveError, match="truncated or no safetensors file"):
        Checkpoint(tmp_path, "bert")


def test_pickled_weights_are_refused_and_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save(Bomb(), tmp_path / "pytorch_model.bin")
    with pytest.raises(PaveError, match=r"pytorch_model\.bin; pickled weights can run code and are refused"):
        Checkpoint(tmp_path, "bert")
    assert not (tmp_path / "exploded").exists()


def test_safetensors_beside_pickles_are_read(write):
    folder = write({"weight": torch.ones(2)})
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert list(Checkpoint(folder, "bert")) == ["weight"]


def test_an_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(PaveError, match=r"has no model\.safetensors"):
        Checkpoint(tmp_path, "bert")
    with pytest.raises(PaveError, match=r"there is no folder .*nowhere"):
        Checkpoint(tmp_path / "nowhere", "bert")


def test_missing_shards_are_all_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PaveError, match=r"not there: three\.safetensors, two\.safetensors"):
        Checkpoint(tmp_path, "bert")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_told(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(PaveError, match=r"index\.json (is broken|cannot be read as JSON|holds a list)"):
        Checkpoint(tmp_path, "bert")


def test_the_digest_follows_the_content_and_nothing_else(write):
    first = write({"weight": torch.zeros(2)}, "first")
    same = write({"weight": torch.zeros(2)}, "same")
    other = write({"weight": torch.ones(2)}, "other")
    (same / "README.md").write_text("words")
    assert model_digest(first) == model_digest(same)
    (same / "tokenizer.json").write_text("{}")
    assert model_digest(first) != model_digest(same)
    assert model_digest(first) != model_digest(other)
    before = model_digest(first)
    save_file({"weight": torch.full((2,), 7.0)}, first / "model.safetensors")
    assert model_digest(first) != before


def test_an_old_index_beside_a_single_file_is_not_asked(write, tmp_path):
    """As transformers does, which leaves the index of earlier shards behind when it saves one file."""
    folder = write({"weight": torch.ones(3)})
    save_file({"weight": torch.zeros(3)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"weight": "model-00001-of-00001.safetensors", "gone": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint(folder, "none").tensor("weight").tolist() == [1, 1, 1]


@pytest.fixture
def shards(base_folder, tmp_path):
    """A base in shards, its files in order."""
    from transformers import AutoModel

    AutoModel.from_pretrained(base_folder).save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    return sorted((tmp_path / "shards").glob("model-*.safetensors"))


def test_a_tensor_in_two_shards(shards):
    from safetensors.torch import load_file, save_file

    first = load_file(shards[0])
    name = min(first)
    save_file(load_file(shards[1]) | {name: first[name] + 1}, shards[1], metadata={"format": "pt"})
    with pytest.raises(PaveError, match=rf"{shards[0].name} and {shards[1].name} both hold {name}, so it is not known"):
        Checkpoint(shards[0].parent, "bert")


def test_an_index_that_names_another_shard(shards):
    index = shards[0].parent / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(name for name, file in content["weight_map"].items() if file == shards[0].name)
    content["weight_map"][name] = shards[1].name
    index.write_text(json.dumps(content))
    with pytest.raises(PaveError, match=rf"index\.json says that {shards[1].name} holds {name}, which it does not"):
        Checkpoint(shards[0].parent, "bert")
