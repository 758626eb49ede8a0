"""Whether files hold what a model has, by their headers."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pave_lightning.weights import Checkpoint
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.completeness import lacking_of_base, lacking_weights, naming_problem, unused_weights

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def described(folder):
    return Architecture.of_folder(folder, "AutoModelForSequenceClassification")


@pytest.fixture
def changed(expert_folders, tmp_path):
    """An expert's folder with other tensors, and its checkpoint."""

    def change(edit, source=None):
        folder = tmp_path / "changed"
        shutil.copytree(source or expert_folders["first"], folder, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors")
        other = edit(tensors)
        tensors = other if isinstance(other, dict) else tensors
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, Checkpoint(folder, "bert")

    return change


def test_a_whole_expert_lacks_nothing(changed):
    folder, checkpoint = changed(lambda tensors: None)
    assert lacking_weights(described(folder), checkpoint) == []
    assert unused_weights(described(folder), checkpoint) == []
    assert naming_problem(described(folder), checkpoint) is None


def test_names_of_old_releases_are_known(changed):
    def old(tensors):
        norm = "LayerNorm."
        return {
            n.replace(f"{norm}weight", f"{norm}gamma").replace(f"{norm}bias", f"{norm}beta"): t
            for n, t in tensors.items()
        }

    folder, checkpoint = changed(old)
    assert lacking_weights(described(folder), checkpoint) == []
    assert naming_problem(described(folder), checkpoint) is None


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda t: t.pop(QUERY), [f"{QUERY} is not there"]),
        (lambda t: t.pop("classifier.bias"), ["classifier.bias is not there"]),
        (
            lambda t: t.update({"classifier.weight": torch.zeros(3, 32)}),
            ["classifier.weight is [3, 32] in the file, but [2, 32] by config.json"],
        ),
    ],
)
def test_what_is_lacking_is_named(changed, edit, found):
    folder, checkpoint = changed(edit)
    assert lacking_weights(described(folder), checkpoint) == found


def test_weights_that_the_model_has_no_place_for(changed):
    folder, checkpoint = changed(lambda tensors: tensors.update({"dense.weight": torch.zeros(2, 2)}))
    assert unused_weights(described(folder), checkpoint) == ["dense.weight"]


@pytest.mark.parametrize(
    ("prefix", "told"),
    [
        ("_orig_mod.", "'_orig_mod.' in them (torch.compile)"),
        ("module.", "'module.' in them (DistributedDataParallel)"),
        ("model.", "'model.' in them (a LightningModule)"),
        ("base_model.model.", "'base_model.model.' in them (peft)"),
        ("model._orig_mod.", "'model._orig_mod.' in them"),
        ("student.", "'student.' in them"),
    ],
)
def test_prefixes_of_wrappers_are_named(changed, prefix, told):
    folder, checkpoint = changed(lambda tensors: {f"{prefix}{name}": value for name, value in tensors.items()})
    assert told in naming_problem(described(folder), checkpoint)


def test_bare_models_read_checkpoints_with_a_head(changed):
    """A base of language models has names behind a prefix, and is read without a head, too."""
    folder, checkpoint = changed(lambda tensors: None)
    bare = Architecture.of_folder(folder, "AutoModel")
    assert naming_problem(bare, checkpoint) is None
    assert all(name in checkpoint.backbone for name in bare.parameters if not name.startswith("pooler."))
    _, checkpoint = changed(lambda tensors: {f"net.{name}": tensor for name, tensor in tensors.items()})
    assert "'net.'" in naming_problem(bare, checkpoint)


@pytest.mark.parametrize("part", ["_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer", "_orig_mod"])
def test_wrappers_of_single_layers_are_named(changed, part):
    def wrap(tensors):
        tensors[QUERY.replace("query.", f"query.{part}.")] = tensors.pop(QUERY)

    folder, checkpoint = changed(wrap)
    problem = naming_problem(described(folder), checkpoint)
    assert f"'.{part}.' in them" in problem
    assert f"self.query.{part}.weight" in problem


def test_a_base_may_lack_a_pooler_and_nothing_else(make_base, changed):
    bare = make_base(pooler=False)
    model = described(bare)
    assert lacking_of_base(model, Checkpoint(bare, "bert")) == []
    _, checkpoint = changed(lambda tensors: tensors.pop(QUERY.removeprefix("bert.")), bare)
    assert lacking_of_base(model, checkpoint) == [f"{QUERY.removeprefix('bert.')} is not there"]

    def behead(tensors):
        return {name: value for name, value in tensors.items() if not name.startswith("embeddings.")}

    _, checkpoint = changed(behead, bare)
    assert "embeddings.word_embeddings.weight is not there" in lacking_of_base(model, checkpoint)
