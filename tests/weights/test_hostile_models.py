"""Model folders that ask for more than any model has."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pave_lightning.errors import PaveError
from pave_lightning.system import files
from pave_lightning.tasks.tokenizers import load_tokenizer
from pave_lightning.weights import Adapter, Architecture, Checkpoint


@pytest.fixture
def folder(expert_folders, tmp_path):
    return shutil.copytree(expert_folders["first"], tmp_path / "model")


def change(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10,000,000, which no model has"),
        ({"num_labels": 10_000_000}, "num_labels is 10,000,000, which no model has"),
        ({"text_config": {"n_layer": 10**18}}, "n_layer is 1,000,000,000,000,000,000, which no model has"),
        ({"vocab_size": 2**40}, "vocab_size is 1,099,511,627,776, which no model has"),
        ({"architectures": 7}, "expected a list of names under architectures, found 7"),
        ({"architectures": "BertModel"}, "expected a list of names under architectures, found BertModel"),
        ({"architectures": ["BertModel", None]}, "expected a list of names under architectures"),
        ({"num_hidden_layers": 1500}, "num_hidden_layers is 1,500, which no model has"),
        ({"hidden_size": 2**31 - 1, "num_attention_heads": 1}, "gives no model"),
        ({"x": "y" * (5 << 20)}, "too large: expected at most 4 MiB of JSON"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "x--code.Own"}},
            "code of its own .auto_map. is not",
        ),
    ],
)
def test_configurations(folder, changes, told):
    change(folder / "config.json", **changes)
    with pytest.raises(PaveError, match=told):
        Architecture.of_folder(folder)


def test_code_beside_a_tokenizer_is_not_run_and_not_asked_about(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked on stdin"))
    (folder / "code.py").write_text("raise SystemExit('this ran')")
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModel": "code.Own"})
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["code.Own", None]})
    for read in (Architecture.of_folder, load_tokenizer):
        with pytest.raises(PaveError):
            read(folder)


def test_a_header_larger_than_any(folder, monkeypatch):
    monkeypatch.setattr(files, "MOST_HEADER_BYTES", 100)
    with pytest.raises(PaveError, match="has a header of 0 MiB, at most 0 MiB are read"):
        Checkpoint(folder, "bert")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "x.bin", "a/b.safetensors", ".."])
def test_an_index_that_points_elsewhere(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PaveError, match="expected names of safetensors files in the same folder"):
        Checkpoint(folder, "bert")


def test_values_that_float32_cannot_hold(folder):
    stored = load_file(folder / "model.safetensors")
    stored["classifier.bias"] = torch.tensor([1e300, 1.0], dtype=torch.float64)
    stored["bert.pooler.dense.bias"] = stored["bert.pooler.dense.bias"].double() + 1e30
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(folder, "bert").non_finite() == ["classifier.bias"]


def test_a_tokenizer_file_that_is_a_dangling_link(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to(folder / "blobs" / "0a1b")
    with pytest.raises(PaveError, match=r"tokenizer_config\.json is no file"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": "8"}, "the rank '8'"),
        ({"r": 0}, "the rank 0"),
        ({"lora_alpha": 1e300}, "the alpha 1e[+]300"),
        ({"lora_alpha": None}, "the alpha None"),
        ({"rank_pattern": [1]}, "a pattern that is no mapping"),
        ({"rank_pattern": {"(": 1}}, "a pattern of layers that is none"),
        ({"rank_pattern": {"(a+)+b": 1}}, "a pattern of layers that is not tried"),
    ],
)
def test_adapters(tmp_path, changes, told):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    factors = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    stored = {f"base_model.model.bert.x.{side}.weight": factor for side, factor in factors.items()}
    save_file(stored, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PaveError, match=told):
        Adapter(tmp_path, "bert")
