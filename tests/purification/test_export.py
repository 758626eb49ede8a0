"""Purified experts as folders that other tools load."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from pave_lightning.errors import PaveError
from pave_lightning.purification import KeptRank, PurifiedTaskVectors, StoredPurification, write_purified
from pave_lightning.purification.export import write_purified_expert, write_purified_experts
from pave_lightning.purification.options import Purify
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors, ShardWriter, model_digest

INPUTS = {
    "input_ids": torch.tensor([[2, 5, 40, 99, 3], [2, 17, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


def opened(base, experts):
    architecture = Architecture.of_folder(next(iter(experts.values())))
    checkpoints = {task: Checkpoint(folder, architecture.prefix) for task, folder in experts.items()}
    return ExpertTaskVectors(Checkpoint(base, architecture.prefix), checkpoints, architecture), checkpoints


def purify(source, rho, **options):
    return PurifiedTaskVectors(source, {}, Purify(rho=rho, metric="identity", **options))


@pytest.fixture
def export(base_folder, expert_folders, tmp_path):
    def build(rho=0.8, *, base=base_folder, experts=expert_folders, **options):
        source, checkpoints = opened(base, experts)
        vectors = purify(source, rho, **options)
        write_purified_experts(tmp_path / "out", vectors, checkpoints, {"rho": rho})
        return tmp_path / "out", vectors

    return build


def changed(folder, target, change):
    """A copy of a model folder whose stored tensors went through ``change``."""
    shutil.copytree(folder, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
    return target


@torch.no_grad()
def logits(folder):
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()(**INPUTS).logits


def test_transformers_loads_what_was_purified_by_hand(export, expert_folders):
    folder, vectors = export()
    assert sorted(child.name for child in folder.iterdir()) == sorted(expert_folders)
    for task, expert in expert_folders.items():
        model = AutoModelForSequenceClassification.from_pretrained(expert).eval()
        with torch.no_grad():
            plain = model(**INPUTS).logits
            for parameter in vectors.parameters:
                if parameter.is_matrix:
                    weight = model.bert.get_parameter(parameter.name)
                    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
                    rank = vectors.ranks[task, parameter.layer].rank
                    assert rank < len(values)
                    weight.copy_((left[:, :rank] * values[:rank]) @ right[:rank])
            expected = model(**INPUTS).logits
        found = logits(folder / task)
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-3)
        assert AutoTokenizer.from_pretrained(folder / task)("w1 w2")["input_ids"]


def test_what_is_not_purified_is_the_same_bit_for_bit(export, expert_folders):
    folder, vectors = export()
    matrices = {f"bert.{parameter.name}" for parameter in vectors.parameters if parameter.is_matrix}
    for task, expert in expert_folders.items():
        before, after = load_file(expert / "model.safetensors"), load_file(folder / task / "model.safetensors")
        assert before.keys() == after.keys()
        same = {name for name, value in before.items() if torch.equal(value, after[name])}
        assert same == before.keys() - matrices
        assert {"classifier.weight", "classifier.bias", "bert.embeddings.word_embeddings.weight"} <= same
        assert (folder / task / "config.json").read_bytes() == (expert / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_full_rank_gives_the_expert_bit_for_bit(export, base_folder, expert_folders, tmp_path, dtype):
    def cast(tensors):
        return {name: value.to(dtype) + torch.tensor(1e-12, dtype=dtype) for name, value in tensors.items()}

    expert = changed(expert_folders["first"], tmp_path / "cast", cast)
    folder, _ = export(1.0, experts={"a": expert, "b": expert_folders["second"]})
    before, after = load_file(expert / "model.safetensors"), load_file(folder / "a" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype == dtype
        assert torch.equal(value, after[name])


def test_the_dtype_is_kept(export, expert_folders, tmp_path):
    halved = {
        task: changed(folder, tmp_path / task, lambda found: {name: value.bfloat16() for name, value in found.items()})
        for task, folder in expert_folders.items()
    }
    folder, vectors = export(experts=halved)
    parameter = next(parameter for parameter in vectors.parameters if parameter.is_matrix)
    stored = load_file(folder / "second" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    wanted = vectors.expert("second", parameter).bfloat16()
    assert torch.equal(stored[f"bert.{parameter.name}"], wanted)
    assert logits(folder / "second").isfinite().all()


def test_legacy_names_without_prefix_are_kept(export, expert_folders, tmp_path):
    def old(tensors):
        names = {name: name.removeprefix("bert.") for name in tensors if name.startswith("bert.")}
        legacy = {".weight": ".gamma", ".bias": ".beta"}
        for name, short in names.items():
            for new, former in legacy.items():
                if short.endswith(f"LayerNorm{new}"):
                    names[name] = short.removesuffix(new) + former
        return {names[name]: value for name, value in tensors.items() if name in names}

    olden = {task: changed(folder, tmp_path / task, old) for task, folder in expert_folders.items()}
    folder, vectors = export(experts=olden)
    before = load_file(olden["third"] / "model.safetensors")
    after = load_file(folder / "third" / "model.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(before["embeddings.LayerNorm.gamma"], after["embeddings.LayerNorm.gamma"])
    name = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(before[name], after[name])
    assert name in {parameter.name for parameter in vectors.parameters}


def test_transposed_weights_of_gpt2(export, tmp_path):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 100, "n_positions": 8}
    config = GPT2Config(**sizes, eos_token_id=0, bos_token_id=0, pad_token_id=0)
    folders = {name: tmp_path / name for name in ("base", "a", "b")}
    for folder in folders.values():
        GPT2ForSequenceClassification(config).save_pretrained(folder)
    experts = {task: folders[task] for task in "ab"}
    folder, vectors = export(base=folders["base"], experts=experts)
    before, after = load_file(folders["a"] / "model.safetensors"), load_file(folder / "a" / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert after[name].shape == before[name].shape == (16, 64)
    rank = vectors.ranks["a", "h.0.mlp.c_fc"].rank
    assert torch.linalg.matrix_rank(after[name], rtol=1e-5) == rank < 16
    assert logits(folder / "a").isfinite().all()


def test_shards_are_written_and_loaded(export, expert_folders, monkeypatch):
    _, _, *others = ShardWriter.__init__.__defaults__
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (20_000, 20_000, *others))
    folder, _ = export(1.0)
    assert len(list((folder / "first").glob("*.safetensors"))) > 2
    assert torch.equal(logits(folder / "first"), logits(expert_folders["first"]))


def test_stored_purification_gives_the_same_files(base_folder, expert_folders, tmp_path):
    source, checkpoints = opened(base_folder, expert_folders)
    vectors = purify(source, 0.8)
    write_purified(vectors, tmp_path / "stored")
    stored = StoredPurification(source, {task: Checkpoint(tmp_path / "stored" / task, "bert") for task in checkpoints})
    for name, found in (("one", vectors), ("two", stored)):
        write_purified_expert(tmp_path / name, "second", found, checkpoints["second"], {})
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    again = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "two" / "model.safetensors").read_bytes()


def test_what_the_folder_says_of_itself(base_folder, expert_folders, tmp_path):
    source, checkpoints = opened(base_folder, expert_folders)
    ranks = [KeptRank("first", "encoder.layer.0.output.dense", 20, 32), KeptRank("second", "pooler.dense", 31, 32)]
    write_purified_experts(tmp_path, purify(source, 1.0), {"first": checkpoints["first"]}, {"rho": 1.0}, ranks)
    assert json.loads((tmp_path / "first" / "pave.json").read_text()) == {
        "form": "purified expert",
        "task": "first",
        "expert": model_digest(expert_folders["first"]),
        "purify": {"rho": 1.0},
        "ranks": {"encoder.layer.0.output.dense": {"kept": 20, "of": 32}},
    }


def test_only_configuration_and_tokenizer_are_copied(base_folder, expert_folders, tmp_path):
    expert = tmp_path / "expert"
    shutil.copytree(expert_folders["first"], expert)
    for name in ("manifest.json", "training_args.bin", "README.md", "pave.json", "model.safetensors.index.json.bak"):
        (expert / name).write_text("{}")
    (expert / "vocab.txt").write_text("[PAD]")
    (expert / "heads").mkdir()
    source, checkpoints = opened(base_folder, {"a": expert})
    write_purified_expert(tmp_path / "out", "a", purify(source, 1.0), checkpoints["a"], {})
    names = {file.name for file in (tmp_path / "out").iterdir()}
    expected = {"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "model.safetensors", "pave.json"}
    assert names == expected


def test_mistakes_are_told(base_folder, expert_folders, make_base, make_expert, tmp_path):
    source, checkpoints = opened(base_folder, expert_folders)
    vectors = purify(source, 1.0)
    with pytest.raises(PaveError, match="no task vectors of 'frist', only of first, second, third"):
        write_purified_expert(tmp_path / "out", "frist", vectors, checkpoints["first"], {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(PaveError, match="is not empty: give a new folder"):
        write_purified_expert(tmp_path / "full", "first", vectors, checkpoints["first"], {})
    flat = make_expert(make_base(num_hidden_layers=1))
    with pytest.raises(PaveError, match=r"has no weight encoder\.layer\.1\..*it is not the expert of 'first'"):
        write_purified_expert(tmp_path / "flat", "first", vectors, Checkpoint(flat, "bert"), {})
    wide = make_expert(make_base(hidden_size=48))
    with pytest.raises(PaveError, match=r"is \[48, 48\], but its purified weight \[32, 32\]"):
        write_purified_expert(tmp_path / "wide", "first", vectors, Checkpoint(wide, "bert"), {})
