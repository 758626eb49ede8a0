"""Pickled checkpoints as safetensors."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from pave_lightning.cli import main
from pave_lightning.errors import PaveError
from pave_lightning.weights import Adapter, locate_model
from pave_lightning.weights.converting import convert_checkpoint


def pickled(folder, model):
    """A model as old releases of transformers saved it."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def masked_bert(**config):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=100, **sizes, **config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_loads_as_the_model_that_was_pickled(tmp_path, dtype):
    from transformers import AutoModelForMaskedLM

    model = masked_bert().to(dtype)
    convert_checkpoint(str(pickled(tmp_path / "old", model)), tmp_path / "new")
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == dtype


def test_tied_names_are_written_once_and_untied_ones_each(tmp_path):
    embedding, output = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    convert_checkpoint(str(pickled(tmp_path / "tied", masked_bert())), tmp_path / "new-tied")
    stored = load_file(tmp_path / "new-tied" / "model.safetensors")
    assert embedding in stored
    assert output not in stored
    untied = masked_bert(tie_word_embeddings=False)
    # The same memory, which the pickle keeps, under names that the model does not tie.
    untied.cls.predictions.decoder.weight = untied.bert.embeddings.word_embeddings.weight
    convert_checkpoint(str(pickled(tmp_path / "untied", untied)), tmp_path / "new-untied")
    stored = load_file(tmp_path / "new-untied" / "model.safetensors")
    assert torch.equal(stored[embedding], stored[output])


def test_slices_of_one_tensor_are_written_as_they_are(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"all": whole, "row": whole[1], "turned": whole.T}, tmp_path / "old" / "pytorch_model.bin")
    convert_checkpoint(str(tmp_path / "old"), tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(stored["row"], whole[1])
    assert torch.equal(stored["turned"], whole.T)


@pytest.fixture
def shards(tmp_path):
    """Two shards and their index."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    placed = {}
    for number, name in enumerate(("a", "b"), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({f"{name}.weight": torch.full((2,), float(number))}, folder / file)
        placed[f"{name}.weight"] = file
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def test_shards(shards, tmp_path):
    convert_checkpoint(str(shards), tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {"a.weight": [1, 1], "b.weight": [2, 2]}
    assert not list((tmp_path / "new").glob("*.bin*"))


def test_shards_that_are_missing_or_twice(shards, tmp_path):
    torch.save({"a.weight": torch.zeros(2)}, shards / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(
        PaveError, match=r"00002-of-00002\.bin holds a\.weight, which .*00001-of-00002\.bin holds as well"
    ):
        convert_checkpoint(str(shards), tmp_path / "new")
    (shards / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(PaveError, match=r"names shards that are not there: pytorch_model-00002-of-00002\.bin"):
        convert_checkpoint(str(shards), tmp_path / "new")
    (shards / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(PaveError, match=r"but no pytorch_model\.bin\.index\.json"):
        convert_checkpoint(str(shards), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [place.name for place in tmp_path.iterdir()] == ["shards"]


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    torch.save({"weight": Bomb()}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(PaveError, match=r"could not be read: .* holds more than weights is not read") as told:
        convert_checkpoint(str(tmp_path / "old"), tmp_path / "new")
    assert "weights_only" not in str(told.value)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"state": {"weight": torch.ones(1)}}, "holds dict under 'state', expected tensors by name"),
        ([torch.ones(1)], "holds list, expected the tensors of a model by name"),
        ({}, "holds dict, expected the tensors of a model by name"),
    ],
)
def test_other_content(tmp_path, content, told):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    torch.save(content, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(PaveError, match=told):
        convert_checkpoint(str(tmp_path / "old"), tmp_path / "new")


def test_what_else_lies_there(tmp_path, base_folder, caplog):
    old = pickled(tmp_path / "old", masked_bert())
    (old / "tokenizer.json").write_bytes((base_folder / "tokenizer.json").read_bytes())
    (old / "README.md").write_text("a card")
    torch.save({}, old / "training_args.bin")
    (old / "checkpoint-10").mkdir()
    with caplog.at_level("INFO"):
        convert_checkpoint(str(old), tmp_path / "new")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "tokenizer.json")
    ]
    assert "left out, since they are pickled and no weights: training_args.bin" in caplog.text


def test_adapters(tmp_path):
    for place in (tmp_path / "lora", tmp_path / "whole" / "adapter"):
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text("{}")
        torch.save({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, place / "adapter_model.bin")
    pickled(tmp_path / "whole", masked_bert())
    with pytest.raises(PaveError, match=rf"`pave convert {tmp_path / 'lora'} FOLDER`"):
        Adapter(tmp_path / "lora", "bert")
    for name, inside in (("lora", ""), ("whole", "adapter")):
        convert_checkpoint(str(tmp_path / name), tmp_path / f"new-{name}")
        stored = load_file(tmp_path / f"new-{name}" / inside / "adapter_model.safetensors")
        assert torch.equal(stored["base_model.model.q.lora_A.weight"], torch.ones(2, 3))
    assert (tmp_path / "new-whole" / "model.safetensors").is_file()


def test_nothing_to_convert(base_folder, tmp_path):
    with pytest.raises(PaveError, match="holds no pickled weights, so there is nothing to convert; use it as it is"):
        convert_checkpoint(str(base_folder), tmp_path / "new")
    (tmp_path / "there").mkdir()
    with pytest.raises(PaveError, match="exists already; name another folder"):
        convert_checkpoint(str(base_folder), tmp_path / "there")


def test_the_command(tmp_path, capsys, hub_cache):
    old = pickled(tmp_path / "old", masked_bert())
    assert main(["convert", str(old), str(tmp_path / "new")]) == 0
    assert f"results: {tmp_path / 'new'}" in capsys.readouterr().out
    assert main(["convert", str(old), str(tmp_path / "other"), "--revision", "v1"]) == 2
    assert "goes with a hub id, but" in capsys.readouterr().err
    hub_cache("owner/name", old.iterdir(), revision="v1", folder="runs")
    flags = ["--revision", "v1", "--folder", "runs"]
    assert main(["convert", "owner/name", str(tmp_path / "of-hub"), *flags]) == 0
    assert locate_model(str(tmp_path / "of-hub")) == tmp_path / "of-hub"
    assert main(["convert", "hf://owner/name@v1/runs", str(tmp_path / "of-text")]) == 0
