"""Models of the hub, of which a cache holds some files and no others can be had."""

import json

import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.system.references import HubModel
from pave_lightning.weights import Checkpoint, locate_model


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, make_base):
    """A base of several shards."""
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("sharded")
    AutoModel.from_pretrained(make_base()).save_pretrained(folder, max_shard_size="20kB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_a_model_of_the_cache(hub_cache, base_folder):
    place = hub_cache("owner/name", base_folder.iterdir())
    assert locate_model("owner/name") == place
    assert locate_model(HubModel(hub="owner/name")) == place


def test_a_folder_and_a_revision(hub_cache, base_folder, expert_folders):
    hub_cache("owner/name", base_folder.iterdir())
    first = hub_cache("owner/name", expert_folders["first"].iterdir(), folder="runs/last")
    second = hub_cache("owner/name", expert_folders["second"].iterdir(), revision="v1", folder="runs/last")
    assert locate_model(HubModel(hub="owner/name", folder="runs/last")) == first
    assert locate_model(HubModel(hub="owner/name", folder="runs/last", revision="v1")) == second
    assert locate_model("hf://owner/name@v1/runs/last") == second
    assert locate_model(HubModel(hub="owner/name", revision=second.parents[1].name, folder="runs/last")) == second


def test_shards_are_found(hub_cache, sharded):
    place = hub_cache("owner/name", sharded.iterdir())
    assert len(Checkpoint(locate_model("owner/name"), "bert").files) > 2
    assert place.is_dir()


def test_missing_shards_are_named(hub_cache, sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    hub_cache("owner/name", [file for file in sharded.iterdir() if file not in (shards[0], shards[2])])
    with pytest.raises(PaveError) as told:
        locate_model("owner/name", role="base")
    assert str(told.value) == (
        f"base: of 'owner/name' {shards[0].name}, {shards[2].name} are not in the hub's cache (HF_HUB_OFFLINE is set, "
        "so only what was fetched before is there); where there is a network, run: hf download owner/name"
    )


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        (["config.json"], r"of 'owner/name' model\.safetensors is not in the hub's cache"),
        (["model.safetensors"], r"of 'owner/name' config\.json is not in the hub's cache"),
        (["tokenizer.json"], r"of 'owner/name' config\.json, model\.safetensors are not in the hub's cache"),
    ],
)
def test_missing_files_are_named(hub_cache, base_folder, kept, told):
    hub_cache("owner/name", [base_folder / name for name in kept])
    with pytest.raises(PaveError, match=told):
        locate_model("owner/name")


def test_a_missing_adapter_is_named(hub_cache, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    hub_cache("owner/lora", [tmp_path / "adapter_config.json"])
    with pytest.raises(PaveError, match=r"of 'owner/lora' adapter_model\.safetensors is not in"):
        locate_model("owner/lora")


def test_a_missing_folder_and_revision(hub_cache, base_folder):
    hub_cache("owner/name", base_folder.iterdir())
    with pytest.raises(PaveError, match=r"of 'hf://owner/name/lost' config\.json, model\.safetensors are not in"):
        locate_model(HubModel(hub="owner/name", folder="lost"))
    with pytest.raises(PaveError, match=r"expert of 'a': 'hf://owner/name@v9' could not be fetched .*HF_HUB_OFFLINE"):
        locate_model(HubModel(hub="owner/name", revision="v9"), role="expert of 'a'")


def test_pickled_weights_are_told_with_the_command(hub_cache, base_folder, tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    files = [base_folder / "config.json", tmp_path / "pytorch_model.bin"]
    hub_cache("owner/name", files)
    hub_cache("owner/name", files, folder="sub", revision="v1")
    with pytest.raises(PaveError, match=r"its weights as pytorch_model\.bin; .* `pave convert owner/name FOLDER`"):
        locate_model("owner/name")
    with pytest.raises(PaveError, match=r"run `pave convert owner/name --revision v1 --folder sub FOLDER` once"):
        locate_model("hf://owner/name@v1/sub")


def test_a_gguf_file_of_the_cache(hub_cache, base_folder, tmp_path, monkeypatch):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    hub_cache("owner/name", [tmp_path / "small.gguf"])
    monkeypatch.setattr("pave_lightning.weights.locate.gguf_folder", lambda file: ("made of", file.name))
    assert locate_model(HubModel(hub="owner/name", file="small.gguf")) == ("made of", "small.gguf")
    with pytest.raises(PaveError, match=r"lost\.gguf' is not in the hub's cache; beside it there are small\.gguf"):
        locate_model(HubModel(hub="owner/name", file="lost.gguf"))


def test_a_broken_index(hub_cache, base_folder, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    hub_cache("owner/name", [base_folder / "config.json", tmp_path / "model.safetensors.index.json"])
    with pytest.raises(PaveError, match=r"of 'owner/name' model\.safetensors is not in"):
        locate_model("owner/name")


@pytest.mark.parametrize("folder", ["", "runs/last"])
def test_what_is_fetched_of_a_repository(folder, monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    below = f"{folder}/" if folder else ""
    wanted = [
        *(
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "README.md",
        ),
        *("model.safetensors.index.json", "tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja"),
        *("adapter_config.json", "adapter_model.safetensors", "adapter/adapter_model.safetensors"),
    ]
    others = [
        *("pytorch_model.bin", "flax_model.msgpack", "training_args.bin", "optimizer.pt", "tf_model.h5", "x.gguf"),
        *("checkpoint-500/model.safetensors", "onnx/model.onnx", "consolidated.safetensors"),
    ]
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        kept = filter_repo_objects([f"{below}{name}" for name in [*wanted, *others]], allow_patterns=allow_patterns)
        assert list(kept) == [f"{below}{name}" for name in wanted]
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            (tmp_path / folder / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("pave_lightning.system.hub.hub_answers", lambda: True)
    assert locate_model(HubModel(hub="owner/name", folder=folder or None, revision="v1")) == tmp_path / folder
    assert asked == [("owner/name", "v1")]
