"""Tied tensors count once, however often and under whichever of their names files store them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from pave_lightning import load_merged
from pave_lightning.errors import PaveError
from pave_lightning.evaluation.candidates import ExpertsCandidate, MergedCandidate
from pave_lightning.merging import make_method
from pave_lightning.merging.folders import MergeContext, write_merged
from pave_lightning.merging.running import merge
from pave_lightning.purification.export import write_purified_expert
from pave_lightning.weights import Architecture, task_vectors
from pave_lightning.weights.ties import tie_problems

SMALL = {"vocab_size": 30, "d_model": 16, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
BART = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (("layers", 1), ("ffn_dim", 32))}
KINDS = {
    "t5": T5Config(**SMALL, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
    "bart": BartConfig(**SMALL, **BART, encoder_attention_heads=2, decoder_attention_heads=2, bos_token_id=2),
}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def twice(tensors):
    """As other tools store them: every name with a copy."""
    for name in [name for name in tensors if name.endswith("shared.weight")]:
        for copy in COPIES:
            tensors[name.replace("shared.weight", copy)] = tensors[name]


def under_another_name(tensors):
    """As safetensors.torch.save_model stores them: once, under the first name of the alphabet."""
    for name in [name for name in tensors if name.endswith("shared.weight")]:
        tensors[name.replace("shared.weight", COPIES[1])] = tensors.pop(name)


@pytest.fixture(scope="module", params=KINDS)
def originals(request, tmp_path_factory, vocabulary):
    """Folders of a base and of two experts as transformers saves them."""
    root, config = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(root / "base")
    vocabulary.save_pretrained(root / "base")
    for seed, name in enumerate(("a", "b"), 1):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        vocabulary.save_pretrained(root / name)
    return root


@pytest.fixture
def folders(originals, tmp_path):
    """Copies of them that a test may change."""
    return {name: shutil.copytree(originals / name, tmp_path / name) for name in ("base", "a", "b")}


@pytest.fixture(scope="module")
def vocabulary():
    from tokenizers import Tokenizer, models

    words = {name: index for index, name in enumerate(["[PAD]", "[UNK]", "b", "[EOS]", *"acdefg"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", eos_token="[EOS]"
    )


def source_of(folders):
    return task_vectors(str(folders["base"]), {name: str(folders[name]) for name in "ab"})


def values(source):
    parameters = {parameter.name: parameter for parameter in source.parameters}
    return {name: [source.base(p), *(source.vector(task, p) for task in "ab")] for name, p in parameters.items()}


@pytest.mark.parametrize("change", [twice, under_another_name])
@pytest.mark.parametrize("changed", [["base"], ["a"], ["base", "a", "b"]])
def test_task_vectors_are_those_of_files_that_store_it_once(folders, change, changed):
    expected = values(source_of(folders))
    assert "shared.weight" in expected
    assert not set(COPIES) & set(expected)
    for name in changed:
        rewrite(folders[name], change)
    found = values(source_of(folders))
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert all(torch.equal(one, other) for one, other in zip(found[name], tensors, strict=True))


@pytest.mark.parametrize("change", [twice, under_another_name])
def test_merged_folders_and_candidates_hold_it_once_and_load_tied(folders, change, tmp_path):
    for name in folders:
        rewrite(folders[name], change)
    source = source_of(folders)
    architecture = Architecture.of_folder(folders["a"])
    experts = {name: architecture.checkpoint(folders[name]) for name in "ab"}
    context = MergeContext(
        str(folders["base"]), architecture.checkpoint(folders["base"]), experts, architecture, {"vectors": "plain"}
    )
    method = make_method("task_arithmetic", {})
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", method, source, 0.3, context)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert not set(COPIES) & set(stored)
    model = load_merged(tmp_path / "merged", "a")
    backbone = getattr(model, model.base_model_prefix)
    base, *experts_of = (architecture.checkpoint(folders[name]).tensor("shared.weight") for name in ("base", "a", "b"))
    expected = base + 0.3 * sum(expert - base for expert in experts_of)
    torch.testing.assert_close(backbone.shared.weight, expected)
    assert backbone.encoder.embed_tokens.weight is backbone.decoder.embed_tokens.weight is backbone.shared.weight
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "merged").encoder.embed_tokens.weight, expected)
    candidates = MergedCandidate(source, merge(method, source), 0.3), ExpertsCandidate(experts)
    for candidate in candidates:
        names = [name for name, _ in candidate.weights("a")]
        assert names.count("shared.weight") == 1
        assert not set(COPIES) & set(names)


def test_purified_experts_keep_the_form_of_their_file(folders, tmp_path):
    rewrite(folders["a"], twice)
    source = source_of(folders)
    expert = Architecture.of_folder(folders["a"]).checkpoint(folders["a"])
    write_purified_expert(tmp_path / "out", "a", source, expert, {})
    before, after = (load_file(folder / "model.safetensors") for folder in (folders["a"], tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_copies_that_differ_are_refused_by_both_names(folders):
    def spoil(tensors):
        twice(tensors)
        for name in [name for name in tensors if name.endswith(COPIES[0])]:
            tensors[name] = tensors[name] + 1

    for name in ("base", "b"):
        rewrite(folders[name], spoil)
    with pytest.raises(PaveError) as caught:
        source_of(folders)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(f"  - base: {folders['base']}: shared.weight and {COPIES[0]} are one tensor")
    assert lines[2].startswith(f"  - task 'b': {folders['b']}: shared.weight and {COPIES[0]} are one tensor")


def test_an_untied_model_has_each_of_them(tmp_path):
    config = BartConfig.from_dict({**KINDS["bart"].to_dict(), "tie_word_embeddings": False})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "untied")
    architecture = Architecture.of_folder(tmp_path / "untied")
    assert architecture.tied == {}
    checkpoint = architecture.checkpoint(tmp_path / "untied")
    assert {"shared.weight", *COPIES} <= set(checkpoint.backbone)
    assert not list(tie_problems(checkpoint))
    shutil.copytree(tmp_path / "untied", tmp_path / "expert")
    rewrite(
        tmp_path / "expert", lambda tensors: tensors.update({f"model.{COPIES[0]}": tensors[f"model.{COPIES[0]}"] + 1})
    )
    source = task_vectors(str(tmp_path / "untied"), {"a": str(tmp_path / "expert")})
    moved = {p.name for p in source.parameters if not source.is_zero("a", p)}
    assert moved == {COPIES[0]}
