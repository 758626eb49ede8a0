import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from pave_lightning.system.files import file_sha256
from pave_lightning.weights import Checkpoint, ShardWriter

TENSORS = {f"layer.{index}.weight": torch.randn(3, index + 1) for index in range(5)}


def write(folder, shard_bytes, tensors=None):
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in (tensors or TENSORS).items():
        writer.add(name, tensor)
    writer.close()
    return writer


def test_one_file_where_all_fits(tmp_path):
    write(tmp_path, 10_000)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("shard_bytes", [1, 60, 100, 179])
def test_shards_are_read_back_as_they_were(tmp_path, shard_bytes):
    write(tmp_path, shard_bytes)
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for shard in shards:
        held = load_file(tmp_path / shard)
        size = sum(tensor.numel() * 4 for tensor in held.values())
        assert size <= shard_bytes or len(held) == 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in TENSORS.values())
    checkpoint = Checkpoint(tmp_path, "bert")
    assert sorted(checkpoint) == sorted(TENSORS)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in TENSORS.items())
    assert torch.equal(checkpoint.tensor("layer.3.weight", slice(1, 3)), TENSORS["layer.3.weight"][1:3])


def test_transformers_loads_the_shards(tmp_path, base_folder):
    from transformers import AutoModel

    base = Checkpoint(base_folder, "bert")
    write(tmp_path, 20_000, {name: base.tensor(name) for name in base})
    (tmp_path / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(value, base.tensor(name)) for name, value in model.state_dict().items() if name in base)


def test_no_file_has_its_final_name_before_the_end(tmp_path):
    writer = ShardWriter(tmp_path, 1)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    assert list(tmp_path.iterdir())
    assert not list(tmp_path.glob("*.safetensors"))
    writer.close()
    assert not list(tmp_path.glob("*.tmp"))


def test_transposed_tensors_are_written_as_they_read(tmp_path):
    weight = torch.randn(3, 4)
    write(tmp_path, 1000, {"weight": weight.T})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], weight.T)


def test_no_more_than_a_shard_is_held(tmp_path, monkeypatch):
    held = []
    plain = ShardWriter._flush

    def watched(self):
        held.append(sum(tensor.nbytes for tensor in self._pending.values()))
        plain(self)

    monkeypatch.setattr(ShardWriter, "_flush", watched)
    write(tmp_path, 100, {str(index): torch.ones(10) for index in range(7)} | {"large": torch.ones(60)})
    assert held == [80, 80, 80, 40, 240]


def test_equal_tensors_give_equal_files(tmp_path):
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, 100)
        files.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert files[0] == files[1]


def test_the_sha256_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"weights" * 1000)
    assert file_sha256(path) == hashlib.sha256(b"weights" * 1000).hexdigest()


@pytest.fixture
def mixed():
    """Tensors of several types and odd sizes, in an order in which some would begin at a wrong place."""
    torch.manual_seed(0)
    drawn = {f"block.{index}.weight": torch.randn(5, index + 3) for index in range(12)}
    return {
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        **drawn,
        "wide": torch.randn(3, 3).double(),
        "count": torch.tensor(7),
        "transposed": torch.randn(4, 6).T,
        "half odd": torch.randn(3, 5).half(),
    }


@pytest.mark.parametrize("held_bytes", [1, 40, 200])
@pytest.mark.parametrize("shard_bytes", [100, 600, 10_000])
def test_shards_that_are_larger_than_what_is_held(tmp_path, mixed, shard_bytes, held_bytes):
    writer = ShardWriter(tmp_path, shard_bytes, held_bytes)
    held = []
    for name, tensor in mixed.items():
        writer.add(name, tensor)
        held.append(sum(tensor.nbytes for tensor in writer._pending.values()))
    writer.close()
    # What is held may hold odd tensors back, which come last.
    odd = sum(tensor.nbytes for tensor in mixed.values() if tensor.nbytes % 8)
    assert max(held) <= max(held_bytes, *(tensor.nbytes for tensor in mixed.values())) + odd
    files = sorted(tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob("*.tmp"))
    found = {}
    for file in files:
        loaded = load_file(file)
        assert sum(tensor.nbytes for tensor in loaded.values()) <= shard_bytes or len(loaded) == 1
        assert not loaded.keys() & found.keys()
        found |= loaded
    assert found.keys() == mixed.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in mixed.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in mixed.items())
    # Ours reads values where the header says they begin.
    checkpoint = Checkpoint(tmp_path, "bert")
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in mixed.items())
    whole = sum(tensor.nbytes for tensor in mixed.values()) <= shard_bytes
    assert (len(files) == 1) == whole


def test_a_header_that_is_full_ends_the_shard(tmp_path):
    tensors = {"first": torch.ones(20)} | {"long name " * 30 + str(index): torch.ones(2) for index in range(60)}
    write_held = ShardWriter(tmp_path, 100_000, 80)
    for name, tensor in tensors.items():
        write_held.add(name, tensor)
    write_held.close()
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_was_added_is_counted_by_type(tmp_path, mixed):
    writer = ShardWriter(tmp_path)
    for name, tensor in mixed.items():
        writer.add(name, tensor)
    assert writer.elements[torch.bfloat16] == 3
    assert torch.bool not in writer.elements
